"""What `describe` and `group` share: texts through the caption store, so that none is written twice."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl

from latteflow.models.digests import digest_of_file
from latteflow.models.errors import ModelError
from latteflow.models.settings import (
    ClipSettings,
    LanguageModelSettings,
    OpenAISettings,
    SidecarSettings,
    TagsSettings,
    VllmSettings,
    WordsSettings,
    kind_of,
)
from latteflow.models.texts.describers import Describer, Engine, EngineStopped, Item, Kind, Text, words
from latteflow.models.texts.describers.registry import WRITERS
from latteflow.models.texts.prompts import fill
from latteflow.models.towers import clip
from latteflow.models.towers.images import in_range, smaller, to_rgb
from latteflow.storage.artifacts import Artifact
from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from latteflow.storage.errors import Damaged, DataError, StorageError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.images import open_image
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import Greys, read_image, read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_features, read_labels
from latteflow.tasks.core.progress import tell
from latteflow.tasks.core.stage import StageResult, anew
from latteflow.tasks.core.tables import digest_of_table, read_by_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from latteflow.models.texts.describers.tags import TagVocabulary

_DECODED = 64
"""Images kept decoded: the groups of a class share members with those next to them."""
_collecting: ContextVar[bool] = ContextVar("collecting", default=False)
_features: WeakKeyDictionary[Artifact, tuple[dict[str, int], np.ndarray]] = WeakKeyDictionary()
"""Of the galleries of one stage, which read them once: key -> row, and unit rows."""
_model = threading.Lock()
"""`describe` and `group` may run side by side. A model serves one of them at a time: vLLM has one reader, and the
`concurrency` of a server is for both."""


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """Inside, no describer is opened: others were asked for all texts, and what they could not answer stays so."""
    token = _collecting.set(True)
    try:
        yield
    finally:
        _collecting.reset(token)


@dataclass(frozen=True)
class Question:
    """What one text is to be about.

    Attributes:
        members: keys of the images; none for a class.
        prompt: in words; empty for a describer that is not asked.
        index: which of several questions about the same images.
        captions: what a text about a pair is written from; the images are not shown. The prompt has them in it.
    """

    members: tuple[str, ...]
    prompt: str = ""
    index: int = 0
    captions: tuple[str, ...] = ()


class Gallery:
    """Images of a split with all that a describer may look at, by key.

    Args:
        index: rows of these images; None: all live ones of the split. Whatever else there is is not in memory.
    """

    def __init__(self, domain: Domain, images: Artifact, embedded: Artifact, index: pl.DataFrame | None = None) -> None:
        self._domain, self._images, self._embedded = domain, images, embedded
        live = read_index(images) if index is None else index
        labels = read_labels(embedded, live["key"])
        self.index = live.join(labels, on="key", how="semi", maintain_order="left")
        self._place = {key: row for row, key in enumerate(self.index["key"])}
        self.labels = dict(labels.select("key", "label").iter_rows())
        self._greys = Greys(images, self.index["key"])
        self._digests, self.paths = self.index["sha256"].to_list(), self.index["path"].to_list()
        self._opened = functools.lru_cache(_DECODED)(self._open)

    @property
    def _features(self) -> tuple[dict[str, int], np.ndarray]:
        # Most describers never look at them, and a worker of many has no room for those of ten million images.
        if self._embedded not in _features:
            found = read_features(self._embedded)
            _features[self._embedded] = {key: row for row, key in enumerate(found.keys)}, found.features
        return _features[self._embedded]

    @functools.cached_property
    def all_paths(self) -> list[str]:
        """Of all live images of the split, below its source."""
        return read_index(self._images)["path"].to_list()

    @functools.cached_property
    def mean_feature(self) -> np.ndarray:
        return np.asarray(self._features[1].mean(axis=0))

    def _features_of(self, keys: Sequence[str]) -> np.ndarray:
        place, features = self._features
        return np.asarray(features[[place[key] for key in keys]])

    def digest(self, key: str) -> str:
        """Content digest of the image as it is seen."""
        return self._greys.content(key, str(self._digests[self._place[key]]))

    def keys_by_shard(self) -> dict[str, list[str]]:
        """Shard name -> keys of its live images."""
        return dict(self.index.group_by("shard", maintain_order=True).agg("key").iter_rows())

    def path(self, key: str) -> str:
        """The image's place below its source."""
        return str(self.paths[self._place[key]])

    def image(self, key: str) -> Image:
        """The image, decoded; the caller's own."""
        return self._opened(self._place[key]).copy()

    def questions(self, kind: Kind, members: Sequence[str]) -> list[Question]:
        """What is asked about one or more images, by the domain's prompt pack."""
        pack = self._domain.prompt_pack
        asked = ("",) if pack is None else pack.image if kind == "image" else pack.group
        name = self._domain.prompt_name(self._domain.classes[self.labels[members[0]]])
        return [Question(tuple(members), fill(one, **{"class": name}), place) for place, one in enumerate(asked)]

    def item(self, question: Question, seed: int) -> Item:
        """What a describer sees."""
        rows = [self._place[key] for key in question.members]
        shown = [] if question.captions else rows
        return Item(
            paths=tuple(self.paths[row] for row in rows),
            features=lambda: self._features_of(question.members),
            images=lambda: [self._opened(row).copy() for row in shown],
            prompt=question.prompt,
            seed=seed,
            captions=question.captions,
        )

    def _open(self, row: int) -> Image:
        at = self.index.row(row, named=True)
        try:
            data = read_image(self._images, at["shard"], at["offset"], at["bytes"], at["sha256"])
        except StorageError as error:  # no fault of the image
            raise EngineStopped(str(error)) from error
        image, describer = in_range(open_image(data), self._greys.range(at["key"])), self._domain.describer
        image = to_rgb(image)
        image.load()  # here, as threads share it
        return smaller(image, describer.longest_px) if isinstance(describer, LanguageModelSettings) else image


class Texts:
    """The texts of one kind, through the caption store: those that were ever written are not written again.

    Args:
        identity: of the describer, see :func:`describer_identity`.
    """

    def __init__(
        self, domain: Domain, objects: ObjectStore, kind: Kind, gallery: Gallery, identity: Mapping[str, Any]
    ) -> None:
        self._domain, self._kind, self._gallery, self._identity = domain, kind, gallery, identity
        self._captions = _captions(objects)
        self._who = describer_id({"kind": kind, **identity})
        self._sampling = canonical_json(identity.get("sampling", {})).decode()
        self._keys: dict[Question, str] = {}
        self.timings: dict[str, float] = {}
        """After :meth:`write`: ``texts_written`` and the ``writing_seconds`` they took, without the start of an engine;
        ``engine_wait``, the share of its time that the engine waited for images."""

    def digest(self, questions: Sequence[Question]) -> str:
        """Digest of everything that shapes the texts of these questions, and of whom they are about."""
        return sha256(canonical_json([[self._key(each), list(each.members)] for each in questions]))

    def write(self, parts: Mapping[str, Sequence[Question]]) -> Iterator[tuple[str, pl.DataFrame]]:
        """Name and table of each part, as soon as all of its texts are there.

        The describer works through all parts without a pause between them. What it wrote is safe in the caption store
        from batch to batch, whatever becomes of the part.

        Yields:
            columns ``member_keys``, ``index`` and those of the caption schema, in the order of the part's questions.

        Raises:
            EngineStopped: the describer cannot go on.
            StorageError: texts cannot be kept, or images not be read.
        """
        for names in self._finished(parts):
            yield from self._tables({name: parts[name] for name in names})

    def have_written(self, questions: Sequence[Question]) -> None:
        """As :meth:`write`, for whoever wants the texts in the caption store and no table."""
        for _ in self._finished({"": questions}):
            pass

    def _finished(self, parts: Mapping[str, Sequence[Question]]) -> Iterator[list[str]]:
        """Names of parts, as soon as all of their texts are there."""
        # The same content may be wanted more than once; it is asked about once.
        wanted = {self._key(each): each for questions in parts.values() for each in questions}
        known = set() if anew() else self._captions.known(self._who, wanted, failed=_collecting.get())
        left = {name: {self._key(each) for each in questions} - known for name, questions in parts.items()}
        owners = defaultdict(list)
        for name, keys in left.items():
            for key in keys:
                owners[key].append(name)
        if done_before := [name for name, keys in left.items() if not keys]:
            yield done_before
        missing = [key for key in wanted if key not in known]
        if missing and _collecting.get():
            raise EngineStopped(f"{len(missing)} texts of kind {self._kind} were not written by the workers; run again")
        if missing:
            there = len(wanted) - len(missing)
            tell(there, len(wanted), "texts")
            for describer, batch in self._written([wanted[key] for key in missing]):
                there += len(batch)
                tell(there, len(wanted), "texts")
                done = {missing[place]: text for place, text in batch.items()}
                rows = [self._row(key, wanted[key], text, describer.engine) for key, text in done.items()]
                self._captions.add(self._who, pl.DataFrame(rows, schema=CAPTION_SCHEMA), anew=anew())
                touched = dict.fromkeys(name for key in done for name in owners[key])
                for name in touched:
                    left[name] -= done.keys()
                for name in touched:
                    if not left[name]:
                        yield [name]
            self._captions.settle(self._who)
        if lost := [name for name, keys in left.items() if keys]:
            raise EngineStopped(f"the describer left out texts of {', '.join(lost[:3])}; run again to ask for them")

    def missing(self, parts: Sequence[Sequence[Question]]) -> list[int]:
        """Of each part, how many texts the describer would be asked for."""
        keys = [{self._key(each) for each in questions} for questions in parts]
        known = self._captions.known(self._who, set().union(*keys))
        return [len(each - known) for each in keys]

    def _written(self, questions: Sequence[Question]) -> Iterator[tuple[Describer, Mapping[int, Text]]]:
        is_model = isinstance(self._domain.describer, LanguageModelSettings)
        with _model if is_model else contextlib.nullcontext():
            proven = is_model and self._captions.has_texts(self._who)
            describer = open_describer(self._domain, self._gallery, proven=proven)
            # 28 bits: some servers have signed seeds of 32.
            items = [self._gallery.item(each, int(self._key(each)[:7], 16)) for each in questions]
            begin = time.perf_counter()
            try:
                yield from ((describer, batch) for batch in describer.describe(self._kind, items))
            except EngineStopped as error:
                if isinstance(error.__cause__, StorageError):
                    raise error.__cause__ from None
                raise
            self.timings |= {"texts_written": len(questions), "writing_seconds": round(time.perf_counter() - begin, 3)}
            if (waited := getattr(describer, "waited", None)) is not None:
                self.timings["engine_wait"] = round(waited, 4)

    def _key(self, question: Question) -> str:
        found = self._keys.get(question)
        if found is None:
            found = self._keys[question] = caption_key(self._who, self._digests(question), question.prompt)
        return found

    def _digests(self, question: Question) -> list[str]:
        return [self._gallery.digest(key) for key in question.members]

    def _row(self, key: str, question: Question, text: Text, engine: str) -> dict[str, Any]:
        pack = self._domain.prompt_pack
        return {
            "caption_key": key,
            "kind": self._kind,
            "members": self._digests(question),
            "text": text.text,
            "flags": list(text.flags),
            "finish_reason": text.finish_reason,
            "prompt_tokens": text.prompt_tokens,
            "output_tokens": text.output_tokens,
            "model": self._identity["model"],
            "revision": self._identity["revision"],
            "prompt_id": f"{self._identity['model']}/1" if pack is None else pack.id,
            "prompt": question.prompt,
            "sampling": self._sampling,
            "engine": engine,
            "detail": text.detail,
        }

    def _tables(self, parts: Mapping[str, Sequence[Question]]) -> Iterator[tuple[str, pl.DataFrame]]:
        """As :meth:`write` gives them, of parts whose texts are all there."""
        keys = {name: [self._key(each) for each in questions] for name, questions in parts.items()}
        found = self._captions.get(self._who, {key for of_part in keys.values() for key in of_part})
        for name, questions in parts.items():
            asked = pl.DataFrame(
                {
                    "member_keys": [list(each.members) for each in questions],
                    "index": [each.index for each in questions],
                    "caption_key": keys[name],
                },
                schema={"member_keys": pl.List(pl.String), "index": pl.Int32, "caption_key": pl.String},
            )
            table = asked.join(found, on="caption_key", how="left", maintain_order="left")
            if gone := table["kind"].null_count():
                raise Damaged(
                    f"{gone} texts of {name} were in the caption store and are gone; they are asked for again"
                )
            yield name, table


def text_counts(texts: pl.DataFrame) -> dict[str, int]:
    """Texts and flagged texts of a caption table."""
    return {"texts": texts.height, "flagged": texts.filter(pl.col("flags").list.len() > 0).height}


@functools.lru_cache(maxsize=2)
def _captions(objects: ObjectStore) -> CaptionStore:
    # One for all parts of a stage, as it remembers which of its files holds what; describe and group run side by side.
    return CaptionStore(objects)


def describer_identity(domain: Domain, embedded: StageResult | None, kind: Kind = "image") -> dict[str, Any]:
    """Who writes: everything but images and prompts that shapes the texts; cheap, a cached run loads no model.

    Texts about groups depend on how a group is shown to a model, those of the other kinds do not.

    Args:
        embedded: tags come from it; no other describer needs it.

    Raises:
        DataError: a folder or file of the describer is not there.
    """
    describer = domain.describer
    if isinstance(describer, WordsSettings):
        return {"model": "words", "revision": words.REVISION}
    if isinstance(describer, SidecarSettings):
        return {"model": "sidecar", "revision": digest_of_table(describer.texts)}
    if isinstance(describer, LanguageModelSettings):
        revision = describer.revision or _revision_of_folder(describer.model)
        return {
            "by": describer.kind,
            "model": describer.model if not Path(describer.model).is_absolute() else Path(describer.model).name,
            "revision": revision,
            "sampling": describer.sampling,
            **({"view": domain.group.view} if kind == "group" else {}),
        }
    if not isinstance(describer, TagsSettings):
        return {"model": describer.kind, "revision": sha256(canonical_json(describer.model_dump(mode="json")))}
    assert embedded is not None
    # Zero-shot tags see features relative to the domain's mean, so they belong to this very set of images.
    found = {"clip": clip.identity(domain.clip), "embed": embedded.ref.digest}
    return {"model": "tags", "revision": sha256(canonical_json(found))}


def questions_identity(domain: Domain, embedded: StageResult, kind: Kind) -> dict[str, Any]:
    """What is asked: the questions of the prompt pack, and the pseudo-labels if they stand in them."""
    pack = domain.prompt_pack
    asked: tuple[str, ...] = ()
    if pack is not None:
        of_pairs = {"pair": pack.pair, "class_pair": pack.class_pair}
        of_kind = {"image": pack.image, "group": pack.group, "class": pack.classes}
        asked = (of_pairs[kind],) if kind in of_pairs else of_kind[kind]
    found: dict[str, Any] = {"prompts": list(asked)} if asked else {}
    if any("{class}" in question for question in asked):
        found["classes"] = domain.classes
        if kind != "class":
            found["embed"] = embedded.ref.digest
    return found


@functools.lru_cache(maxsize=4)
def _revision_of_folder(model: str) -> str:
    folder = Path(model)
    if not folder.is_absolute():
        return "main"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise DataError(f"the describer's model folder {model!r} does not exist or is empty; check `describer.model`")
    return sha256(canonical_json([[path.relative_to(folder).as_posix(), digest_of_file(path)] for path in files]))


def open_describer(domain: Domain, gallery: Gallery, *, proven: bool = False) -> Describer:
    """The describer that the domain names, for the images of the gallery.

    Args:
        proven: it gave texts before.

    Raises:
        ModelError: it cannot be opened.
    """
    describer = domain.describer
    if isinstance(describer, WordsSettings):
        return words.Words()
    if isinstance(describer, SidecarSettings):
        from latteflow.models.texts.describers.sidecar import Sidecar

        return Sidecar(read_by_path(describer.texts, "text", domain.source, gallery.all_paths))
    if isinstance(describer, LanguageModelSettings):
        from latteflow.models.texts.describers.prompted import Prompted

        return Prompted(
            _open_engine(describer),
            longest_px=describer.longest_px,
            collage=domain.group.view == "collage",
            structured=describer.structured,
            proven=proven,
        )
    if not isinstance(describer, TagsSettings):
        return WRITERS[describer.kind].open(describer)
    from latteflow.models.texts.describers.tags import Tags

    return Tags(*_vocabulary(domain.clip), clip.load(domain.clip).scale, gallery.mean_feature)


def _open_engine(settings: LanguageModelSettings) -> Engine:
    if isinstance(settings, VllmSettings):
        from latteflow.models.texts.describers.vllm import open_vllm

        return open_vllm(settings)
    if isinstance(settings, OpenAISettings):
        from latteflow.models.texts.describers.openai import OpenAIEngine

        return OpenAIEngine(settings, _key(settings))
    engine: Any = WRITERS[kind_of(settings)].open(settings)
    return engine


def models_of(settings: OpenAISettings) -> list[str]:
    """The models of a server, by its own names.

    Raises:
        ModelError: it cannot be reached or refuses, the package openai is missing, or the key cannot be had.
    """
    from latteflow.models.texts.describers.openai import OpenAIEngine

    return OpenAIEngine(settings, _key(settings)).models()


def _key(settings: OpenAISettings) -> str | None:
    if settings.key_block is None:
        return os.environ.get(settings.key_env)
    try:
        from prefect.blocks.system import Secret

        return str(Secret.load(settings.key_block, _sync=True).get())  # type: ignore[call-arg, union-attr]
    except Exception as error:  # Prefect's, its database's, its client's
        raise ModelError(
            f"`key_block: {settings.key_block}`: this Prefect Secret block gives no key ({error}); "
            "create it, or use `key_env`"
        ) from error


@functools.lru_cache(maxsize=1)
def _vocabulary(settings: ClipSettings) -> tuple[TagVocabulary, np.ndarray]:
    """The tags' words and their text features, read once for all stages of a process."""
    from latteflow.models.texts.describers.tags import TagVocabulary

    vocabulary = TagVocabulary.imagenet()
    return vocabulary, clip.load(settings).text_features(vocabulary.prompts)
