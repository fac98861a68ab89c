#!/usr/bin/env bash
# Pillow 13.0.0: the upper half of an unsigned 32-bit grey TIFF is read as negative numbers.
#
# Guess: refused, or read as floats, since no mode of Pillow holds 32 bits without a sign.
# Seen: mode I, and 4294967295 is -1, so white turns darker than black; no warning.
# latteflow: takes the sign from the tag SampleFormat, and so sees the upper half as the bright one.
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

stored = np.array([[0, 2**31 - 1, 2**31, 2**32 - 1]], np.uint32)
tifffile.imwrite("grey.tif", stored, photometric="minisblack")
picture = Image.open("grey.tif")
read = np.asarray(picture)[0].tolist()
print("stored", stored[0].tolist(), "read", picture.mode, read)
assert tifffile.imread("grey.tif").tolist() == stored.tolist()
assert (picture.mode, read) == ("I", [0, 2**31 - 1, -(2**31), -1])
EOF
