#!/usr/bin/env bash
# datasets 5.2.0: a map that gives each image back as it got it encodes JPEGs again, with loss, and a turned one as
# PNG.
#
# Guess: an image that nobody changed keeps its bytes.
# Seen: a JPEG of quality 95 comes back at Pillow's own quality; one with an orientation comes back upright, as a PNG.
#     A map over other columns leaves the bytes alone.
# latteflow: knows an image by the digest of its bytes, so what such a map wrote is new to it, and is described once
#     more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pillow==13.0.0
HF_HUB_OFFLINE=1 HF_HOME=$folder venv/bin/python -I - <<'EOF'
import io

import datasets
from PIL import Image

datasets.disable_progress_bars()
turned = Image.Exif()
turned[0x0112] = 6
noise = Image.effect_noise((32, 24), 50).convert("RGB")
files = []
for exif in (Image.Exif(), turned):
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=95, exif=exif)
    files.append(file.getvalue())
rows = [{"bytes": data, "path": None} for data in files]
before = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())


def stored(data: datasets.Dataset) -> list[bytes]:
    return [row["bytes"] for row in data.cast_column("image", datasets.Image(decode=False))["image"]]


same = stored(before.map(lambda row: {"image": row["image"]}))
other = stored(before.map(lambda row: {"number": 1}))
for data, again in zip(files, same):
    opened = Image.open(io.BytesIO(again))
    print(f"{len(data)} bytes of JPEG became {len(again)} bytes of {opened.format}, {opened.size}")
assert other == files and same[0] != files[0]
assert len(same[0]) < len(files[0]) and same[0].startswith(b"\xff\xd8")
assert same[1].startswith(b"\x89PNG") and Image.open(io.BytesIO(same[1])).size == (24, 32)
EOF
