"""embed: shards -> frozen CLIP features and zero-shot pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact, ArtifactWriter
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.shards import Greys, packed_images, read_index, read_records
from latteflow.storage.tables import parquet, read_parquet, safetensors
from latteflow.tasks.core.decode import pixel_batches
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import centred
from latteflow.tasks.core.progress import tell
from latteflow.tasks.core.stage import StageResult, open_store, run_stage

VERSION = 3
ESTIMATE = 1
"""Version of :mod:`models.judge.shift`; the features do not depend on it."""
CANDIDATES = 5
"""Pseudo-label candidates kept for each image."""


def embed(domain: Domain, shards: StageResult) -> StageResult:
    """Features of every image, shard by shard, and the classes the untouched model sees in them.

    Files: ``<shard>.features.parquet`` (key, norm, feature: unit rows), ``zero_shot.parquet`` (key, label, labels and
    probabilities of the best candidates; one row for each live image), ``classes.safetensors`` (text_features, centre,
    share: how much of the centre is to be subtracted).
    """
    store = open_store(domain)
    images = store.open(shards.ref)
    domain = domain.of_split(images.inputs["split"])
    who = clip.identity(domain.clip)
    model = _Lazy(domain)
    inputs = {
        "shards": shards.ref.digest,
        "clip": who,
        "prompts": domain.prompts(),
        "centre": f"estimated, {ESTIMATE}" if domain.clip.centre is None else domain.clip.centre,
    }

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        index, greys = read_index(images), Greys(images)
        frames: list[pl.DataFrame] = []
        on_batch = _Counted(images)
        for part in images.parts:
            tar = f"{part.name}.tar"
            if tar not in images.files:
                continue
            name, own = f"{part.name}.features.parquet", {"shard": images.files[tar][1].sha256, "clip": who}
            if ranges := greys.digest(part.name):
                own["greys"] = ranges
            found = writer.find(part.name, own)
            if found is None:
                features = _features(domain, model, images, part.name, on_batch)
                writer.put(part.name, own, {name: parquet(features)}, rows=features.height)
            else:
                features = read_parquet(writer.read(found, name))
                on_batch.before += features.height
            frames.append(features)
        live = index.select("key").join(pl.concat(frames), on="key", how="inner", maintain_order="left")
        text = class_text_features(domain, model.loaded.text_features)
        labels, centre, share = _zero_shot(live, text, model.loaded.scale, domain.clip.centre)
        writer.put(
            "zero_shot",
            {"features": sha256(canonical_json(live["key"].to_list())), **inputs},
            {
                "zero_shot.parquet": parquet(labels),
                "classes.safetensors": safetensors(
                    text_features=text, centre=centre, share=np.array([share], np.float32)
                ),
            },
            rows=labels.height,
        )
        return {"images": live.height, "left_out": index.height - live.height}

    return run_stage(store, domain, "embed", VERSION, inputs, body, split=str(images.inputs["split"]))


class _Lazy:
    """The model, loaded when the first part needs it."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._clip: clip.Clip | None = None

    @property
    def loaded(self) -> clip.Clip:
        if self._clip is None:
            self._clip = clip.load(self._domain.clip)
        return self._clip


class _Counted:
    """Tells of each image that was read, beside those that an earlier run has read."""

    def __init__(self, images: Artifact) -> None:
        self._total = sum(packed_images(images).values())
        self.before = self._done = 0

    def __call__(self, images: int) -> None:
        if not self._done:
            tell(self.before, self._total, "images")
        self._done += images
        tell(self.before + self._done, self._total, "images")


def _features(
    domain: Domain, model: _Lazy, images: Artifact, shard: str, on_batch: Callable[[int], None]
) -> pl.DataFrame:
    # Removed images stay in their shard's features, so that a shard's part never changes.
    rows = read_parquet(images.read(f"{shard}.index.parquet"))
    keys: list[str] = []
    embeds: list[np.ndarray] = []
    for records, pixels in pixel_batches(read_records(images, rows), model.loaded.preprocess, batch=domain.embed.batch):
        keys += [record.key for record in records]
        embeds.append(model.loaded.image_embeds(pixels).numpy())
        on_batch(len(records))
    dim = model.loaded.dim
    table = np.concatenate(embeds) if embeds else np.zeros((0, dim), np.float32)
    norms = np.linalg.norm(table, axis=1)
    return pl.DataFrame(
        {"key": keys, "norm": norms, "feature": table / np.maximum(norms, 1e-12)[:, None]},
        schema={"key": pl.String, "norm": pl.Float32, "feature": pl.Array(pl.Float32, dim)},
    )


def class_text_features(domain: Domain, read: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """Unit text feature of each class, the mean direction over the templates, ``(classes, dim)``.

    Args:
        read: n texts -> unit rows ``(n, dim)``.
    """
    texts = [text for prompts in domain.prompts() for text in prompts]
    return clip.class_features(read(texts), len(domain.templates))


def _estimated(embeds: np.ndarray, text: np.ndarray, scale: float) -> float:
    import torch

    from latteflow.models.judge.shift import centre_share

    return centre_share(torch.from_numpy(embeds), torch.from_numpy(text), scale)


def _zero_shot(
    live: pl.DataFrame, text: np.ndarray, scale: float, centre_first: bool | None
) -> tuple[pl.DataFrame, np.ndarray, float]:
    """Pseudo-labels; the centre of the images, and how much of it was subtracted first."""
    embeds = live["feature"].to_numpy() * live["norm"].to_numpy()[:, None]
    centre = embeds.mean(axis=0, dtype=np.float64).astype(np.float32)
    share = _estimated(embeds, text, scale) if centre_first is None else float(centre_first)
    features = centred(embeds, share * centre)
    logits = scale * features @ text.T
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :CANDIDATES]
    labels = pl.DataFrame(
        {
            "key": live["key"],
            "label": best[:, 0],
            "labels": best.tolist(),
            "probabilities": np.take_along_axis(probabilities, best, axis=1).tolist(),
        },
        schema={"key": pl.String, "label": pl.Int64, "labels": pl.List(pl.Int64), "probabilities": pl.List(pl.Float32)},
    )
    return labels, centre, share
