#!/usr/bin/env bash
# open_clip 3.3.0: the name of a model decides its activation, whatever its weights were trained with.
#
# Guess: ViT-B-32 with the weights `openai` computes with their quick GELU, as the tag says and earlier versions did.
# Seen: all of them load into plain GELU (a warning, for a tag; none for a file), and every feature is another: by 0.001 with
#     random weights, far more with trained ones. 27 pairs of name and tag are so; each has a twin, `...-quickgelu`.
# latteflow: refuses these pairs before any work and names the twin. Of a file nobody can tell.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 timm==1.0.31
venv/bin/python -I - <<'EOF'
import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg

pairs = [
    (name, tag)
    for name in open_clip.list_models()
    for tag in open_clip.list_pretrained_tags_by_model(name)
    if get_pretrained_cfg(name, tag).get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu")
]
print(len(pairs), "pairs, such as", *pairs[:2])
assert ("ViT-B-32", "openai") in pairs and all(f"{name}-quickgelu" in open_clip.list_models() for name, _ in pairs)

torch.manual_seed(0)
trained = open_clip.create_model("ViT-S-32").eval()
twin = open_clip.create_model("ViT-S-32", force_quick_gelu=True).eval()
print("loading:", twin.load_state_dict(trained.state_dict()))
with torch.inference_mode():
    pixels = torch.randn(2, 3, 224, 224)
    one, other = (model.encode_image(pixels, normalize=True) for model in (trained, twin))
print("cosines:", (one * other).sum(1).tolist(), "largest difference:", float((one - other).abs().max()))
assert (one - other).abs().max() > 1e-3
EOF
