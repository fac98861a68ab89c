#!/usr/bin/env bash
# scikit-learn 1.9.1: top_k_accuracy_score gives ties to the class that comes last, argmax to the one that comes first.
#
# Guess: with k = 1 it equals accuracy_score of the argmax.
# Seen: 0.25 against 0.75 where two of four images have equal scores for two classes.
# latteflow: sorts stably in float64, so that ties go to the class named first in every figure, top-1 and top-5 alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet scikit-learn==1.9.1 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import numpy as np
from sklearn.metrics import accuracy_score, top_k_accuracy_score

truth = [0, 0, 1, 2]
scores = np.array([[0.5, 0.5, 0.0], [0.4, 0.4, 0.2], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
top_1 = top_k_accuracy_score(truth, scores, k=1)
accuracy = accuracy_score(truth, scores.argmax(axis=1))
print("top_k_accuracy_score, k = 1:", top_1, "accuracy_score of the argmax:", accuracy)
assert (top_1, accuracy) == (0.25, 0.75)
EOF
