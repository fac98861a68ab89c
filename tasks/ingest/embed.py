"""embed: shards -> frozen CLIP features and zero-shot pseudo-labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from latteflow.models.towers import clip, neighbours
from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter, Part
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.shards import Greys, packed_images, read_index, read_records
from latteflow.storage.tables import parquet, read_parquet, safetensors
from latteflow.tasks.core.decode import pixel_batches
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import array, centred
from latteflow.tasks.core.progress import tell
from latteflow.tasks.core.stage import StageResult, open_store, run_stage

VERSION = 3
ESTIMATE = 1
"""Version of :mod:`models.judge.shift`; the features do not depend on it."""
CANDIDATES = 5
"""Pseudo-label candidates kept for each image."""
_ROWS = 1 << 14
"""Images whose probabilities are reckoned at once."""


def embed(domain: Domain, shards: StageResult) -> StageResult:
    """Features of every image, shard by shard, and the classes the untouched model sees in them.

    Files: ``<shard>.features.parquet`` (key, norm, feature: unit rows), ``zero_shot.parquet`` (key, label, labels and
    probabilities of the best candidates; one row for each live image), ``classes.safetensors`` (text_features, centre,
    share: how much of the centre is to be subtracted). Of training images, where the domain names `neighbours`,
    ``<shard>.near.parquet`` (the same by that tower).
    """
    store = open_store(domain)
    images = store.open(shards.ref)
    each = _Shards(domain, images)
    domain, inputs = each.domain, each.inputs

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        parts = [each.parts(writer, shard)[0] for shard in each.names]
        index = read_index(images).select("key", "shard")
        text = class_text_features(domain, each.model.text_features)
        shards = ((part.name, read_parquet(writer.read(part, part.files[0].name))) for part in parts)
        keys, embeds = _embeds(index, text.shape[1], shards)
        labels, centre, share = _zero_shot(keys, embeds, text, each.model.scale, domain.clip.centre)
        writer.put(
            "zero_shot",
            {"features": sha256(canonical_json(keys.to_list())), **inputs},
            {
                "zero_shot.parquet": parquet(labels),
                "classes.safetensors": safetensors(
                    text_features=text, centre=centre, share=np.array([share], np.float32)
                ),
            },
            rows=labels.height,
        )
        return {"images": len(keys), "left_out": index.height - len(keys)}

    return run_stage(store, domain, "embed", VERSION, inputs, body, split=each.split)


def embed_range(domain: Domain, shards: StageResult, first: int = 0, last: int | None = None) -> dict[str, int]:
    """Make the features of some shards, which `embed`, wherever it runs then, finds in the store.

    Args:
        first, last: numbers of shards, as of a slice.

    Returns:
        How many images the range has.
    """
    store = open_store(domain)
    each = _Shards(domain, store.open(shards.ref, listed=False))
    writer, names = each.writer(store), list(each.names)[first:last]
    for shard in names:
        each.parts(writer, shard)
    return {"images": sum(each.names[shard] for shard in names)}


def missing_features(domain: Domain, shards: StageResult) -> list[int]:
    """Of each shard, how many images it has if their features are not there yet, else 0."""
    store = open_store(domain)
    each = _Shards(domain, store.open(shards.ref, listed=False))
    writer = each.writer(store)
    return [0 if each.are_there(writer, shard) else images for shard, images in each.names.items()]


class _Shards:
    """What is made of each shard by itself: its features by each tower, parts of the artifact.

    Attributes:
        domain: as it is for the images' split.
        inputs: of the whole artifact.
    """

    def __init__(self, domain: Domain, images: Artifact) -> None:
        self.split = str(images.inputs["split"])
        self.domain = domain.of_split(self.split)
        self._images, self._greys, self._who = images, Greys(images), clip.identity(self.domain.clip)
        self.names = packed_images(images)
        """And the images of each, with those that are gone by now: a shard's part never changes."""
        self.inputs = {
            "shards": images.ref.digest,
            "clip": self._who,
            "prompts": self.domain.prompts(),
            "centre": f"estimated, {ESTIMATE}" if self.domain.clip.centre is None else self.domain.clip.centre,
        }
        self._seen = 0
        self._near = self.domain.neighbours if self.split == "train" else None
        if self._near is not None:
            self.inputs["neighbours"] = neighbours.identity(self._near)

    @functools.cached_property
    def model(self) -> clip.Clip:
        """Loaded when the first part needs it."""
        return clip.load(self.domain.clip)

    @functools.cached_property
    def _near_tower(self) -> neighbours.Tower:
        assert self._near is not None
        return neighbours.read(self._near)

    def writer(self, store: ArtifactStore) -> ArtifactWriter:
        """For parts alone; the artifact is made by `embed`."""
        return store.writer(self.domain.name, "embed", VERSION, self.inputs)

    def are_there(self, writer: ArtifactWriter, shard: str) -> bool:
        """Whether the parts of a shard need not be made."""
        return all(writer.find(name, own) for name, own, *_ in self._wanted(shard))

    def parts(self, writer: ArtifactWriter, shard: str) -> list[Part]:
        """Found or made; that of the CLIP comes first."""
        found = []
        for name, own, file, tower in self._wanted(shard):
            part = writer.find(name, own)
            if part is None:
                table = self._embedded(shard, tower())
                part = writer.put(name, own, {file: parquet(table)}, rows=table.height)
            else:
                self._seen += self.names[shard]
            found.append(part)
        return found

    def _wanted(self, shard: str) -> Iterator[tuple[str, dict[str, Any], str, Callable[[], neighbours.Tower]]]:
        """Name of a part, what it is made from, its file and its tower."""
        own: dict[str, Any] = {"shard": self._images.files[f"{shard}.tar"][1].sha256}
        if ranges := self._greys.digest(shard):
            own["greys"] = ranges
        yield shard, {**own, "clip": self._who}, f"{shard}.features.parquet", lambda: self.model
        if self._near is not None:
            own["neighbours"] = self.inputs["neighbours"]
            yield f"{shard}.near", own, f"{shard}.near.parquet", lambda: self._near_tower

    def _embedded(self, shard: str, tower: neighbours.Tower) -> pl.DataFrame:
        # Removed images stay in their shard's features, so that a shard's part never changes.
        rows = read_parquet(self._images.read(f"{shard}.index.parquet"))
        total, unit = sum(self.names.values()), "images"
        if self._near is not None:
            total, unit = 2 * total, "features"
        keys: list[str] = []
        embeds: list[np.ndarray] = []
        found, batch = read_records(self._images, rows), self.domain.embed.batch
        tell(self._seen, total, unit)
        for records, pixels in pixel_batches(found, tower.preprocess, batch=batch):
            keys += [record.key for record in records]
            embeds.append(tower.image_embeds(pixels).numpy())
            self._seen += len(records)
            tell(self._seen, total, unit)
        table = np.concatenate(embeds) if embeds else np.zeros((0, tower.dim), np.float32)
        norms = np.linalg.norm(table, axis=1)
        return pl.DataFrame(
            {"key": keys, "norm": norms, "feature": table / np.maximum(norms, 1e-12)[:, None]},
            schema={"key": pl.String, "norm": pl.Float32, "feature": pl.Array(pl.Float32, tower.dim)},
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


def _embeds(index: pl.DataFrame, dim: int, shards: Iterable[tuple[str, pl.DataFrame]]) -> tuple[pl.Series, np.ndarray]:
    """Keys of the live images that have features, in their order, and their embeddings, ``(n, dim)``.

    Args:
        index: key and shard of the live images, in the order of shards.
        shards: name and features of each shard, with those of images that are gone.
    """
    live = dict(index.group_by("shard").len().iter_rows())
    embeds, keys, first, n = array((index.height, dim)), [index["key"].clear()], 0, 0
    for name, features in shards:
        asked = index[first : first + live.get(name, 0)].select("key")
        rows = asked.join(features, on="key", how="inner", maintain_order="left")
        embeds[n : n + rows.height] = rows["feature"].to_numpy() * rows["norm"].to_numpy()[:, None]
        keys.append(rows["key"])
        first, n = first + asked.height, n + rows.height
    return pl.concat(keys), embeds[:n]


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, n, _ROWS))


def _zero_shot(
    keys: pl.Series, embeds: np.ndarray, text: np.ndarray, scale: float, centre_first: bool | None
) -> tuple[pl.DataFrame, np.ndarray, float]:
    """Pseudo-labels; the centre of the images, and how much of it was subtracted first."""
    centre = embeds.mean(axis=0, dtype=np.float64).astype(np.float32)
    share = _estimated(embeds, text, scale) if centre_first is None else float(centre_first)
    features, logits = array(embeds.shape), array((len(embeds), len(text)))
    for at in _blocks(len(embeds)):
        features[at] = scale * centred(embeds[at], share * centre)
    np.matmul(features, text.T, out=logits)  # all at once: of blocks, the last bits are others
    labels = [_best(keys[at], logits[at]) for at in _blocks(len(embeds))]
    return pl.concat(labels, rechunk=True), centre, share


def _best(keys: pl.Series, logits: np.ndarray) -> pl.DataFrame:
    """The best candidates of each image."""
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :CANDIDATES]
    return pl.DataFrame(
        {
            "key": keys,
            "label": best[:, 0],
            "labels": best.tolist(),
            "probabilities": np.take_along_axis(probabilities, best, axis=1).tolist(),
        },
        schema={"key": pl.String, "label": pl.Int64, "labels": pl.List(pl.Int64), "probabilities": pl.List(pl.Float32)},
    )
