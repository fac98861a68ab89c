"""An exported model as files: which there are, which of them an export wrote, and how they are read.

A folder may come from anybody. Only regular files are opened, so that nothing hangs on a pipe or reads a device; JSON
is bounded in size, and in depth by the parser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latteflow.models.errors import ModelError

SCHEMA, SCHEMA_VERSION = "latteflow-model", 1
SETTINGS_FILE, HEAD_FILE, CLASSES_FILE = "latteflow.json", "classifier.safetensors", "classes.json"
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT_CONFIG = "text_config.json"
"""Of a text tower that transformers builds; open_clip itself would ask the model hub for it."""
CLAMP_FILE, CARD_FILE, ONNX_FILE, TRANSFORMERS = "clamp.safetensors", "README.md", "model.onnx", "transformers"

MOST_JSON = 64 << 20
"""Bytes of a JSON file; the largest tokenizers have half of it."""
MOST_ENTRIES = 1000
# Of exports that did not list their files yet.
_EARLIER = {
    SETTINGS_FILE, HEAD_FILE, CLASSES_FILE, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, CLAMP_FILE, CARD_FILE, ONNX_FILE,
    f"{ONNX_FILE}.data", TRANSFORMERS, "latteflow_embedded.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
}  # fmt: skip


def check_files(folder: Path) -> None:
    """Whether everything in a model's folder may be opened.

    Raises:
        ModelError: something in it is neither a regular file nor a folder (links are followed), a JSON file is larger
            than MOST_JSON, or there are more than MOST_ENTRIES.
    """
    for number, path in enumerate(sorted(folder.iterdir())):
        if number == MOST_ENTRIES:
            raise ModelError(f"model {folder}: it holds more than {MOST_ENTRIES} files; give the folder of one model")
        if path.is_dir():
            continue
        if not path.is_file():
            what = "a link that leads to no file" if path.is_symlink() else "no regular file"
            raise ModelError(f"model {folder}: {path.name} is {what}; copy the model again")
        if path.suffix == ".json" and (size := path.stat().st_size) > MOST_JSON:
            raise ModelError(f"model {folder}: {path.name} has {size:,} bytes, and {MOST_JSON:,} are the most")


def read_json(path: Path) -> Any:
    """The content of a file that :func:`check_files` let pass.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def write_json(path: Path, value: Any) -> None:
    """As people read it too."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def written(folder: Path) -> set[str]:
    """Names in a folder that the export in it wrote; none if there is no export."""
    if not (folder / SETTINGS_FILE).is_file():
        return set()
    try:
        check_files(folder)
        found = read_json(folder / SETTINGS_FILE)
        names = set(found.get("files", _EARLIER)) if found["schema"] == SCHEMA else set()
    except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {path.name for path in folder.iterdir()} & names


def check_target(folder: Path, *, force: bool = False) -> None:
    """Whether a model may be exported there: the folder is new or empty, or holds an earlier export and nothing else.

    Args:
        force: other things may be there as well. They stay, but for files of the names that an export has.

    Raises:
        ModelError: there are other things.
    """
    if force or not folder.is_dir():
        return
    others = {path.name for path in folder.iterdir()} - written(folder)
    if others:
        more = f" and {len(others) - 1} other things" if len(others) > 1 else ""
        raise ModelError(
            f"folder {folder} holds {min(others)!r}{more} that no export wrote; give a new or empty folder, or --force "
            "to put the model among them"
        )


def list_files(folder: Path) -> None:
    """Note in a finished export which files it consists of."""
    settings = read_json(folder / SETTINGS_FILE)
    names = sorted(path.name for path in folder.iterdir())
    write_json(folder / SETTINGS_FILE, {**settings, "files": names})
