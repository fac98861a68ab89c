"""CLAMP inside `tune`: what it is given of a domain, its files, and how they are read again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.towers.clip import Clip
from storage.artifacts import Artifact
from storage.tables import safetensors
from tasks.core.domain import Domain
from tasks.core.features import Features, centred
from tasks.core.stage import StageResult
from tasks.describe.screen import read_screened, read_text_features, usable
from tasks.tune.training import Files, Progress, StoredCheckpoint

if TYPE_CHECKING:
    from models.methods.clamp.tower import ClampTower
    from models.methods.clamp.training import ClampData

log = logging.getLogger("latteflow.tasks")
VERSION = 2
"""Of what a tower is given; raised when it changes."""
_NOT_OF_THE_MODEL = {"lm", "revision", "cache_gb"}
"""Settings that a model does not depend on, or that are in the language model's identity."""


def made_from(domain: Domain, screened: StageResult) -> dict[str, Any]:
    """What shapes a CLAMP model besides the features, how it is trained, and the seed."""
    from models.methods.clamp import lm

    return {
        "screen": screened.ref.digest,
        "language_model": lm.identity(domain.clamp),
        "clamp": domain.clamp.model_dump(mode="json", exclude=_NOT_OF_THE_MODEL),
        "version": VERSION,
    }


def train(
    domain: Domain,
    clip: Clip,
    found: Features,
    centre: np.ndarray,
    screened: Artifact,
    name: str,
    seed: int,
    kept: StoredCheckpoint,
    progress: Progress,
) -> Files:
    """Train a tower, or go on with it: the files of the part.

    Files: as of any method, and ``<name>.adapter.safetensors`` (see :mod:`models.methods.clamp.adapter`).
    """
    from models.methods import training
    from models.methods.clamp import lm
    from models.methods.clamp.adapter import pack
    from models.methods.clamp.tower import ClampTower
    from models.methods.clamp.training import Clamp

    data = clamp_data(domain, clip, found, centre, screened)
    model, tokenizer = lm.load(domain.clamp, clip.device)
    method = Clamp(ClampTower(model, tokenizer, domain.clamp, clip.dim, seed=seed), data, seed=seed)
    log.info("tune %s texts=%d cut=%d", name, len(data.texts), method.tokens.n_cut)
    history = training.train(method, domain.training, seed=seed, checkpoint=kept, on_step=progress)
    tower = method.tower.eval()
    classes = tower.text_features(domain.prompt_names)
    return {
        f"{name}.safetensors": safetensors(
            prototypes=classes.cpu().numpy(), centre=centre, scale=np.array([clip.scale], np.float32)
        ),
        f"{name}.adapter.safetensors": pack(tower),
        f"{name}.history.json": json.dumps(history).encode(),
    }


def clamp_data(domain: Domain, clip: Clip, found: Features, centre: np.ndarray, screened: Artifact) -> ClampData:
    """Images with the texts that passed the screen, and the CLIP's own reading of all texts.

    A class is its name, as in evaluation: the wrapper is its sentence. The teacher reads it in the domain's sentences.
    """
    import torch

    from models.methods.clamp.training import ClampData

    captions, groups = (usable(read_screened(screened, kind)) for kind in ("images", "groups"))
    own = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
    names = domain.prompt_names
    row = {name: number for number, name in enumerate(names)}
    kinds: list[tuple[Sequence[str], Any]] = [
        (captions["text"].to_list(), lambda texts: read_text_features(screened, "images", texts)),
        (groups["text"].to_list(), lambda texts: read_text_features(screened, "groups", texts)),
        (names, lambda new: found.class_features[[row[name] for name in new]]),
    ]
    number: dict[str, int] = {}
    teacher = []
    for texts, features in kinds:
        new = [text for text in dict.fromkeys(texts) if text not in number]
        number |= {text: len(number) + place for place, text in enumerate(new)}
        teacher.append(features(new))
    of_image: dict[str, list[int]] = {}
    for keys, text in zip(groups["member_keys"].to_list(), groups["text"], strict=True):
        for key in keys:
            of_image.setdefault(key, []).append(number[text])
    return ClampData(
        image_features=torch.from_numpy(centred(found.embeds, centre)),
        texts=list(number),
        teacher=torch.from_numpy(np.concatenate(teacher)),
        teacher_scale=clip.scale,
        image_texts=torch.tensor([number[own[key]] if key in own else -1 for key in found.keys]),
        group_texts=[of_image.get(key, []) for key in found.keys],
        class_texts=[[number[name]] for name in names],
        pseudo_labels=torch.from_numpy(found.zero_shot.copy()),
    )


def text_reader(domain: Domain, adapter: bytes) -> Callable[[Sequence[str]], np.ndarray]:
    """Unit features of texts by the tower that an adapter file holds."""
    from models.methods.clamp.adapter import unpack

    tower = unpack(adapter, domain.clamp.lm)
    return lambda texts: tower.text_features(texts).cpu().numpy()


def read_tower(domain: Domain, artifact: Artifact, name: str) -> ClampTower:
    """The trained tower of a part of a `tune` artifact."""
    from models.methods.clamp.adapter import unpack

    return unpack(artifact.read(f"{name}.adapter.safetensors"), domain.clamp.lm)
