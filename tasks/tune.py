"""tune: features and texts -> adapted models, one for each seed."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models import clip
from storage.artifacts import Artifact, ArtifactWriter
from storage.errors import DataError
from storage.shards import read_index, read_records
from storage.tables import read_safetensors, safetensors
from tasks.decode import pixel_batches
from tasks.domain import Domain
from tasks.features import Features, centred, read_features
from tasks.pixels import PixelReader
from tasks.screen import read_screened, read_text_features, usable
from tasks.stage import StageResult, open_store, run_stage

VERSION = 1
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Tuned:
    """One adapted model, as the difference to the CLIP it came from.

    Attributes:
        prototypes: the classifier, unit rows ``(classes, dim)``.
        centre: subtracted from image embeddings, ``(dim,)``; zeros without centring.
        image_map, text_map: ``(dim, dim)`` on the right of the towers' embeddings, or None.
        towers: tensors of the CLIP that training changed, by name; empty where the towers are as they were.
        scale: exp(logit_scale) of the CLIP, which stays that of the classifier whatever scale the loss had (4.10).
    """

    prototypes: np.ndarray
    centre: np.ndarray
    image_map: np.ndarray | None
    text_map: np.ndarray | None
    towers: Mapping[str, np.ndarray]
    scale: float


def tune(domain: Domain, shards: StageResult, embedded: StageResult, screened: StageResult) -> StageResult:
    """LatteCLIP on the domain's features and the texts that passed the screen, once for each seed.

    A text's weight says whether it is used, and which of several; in the mixer all that are used count as the paper
    has it.

    Files: ``seed-<n>.safetensors`` (prototypes, centre, scale, maps; tensors of trained towers under ``tower.``) and
    ``seed-<n>.history.json`` (one record for each epoch).
    """
    store = open_store(domain)
    shared = {
        "embed": embedded.ref.digest,
        "screen": screened.ref.digest,
        "clip": clip.identity(domain.clip),
        "centred": clip.is_centred(domain.clip),
        "latteclip": domain.latteclip.model_dump(mode="json"),
    }

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        data: _Data | None = None
        for seed in domain.seeds:
            own = {**shared, "seed": seed}
            if writer.find(f"seed-{seed}", own) is None:
                data = data or _Data(domain, *(store.open(each.ref) for each in (shards, embedded, screened)))
                found, history = data.run(seed)
                files = {f"seed-{seed}.safetensors": found, f"seed-{seed}.history.json": json.dumps(history).encode()}
                writer.put(f"seed-{seed}", own, files)
        return {"models": len(domain.seeds)}

    return run_stage(store, domain, "tune", VERSION, {**shared, "seeds": domain.seeds}, body)


class _Data:
    """What all seeds share: the model, the features and the texts' features."""

    def __init__(self, domain: Domain, images: Artifact, embedded: Artifact, screened: Artifact) -> None:
        import torch

        from models.latteclip import TuneData

        self._settings = domain.latteclip
        self._clip = clip.load(domain.clip)
        found = read_features(embedded)
        self._centre = found.centre if clip.is_centred(domain.clip) else np.zeros_like(found.centre)
        captions, groups = (usable(read_screened(screened, kind)) for kind in ("images", "groups"))
        texts = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
        ordered = [texts.get(key, "") for key in found.keys]
        class_texts = [text for prompts in domain.prompts() for text in prompts]
        towers = self._settings.trains_towers
        self._data = TuneData(
            pseudo_labels=torch.from_numpy(found.zero_shot.copy()),
            class_texts=self._read(class_texts, self._clip.text_features).unflatten(0, (len(domain.classes), -1)),
            image_texts=self._read(ordered, functools.partial(read_text_features, screened, "images")),
            has_image_text=torch.tensor([text != "" for text in ordered]),
            group_texts=self._read(groups["text"].to_list(), functools.partial(read_text_features, screened, "groups"))
            if groups.height
            else None,
            group_classes=torch.tensor(groups["label"].to_list()) if groups.height else None,
            image_embeds=None if towers else torch.from_numpy(found.embeds),
            centre=torch.from_numpy(self._centre),
            pixels=PixelReader(images, found.keys, self._clip.preprocess) if towers else None,
        )

    def _read(self, texts: Sequence[str], features: Callable[[Sequence[str]], np.ndarray]) -> Any:
        """Tokens where the text tower trains, else features."""
        import torch

        if self._settings.trains_towers and self._settings.trains_texts:
            return self._clip.tokenizer(list(texts))
        return torch.from_numpy(features(texts))

    def run(self, seed: int) -> tuple[bytes, list[dict[str, float]]]:
        from models.latteclip import tune as tune_latteclip

        epochs = self._settings.n_epochs(len(self._data))

        def on_epoch(epoch: int, stats: Mapping[str, float]) -> None:
            if (epoch + 1) % max(1, epochs // 4) == 0:
                log.info("tune seed=%d epoch=%d/%d loss=%.4f", seed, epoch + 1, epochs, stats["loss"])

        result = tune_latteclip(
            self._settings,
            self._data,
            seed=seed,
            clip=self._clip.model if self._settings.trains_towers else None,
            scale=self._clip.scale,
            on_epoch=on_epoch,
        )
        found = {
            "prototypes": result.prototypes.numpy(),
            "centre": self._centre,
            "scale": np.array([self._clip.scale], np.float32),
        }
        for name, change in (("image_map", result.image_map), ("text_map", result.text_map)):
            if change is not None:
                found[name] = change.numpy()
        if result.clip is not None:
            before = self._clip.model.state_dict()
            for name, tensor in result.clip.state_dict().items():
                if not tensor.equal(before[name]):
                    found[f"tower.{name}"] = tensor.numpy()
        return safetensors(**found), result.history


def read_tuned(artifact: Artifact, seed: int) -> Tuned:
    """One adapted model of a `tune` artifact."""
    found = read_safetensors(artifact.read(f"seed-{seed}.safetensors"))
    return Tuned(
        prototypes=found["prototypes"],
        centre=found["centre"],
        image_map=found.get("image_map"),
        text_map=found.get("text_map"),
        towers={name.removeprefix("tower."): found[name] for name in found if name.startswith("tower.")},
        scale=float(found["scale"][0]),
    )


def tuned_features(domain: Domain, tuned: Tuned, images: Artifact, found: Features) -> np.ndarray:
    """Unit image features of the adapted model, ``(n, dim)``, in the order of ``found``.

    Args:
        images: the shards that ``found`` was made of; read only where the towers themselves were trained.
    """
    embeds = found.embeds
    if tuned.towers:
        model = tuned_clip(domain, tuned)
        index = read_index(images).filter(pl.col("key").is_in(found.keys))
        records = read_records(images, index)
        batches = pixel_batches(records, model.preprocess, batch=domain.embed.batch)
        embeds = np.concatenate([model.image_embeds(pixels).numpy() for _, pixels in batches])
    if tuned.image_map is None:
        return centred(embeds, tuned.centre)
    return centred((embeds - tuned.centre) @ tuned.image_map, np.zeros_like(tuned.centre))


def tuned_clip(domain: Domain, tuned: Tuned) -> clip.Clip:
    """The domain's CLIP with the trained tensors in place (maps are not folded in)."""
    import torch

    model = clip.load(domain.clip)
    if not tuned.towers:
        return model
    own = copy.deepcopy(model.model)
    own.load_state_dict({name: torch.from_numpy(array) for name, array in tuned.towers.items()}, strict=False)
    return replace(model, model=own)


def export_tuned(domain: Domain, tuned: StageResult, seed: int, folder: Path) -> None:
    """Write one adapted model as a folder of its own (see :mod:`models.export`).

    Raises:
        DataError: the domain has no model with that seed.
    """
    import torch

    from models.export import export

    if seed not in domain.seeds:
        raise DataError(f"there is no model with seed {seed}; `seeds` are {', '.join(map(str, domain.seeds))}")
    found = read_tuned(open_store(domain).open(tuned.ref), seed)
    maps = {name: getattr(found, name) for name in ("image_map", "text_map")}
    export(
        tuned_clip(domain, found),
        folder,
        classes=domain.classes,
        prototypes=torch.from_numpy(found.prototypes),
        centre=torch.from_numpy(found.centre),
        scale=found.scale,
        **{name: None if change is None else torch.from_numpy(change) for name, change in maps.items()},
    )
