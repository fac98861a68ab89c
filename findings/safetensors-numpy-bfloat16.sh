#!/usr/bin/env bash
# safetensors 0.8.0: its numpy half writes bfloat16 arrays (of ml_dtypes 0.6.0) and cannot read them back.
#
# Guess: what `save` takes, `load` of the same module gives back; or `save` refuses it.
# Seen: `save` writes a sound BF16 tensor; `load` raises KeyError: 'BF16', and a float32 tensor beside it is lost with
#     it.
# latteflow: writes arrays that numpy reads as float32, and opens weights, which may be bfloat16, with torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import json

import ml_dtypes
import numpy as np
from safetensors import numpy as arrays

data = arrays.save({"half": np.ones(2, ml_dtypes.bfloat16), "whole": np.ones(2, np.float32)})
print(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))
try:
    arrays.load(data)
except KeyError as error:
    print("load:", repr(error))
    assert error.args == ("BF16",)
else:
    raise SystemExit("bfloat16 is read")
EOF
