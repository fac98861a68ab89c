#!/usr/bin/env bash
# datasets 5.2.0: a class folder `crash-test` makes `imagefolder` take it for a split, and leave out all other classes.
#
# Guess: splits are folders named train, validation or test; a word inside a name is a name.
# Seen: three class folders of one image each. As `crash-pad` all three rows are in `train`; as `crash-test` there is a
#     split `test` with one row and no other split, and no warning about the rest.
# latteflow: takes every image below a folder; it asks about splits among tars and tables only, by the whole first
#     word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet datasets==5.2.0 pillow==13.0.0
HF_HUB_OFFLINE=1 HF_HOME=$folder venv/bin/python -I - <<'EOF'
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
found = {}
for name in ("crash-pad", "crash-test"):
    for label in ("hill", "valley", name):
        folder = Path("photos-" + name.removeprefix("crash-")[0], label)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.jpg")
    splits = datasets.load_dataset("imagefolder", data_dir=str(folder.parent))
    found[name] = {split: rows.num_rows for split, rows in splits.items()}
    print(name, found[name])
assert found == {"crash-pad": {"train": 3}, "crash-test": {"test": 1}}
EOF
