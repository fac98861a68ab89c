#!/usr/bin/env bash
# Pillow 13.0.0: saving as AVIF takes the orientation out of the Exif object that is passed, and the next file lacks
# it.
#
# Guess: `save` reads the object that it is given, and leaves it alone.
# Seen: PNG, AVIF, WEBP saved in a loop with one Exif object of orientation 6: the PNG and the AVIF have it, the WEBP
#     does not, so that only the last one lies on its side.
# latteflow: turns pictures upright as they are decoded, and passes no Exif on to what it writes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pillow==13.0.0
venv/bin/python -I - <<'EOF'
import io

from PIL import Image

ORIENTATION = 0x0112
exif = Image.Exif()
exif[ORIENTATION] = 6
found = []
for form in ("PNG", "AVIF", "WEBP"):
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, form, exif=exif)
    found.append((form, Image.open(file).getexif().get(ORIENTATION), dict(exif)))
    print(*found[-1])
assert found == [("PNG", 6, {ORIENTATION: 6}), ("AVIF", 6, {}), ("WEBP", None, {})]
EOF
