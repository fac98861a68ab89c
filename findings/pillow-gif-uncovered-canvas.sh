#!/usr/bin/env bash
# Pillow 13.0.0: what a GIF's first picture leaves of the canvas gets the palette's first colour, whatever the
# background is.
#
# Guess: transparent, as Chromium 150 shows it, or the background colour that the file names.
# Seen: a blue picture in the middle of a wider canvas, on a palette of red, green, blue and white with white as the
#     background: the rest is opaque red.
# latteflow: takes what the first picture leaves as transparent, as Chromium does, and so sees it as white.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pillow==13.0.0
venv/bin/python -I - <<'EOF'
import io
import struct

from PIL import Image

palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255])
codes = (4, 2, 2, 5)  # of LZW, 3 bits each: clear, blue, blue, end
packed = sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(2, "little")
seen = {}
for background in (0, 1, 3):
    canvas = struct.pack("<HHBBB", 4, 1, 0x91, background, 0)
    frame = b"," + struct.pack("<HHHHB", 1, 0, 2, 1, 0) + b"\x02\x02" + packed + b"\0"
    picture = Image.open(io.BytesIO(b"GIF89a" + canvas + palette + frame + b";"))
    seen[background] = list(picture.convert("RGBA").get_flattened_data())
    print("background", background, seen[background])
red, blue = (255, 0, 0, 255), (0, 0, 255, 255)
assert all(pixels == [red, blue, blue, red] for pixels in seen.values())
EOF
