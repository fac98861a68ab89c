#!/usr/bin/env bash
# datasets 5.2.0 on webdataset tars: a JPEG shard with a PNG in it loses that picture, or is refused, by the PNG's
# place.
#
# Guess: a column for each ending, with nulls.
# Seen: columns are those of the first five samples. A PNG after them leaves a row whose picture is null, and a JSON
#     key that comes later is dropped, both without a word; one among the five is an error about the format of the
#     archive.
# latteflow: keeps images as they came, so a shard may mix endings, which docs/formats.md says; it reads tars sample
#     by sample, and so takes them all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pillow==13.0.0
HF_HUB_OFFLINE=1 HF_HOME=$folder venv/bin/python -I - <<'EOF'
import io
import json
import tarfile

import datasets
from PIL import Image

datasets.disable_progress_bars()


def write(name: str, png: int) -> None:
    with tarfile.open(name, "w") as tar:
        for number in range(8):
            form, picture = ("PNG" if number == png else "JPEG"), io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, form)
            about = json.dumps({"number": number} | ({"late": True} if number == 7 else {}))
            for ending, data in (("png" if form == "PNG" else "jpg", picture.getvalue()), ("json", about.encode())):
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


write("late.tar", 6)
rows = datasets.load_dataset("webdataset", data_files="late.tar", split="train")
missing = [key for key, picture in zip(rows["__key__"], rows["jpg"]) if picture is None]
print("columns", rows.column_names, "without a picture", missing, "last", rows[7]["json"])
assert rows.column_names == ["jpg", "json", "__key__", "__url__"]
assert missing == ["0006"] and rows[7]["json"] == {"number": 7}
write("early.tar", 2)
try:
    datasets.load_dataset("webdataset", data_files="early.tar", split="train")
except ValueError as error:
    print("refused:", error)
else:
    raise SystemExit("a PNG among the first five is taken")
EOF
