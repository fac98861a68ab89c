"""What `describe` and `group` share: texts through the caption store, so that none is written twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from models import clip
from models.describers import Describer, Item, Kind
from models.settings import ClipSettings
from storage.artifacts import Artifact, ArtifactStore
from storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from storage.fingerprint import canonical_json, sha256
from storage.images import open_image
from storage.objects import ObjectStore
from storage.shards import read_image, read_index
from tasks.domain import Domain
from tasks.features import read_features
from tasks.stage import StageResult, anew
from tasks.tables import digest_of_table, read_by_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from models.describers.tags import TagVocabulary


class Gallery:
    """The live images of a split with all that a describer may look at, by key."""

    def __init__(self, domain: Domain, images: Artifact, embedded: Artifact) -> None:
        found = read_features(embedded)
        self._images, self._classes = images, domain.classes
        self.index = read_index(images).filter(pl.col("key").is_in(found.keys))
        self._place = {key: row for row, key in enumerate(self.index["key"])}
        self._features = dict(zip(found.keys, found.features, strict=True))
        self.mean_feature = found.features.mean(axis=0)
        self.labels = dict(zip(found.keys, found.zero_shot.tolist(), strict=True))
        self._digests, self.paths = self.index["sha256"].to_list(), self.index["path"].to_list()

    def digest(self, key: str) -> str:
        """Content digest of the image."""
        return str(self._digests[self._place[key]])

    def keys_by_shard(self) -> dict[str, list[str]]:
        """Shard name -> keys of its live images."""
        return {
            str(shard): rows["key"].to_list() for (shard,), rows in self.index.group_by("shard", maintain_order=True)
        }

    def item(self, keys: Sequence[str], seed: int) -> Item:
        """What a describer sees of one or more images."""
        rows = [self._place[key] for key in keys]
        return Item(
            paths=tuple(self.paths[row] for row in rows),
            features=np.stack([self._features[key] for key in keys]),
            label=self._classes[self.labels[keys[0]]],
            images=lambda: [self._open(row) for row in rows],
            seed=seed,
        )

    def _open(self, row: int) -> Image:
        at = self.index.row(row, named=True)
        return open_image(read_image(self._images, at["shard"], at["offset"], at["bytes"], at["sha256"]))


def write_texts(
    store: ArtifactStore,
    describer: Callable[[], Describer],
    kind: Kind,
    gallery: Gallery,
    members: Sequence[Sequence[str]],
    identity: Mapping[str, Any],
) -> pl.DataFrame:
    """A text for each tuple of image keys; those that were ever written come from the caption store.

    Args:
        describer: opened only if a text is missing.
        members: keys of the images of each text.
        identity: of the describer.

    Returns:
        Columns ``member_keys`` and those of the caption schema, in the order of ``members``.
    """
    captions = _captions(store.objects)
    who = describer_id({"kind": kind, **identity})
    digests = [[gallery.digest(key) for key in keys] for keys in members]
    wanted = [caption_key(who, each) for each in digests]
    known = set() if anew() else captions.known(who, wanted)
    # The same content may be wanted more than once; it is asked about once.
    missing = list({key: place for place, key in enumerate(wanted) if key not in known}.values())
    if missing:
        texts = describer().describe(
            kind, [gallery.item(members[place], seed=int(wanted[place][:8], 16)) for place in missing]
        )
        rows = [
            {
                "caption_key": wanted[place],
                "kind": kind,
                "members": digests[place],
                "text": text.text,
                "flags": list(text.flags),
                "finish_reason": text.finish_reason,
                "prompt_tokens": text.prompt_tokens,
                "output_tokens": text.output_tokens,
                "model": str(identity["model"]),
                "revision": str(identity["revision"]),
                "prompt_id": str(identity["prompt_id"]),
            }
            for place, text in zip(missing, texts, strict=True)
        ]
        captions.add(who, pl.DataFrame(rows, schema=CAPTION_SCHEMA), anew=anew())
    asked = pl.DataFrame(
        {"member_keys": [list(keys) for keys in members], "caption_key": wanted},
        schema={"member_keys": pl.List(pl.String), "caption_key": pl.String},
    )
    return asked.join(captions.get(who, wanted), on="caption_key", how="left", maintain_order="left")


@functools.lru_cache(maxsize=2)
def _captions(objects: ObjectStore) -> CaptionStore:
    # One for all parts of a stage, as it remembers which of its files holds what; describe and group run side by side.
    return CaptionStore(objects)


def describer_identity(domain: Domain, embedded: StageResult) -> dict[str, Any]:
    """Everything but the images that shapes the texts; cheap, so that a cached run loads no model."""
    if domain.describer.kind == "sidecar":
        return {"model": "sidecar", "revision": digest_of_table(str(domain.describer.texts)), "prompt_id": "sidecar/1"}
    # Zero-shot tags see features relative to the domain's mean, so they belong to this very set of images.
    revision = {"clip": clip.identity(domain.clip), "embed": embedded.ref.digest}
    return {"model": "tags", "revision": sha256(canonical_json(revision)), "prompt_id": "tags/1"}


def open_describer(domain: Domain, gallery: Gallery) -> Describer:
    """The describer that the domain names, for the images of the gallery."""
    if domain.describer.kind == "sidecar":
        from models.describers.sidecar import Sidecar

        return Sidecar(read_by_path(str(domain.describer.texts), "text", domain.source, gallery.paths))
    from models.describers.tags import Tags

    return Tags(*_vocabulary(domain.clip), clip.load(domain.clip).scale, gallery.mean_feature)


@functools.lru_cache(maxsize=1)
def _vocabulary(settings: ClipSettings) -> tuple[TagVocabulary, np.ndarray]:
    """The tags' words and their text features, read once for all stages of a process."""
    from models.describers.tags import TagVocabulary

    vocabulary = TagVocabulary.imagenet()
    return vocabulary, clip.load(settings).text_features(vocabulary.prompts)
