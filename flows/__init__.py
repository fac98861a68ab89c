"""What is run: the command line, and the flows that `prefect.yaml` deploys."""

import logging

# Prefect's handler shows what a logger lets through, and takes none below the root's level from others.
logging.getLogger("latteflow").setLevel(logging.INFO)
