"""Torch and text only: towers, describers, methods, metrics."""

import os

# Torch's OpenMP threads otherwise spin while they wait, and where other work shares the cores a two-thread forward pass
# then runs several times slower. It must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
