#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF in which 0 is white is turned round at 1, 4 and 8 bits, and comes as a negative at 16.
#
# Guess: the tag PhotometricInterpretation is followed at any depth, or the file refused.
# Seen: 0 reads as 255 at 8 bits, and as 0 in mode I;16.
# latteflow: goes by the tag where Pillow does not, at 16 bits and for floats, and turns `shard.grey_range` round with
#     it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import numpy as np
import tifffile
from PIL import Image

read = {}
for kind in (np.uint8, np.uint16):
    for photometric in ("minisblack", "miniswhite"):
        tifffile.imwrite("grey.tif", np.array([[0, np.iinfo(kind).max]], kind), photometric=photometric)
        picture = Image.open("grey.tif")
        read[picture.mode, photometric] = np.asarray(picture)[0].tolist()
for what, values in read.items():
    print(*what, values)
assert read == {
    ("L", "minisblack"): [0, 255],
    ("L", "miniswhite"): [255, 0],
    ("I;16", "minisblack"): [0, 65535],
    ("I;16", "miniswhite"): [0, 65535],
}
EOF
