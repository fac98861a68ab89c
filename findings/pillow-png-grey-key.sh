#!/usr/bin/env bash
# Pillow 13.0.0: the transparent grey of a PNG is not scaled with its pixels, so nothing becomes transparent.
#
# Guess: a pixel of the grey that tRNS names is transparent at any depth.
# Seen: at 8 bits, yes. At 2 and 4 bits pixels are stretched to 0-255 and the key stays as the file has it: 7 of 15 is
#     a pixel of 119, and opaque. At 16 bits the key is right, and the conversion to RGBA leaves all of it opaque.
# latteflow: brings key and pixels to one scale, compares 16 bits by themselves (colours too, of which Pillow keeps the
#     upper bytes), and so shows such a pixel as white, where Chromium 150 shows the ground.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pillow==13.0.0 pypng==0.20220715.0
venv/bin/python -I - <<'EOF'
import png
from PIL import Image

alphas = {}
for depth, key in ((2, 1), (4, 7), (8, 7), (16, 1000)):
    name = f"{depth}.png"
    with open(name, "wb") as file:
        png.Writer(2, 1, greyscale=True, bitdepth=depth, transparent=key).write(file, [[key, 2**depth - 1]])
    picture = Image.open(name)
    shown = list(picture.convert("RGBA").get_flattened_data())
    _, _, rows, _ = png.Reader(name).asRGBA()
    other = next(iter(rows))[3]
    print(f"{depth} bits, key {key}: mode {picture.mode}, RGBA {shown}; alpha of the first by pypng {other}")
    assert other == 0
    alphas[depth] = shown[0][3]
assert alphas == {2: 255, 4: 255, 8: 0, 16: 255}
EOF
