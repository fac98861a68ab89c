#!/usr/bin/env bash
# transformers 5.24.0: CLIPImageProcessor crops one pixel beside where torchvision, and so open_clip, crops.
#
# Guess: resize to 224, centre crop and normalise give the same pixels in both, as CLIP's settings are the same.
# Seen: where the longer side is odd and half of what is cut off rounds up, transformers cuts it down: the picture is moved
#     by a pixel, up to 37 of 255 here. Its default (torchvision) also resizes 1 or 2 of 255 apart; `backend="pil"` does not.
# latteflow: `--transformers` compares models on equal pixels; docs/models.md says what its processor adds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
venv/bin/python -I - <<'EOF'
import numpy as np
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.clip import CLIPImageProcessorPil

ours = image_transform_v2(PreprocessCfg(size=64), is_train=False)
size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 10, 3), np.uint8))
apart = {}
for kind in (CLIPImageProcessor, CLIPImageProcessorPil):
    theirs = kind(**size)
    for width in (150, 155):
        picture = coarse.resize((width, 100), Image.Resampling.BICUBIC)
        pixels = theirs(picture, return_tensors="pt")["pixel_values"][0]
        apart[kind.__name__, width] = found = float((pixels - ours(picture)).abs().max() * 0.27 * 255)
        print(f"{kind.__name__}, {width} x 100: {found:.1f} of 255")
assert 0.5 < apart["CLIPImageProcessor", 150] < 3 and apart["CLIPImageProcessorPil", 150] < 0.01
assert apart["CLIPImageProcessor", 155] > 30 and apart["CLIPImageProcessorPil", 155] > 30
EOF
