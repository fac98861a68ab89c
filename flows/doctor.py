"""doctor: whether this machine, and what a domain file names, can do the work; a line for each thing."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from latteflow.flows import machine
from latteflow.models.errors import ModelError
from latteflow.models.settings import ClipSettings, OpenAISettings, TagsSettings, VllmSettings
from latteflow.models.towers import clip
from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.images import HEIC_HINT, READS_HEIC, decoder_version
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.describe.texts import describer_identity, models_of

State = Literal["ok", "warning", "problem"]
STORE = "runs/store"
"""Where a domain file in the working folder has its store, if it does not say."""
_TIGHT, _FULL = 10 * 10**9, 10**9
"""Bytes below which room on a disk is a warning, and a problem."""
_PATIENCE_S = 5.0
"""For a store or a server: one that answers at all answers sooner."""


class Check(NamedTuple):
    """What was looked at, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def examine(domain: Domain | None) -> list[Check]:
    """Everything, in order. Nothing is left behind, and a store that is not there yet is not made."""
    looks: dict[str, Callable[[], Check]] = {
        "latteflow": _latteflow,
        "torch": _torch,
        "open_clip": lambda: _open_clip(domain),
        "vllm": lambda: _vllm(domain),
        "decoders": _decoders,
        "temporary files": lambda: _disk("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a larger disk"),
        "store": lambda: _store(domain),
        "room of the store": lambda: _room(domain),
        **({"clip": lambda: _clip(domain.clip), "describer": lambda: _describer(domain)} if domain else {}),
        "prefect": _prefect,
    }
    return [_looked(name, look) for name, look in looks.items()]


def _looked(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except (ConfigError, DataError, ModelError, StorageError) as error:
        return Check(name, "problem", str(error))
    except Exception as error:  # a doctor is called where things are broken, in whatever way
        return Check(name, "problem", f"{type(error).__name__}: {error}", "install it again")


def _latteflow() -> Check:
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("latteflow", "ok", f"{machine.version('latteflow') or 'not installed'}, {where}")


def _torch() -> Check:
    if not machine.has("torch"):
        return Check("torch", "problem", "not installed", "install latteflow again, with what it needs")
    import torch

    gpus = machine.gpus()
    if gpus:
        return Check("torch", "ok", f"{torch.__version__}; GPU: {'; '.join(map(str, gpus))}")
    if machine.has_driver():
        found = f"{torch.__version__}; a GPU's driver is loaded, and torch sees no GPU"
        return Check("torch", "warning", found, "install a torch that is built for the driver's CUDA")
    return Check("torch", "ok", f"{torch.__version__}; no GPU, {torch.get_num_threads()} threads")


def _open_clip(domain: Domain | None) -> Check:
    if found := machine.version("open_clip"):
        return Check("open_clip", "ok", found)
    needed = domain is not None and domain.clip.model != "embedded"
    advice = "pip install open_clip_torch, but not into an environment of vLLM's"
    return Check("open_clip", "problem" if needed else "warning", "not installed", advice)


def _vllm(domain: Domain | None) -> Check:
    if found := machine.version("vllm"):
        return Check("vllm", "ok", found)
    if domain is None or not isinstance(domain.describer, VllmSettings):
        return Check("vllm", "ok", "not installed; only `describer: {kind: vllm}` needs it")
    advice = "run `describe` and `group` where it is: docs/describers.md, Two environments"
    return Check("vllm", "warning", "not in this environment, and the describer needs it", advice)


def _decoders() -> Check:
    return Check("decoders", "ok", decoder_version() + ("" if READS_HEIC else f"; {HEIC_HINT}"))


def _disk(name: str, folder: Path, advice: str) -> Check:
    free = machine.room(folder)
    state: State = "problem" if free < _FULL else "warning" if free < _TIGHT else "ok"
    return Check(name, state, f"{free / 10**9:,.1f} GB free at {folder}", "" if state == "ok" else advice)


def _store(domain: Domain | None) -> Check:
    """Proven where it is, or where it would be made."""
    url = domain.store if domain else STORE
    is_local = "://" not in url
    where = machine.there(Path(url)) if is_local else url
    single = domain is not None and domain.single_writer
    ObjectStore(str(where), single_writer=single, patience=_PATIENCE_S).prove()
    later = ", which the first run makes" if is_local and not Path(url).exists() else ""
    if single:
        advice = "one process at a time, by your word (`single_writer: true`)"
        return Check("store", "warning", f"{url}{later}: can be written", advice)
    return Check("store", "ok", f"{url}{later}: of several writers of one object, one creates it")


def _room(domain: Domain | None) -> Check:
    url = domain.store if domain else STORE
    if "://" in url:
        return Check("room of the store", "ok", "a bucket's, not looked at")
    return _disk("room of the store", machine.there(Path(url)), "free some, or choose another `store`")


def _clip(settings: ClipSettings) -> Check:
    clip.check(settings)
    if settings.model == "embedded":
        return Check("clip", "ok", "embedded; its packages are here")
    name = f"{settings.model}, {settings.pretrained}" if settings.pretrained else settings.model
    return Check("clip", "ok", name) if _is_within_reach(settings) else Check(
        "clip", "warning", f"{name}: its weights are not here, and no model hub answers", "connect, or give a folder"
    )  # fmt: skip


def _is_within_reach(settings: ClipSettings) -> bool:
    """Whether a model of the hub can be had; True of all others, which :func:`models.towers.clip.check` looked at."""
    if settings.model.startswith("hf-hub:"):
        repository = settings.model.removeprefix("hf-hub:")
    elif settings.pretrained is None or Path(settings.pretrained).is_file():
        return True
    else:
        from open_clip.pretrained import get_pretrained_cfg

        repository = get_pretrained_cfg(settings.model, settings.pretrained).get("hf_hub", "").rstrip("/")
    weights = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return not repository or machine.within_reach(repository, "open_clip_config.json", weights)


def _describer(domain: Domain) -> Check:
    settings = domain.describer
    if isinstance(settings, OpenAISettings):
        models = models_of(settings)
        if settings.model not in models:
            found = f"the server at {settings.url} has no model {settings.model!r}"
            return Check("describer", "warning", found, f"it has {', '.join(models[:5]) or 'none'}")
        return Check("describer", "ok", f"openai: {settings.model} at {settings.url}")
    if not isinstance(settings, TagsSettings):
        describer_identity(domain, None)
    return Check("describer", "ok", settings.kind)


def _prefect() -> Check:
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    version, url = machine.version("prefect"), get_current_settings().api.url
    if url is None:
        return Check("prefect", "ok", f"{version}; no server is configured, and `latteflow run` needs none")
    with get_client(httpx_settings={"timeout": _PATIENCE_S}, sync_client=True) as client:
        error = client.api_healthcheck()
        if error is not None:
            found = f"{version}; the server at {url} does not answer ({type(error).__name__}: {error})"
            return Check("prefect", "problem", found, "start it, or correct PREFECT_API_URL")
        served = client.api_version()
    if served.rpartition(".")[0] != str(version).rpartition(".")[0]:
        return Check("prefect", "warning", f"{version}; the server at {url} has {served}", "take one version for both")
    return Check("prefect", "ok", f"{version}; the server at {url} answers")
