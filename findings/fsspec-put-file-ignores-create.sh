#!/usr/bin/env bash
# fsspec 2026.9.0: on local files `pipe_file(mode="create")` refuses to replace what is there, and `put_file` replaces
# it.
#
# Guess: both have the argument, so both raise FileExistsError.
# Seen: `put_file(..., mode="create")` writes over a local file without a word; the file system in memory refuses both.
# latteflow: passes files with `put_file` to S3 only, where s3fs keeps the promise; local objects are created by a
#     link.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet fsspec==2026.9.0
venv/bin/python -I - <<'EOF'
from pathlib import Path

import fsspec

Path("new").write_bytes(b"new")
found = {}
for kind, target in (("file", str(Path("target").resolve())), ("memory", "/target")):
    files = fsspec.filesystem(kind)
    for name, source in (("pipe_file", b"new"), ("put_file", "new")):
        files.pipe_file(target, b"old")
        try:
            given = (target, source) if name == "pipe_file" else (source, target)
            getattr(files, name)(*given, mode="create")
            found[kind, name] = "replaced"
        except FileExistsError:
            found[kind, name] = "refused"
        assert files.cat_file(target) == (b"new" if found[kind, name] == "replaced" else b"old")
        print(kind, name, found[kind, name])
assert [*found.values()] == ["refused", "replaced", "refused", "refused"]
EOF
