#!/usr/bin/env bash
# scikit-learn 1.9.1: the most that an image can cost in log_loss depends on the type of the probabilities.
#
# Guess: the same for the same numbers, as they are clipped at one small value.
# Seen: one certain and wrong answer costs 36.0 in float64, 15.9 in float32 and 6.9 in float16, so the same mistakes
#     cost less in half precision.
# latteflow: makes probabilities from logits in float64 whatever the model computes in, and reports no log loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet scikit-learn==1.9.1 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import numpy as np
from sklearn.metrics import log_loss

wrong = np.array([[0.0, 1.0]])
losses = {
    kind.__name__: round(float(log_loss([0], wrong.astype(kind), labels=[0, 1])), 1)
    for kind in (np.float64, np.float32, np.float16)
}
print(losses)
assert losses == {"float64": 36.0, "float32": 15.9, "float16": 6.9}
EOF
