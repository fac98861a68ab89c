#!/usr/bin/env bash
# timm 1.0.31: the file of any other model loads, as soon as the classifier is another than the file's.
#
# Guess: create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": weights}) is an error where the
#     file has none of the model's tensors, as it is with checkpoint_path, which is strict.
# Seen: a model of random weights, and a warning in the log with the tensors' names. With the file's own number of classes it
#     is an error. `num_classes` switches off the check of all tensors, not of the classifier's alone.
# latteflow: a second tower's own weights are loaded strictly, but for the classifier (models/towers/neighbours.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet timm==1.0.31 torch==2.14.1 torchvision==0.29.1 safetensors==0.8.0
venv/bin/python -I - <<'PY'
import timm
import torch
from safetensors.torch import save_file

torch.manual_seed(0)
save_file(timm.create_model("test_resnet").state_dict(), "resnet.safetensors")
given = {"pretrained": True, "pretrained_cfg_overlay": {"file": "resnet.safetensors"}}
pixels = torch.rand(1, 3, 160, 160)

torch.manual_seed(1)
loaded = timm.create_model("test_vit", num_classes=0, **given).eval()
torch.manual_seed(1)
drawn = timm.create_model("test_vit", num_classes=0).eval()
with torch.inference_mode():
    same = loaded(pixels).equal(drawn(pixels))
print("a ViT from the file of a ResNet has the features of one without weights:", same)
assert same

for how, arguments in {"the file's own classes": given, "checkpoint_path": {"checkpoint_path": "resnet.safetensors"}}.items():
    try:
        timm.create_model("test_vit", **arguments)
    except RuntimeError as error:
        print(how + ":", str(error).splitlines()[0])
    else:
        raise SystemExit(f"{how}: loaded as well")
PY
