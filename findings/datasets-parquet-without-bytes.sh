#!/usr/bin/env bash
# datasets 5.2.0: of images given by path, `save_to_disk` stores the bytes, and `to_parquet` the paths alone.
#
# Guess: both store the bytes, and the file's name beside them.
# Seen: the Parquet file has the type of an image column and no picture in it; it breaks when it is moved. The folder
#     of `save_to_disk` is whole, with the base name as path.
# latteflow: follows no path out of a table: each such row is quarantined, and the reason says that it holds no bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pillow==13.0.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME=$folder venv/bin/python -I - <<'EOF'
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

datasets.disable_progress_bars()
Path("photos").mkdir()
Image.new("RGB", (8, 8)).save("photos/1.jpg")
rows = datasets.Dataset.from_dict({"image": ["photos/1.jpg"]}).cast_column("image", datasets.Image())
rows.to_parquet("rows.parquet")
rows.save_to_disk("saved")
stream = next(Path("saved").glob("*.arrow"))
of_parquet = pq.read_table("rows.parquet")["image"].to_pylist()[0]
of_disk = pa.ipc.open_stream(stream).read_all()["image"].to_pylist()[0]
print("to_parquet:", of_parquet)
print("save_to_disk:", len(of_disk["bytes"]), "bytes,", of_disk["path"])
assert of_parquet == {"bytes": None, "path": "photos/1.jpg"}
assert of_disk["bytes"] == Path("photos/1.jpg").read_bytes() and of_disk["path"] == "1.jpg"
EOF
