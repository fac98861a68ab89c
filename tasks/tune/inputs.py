"""What methods are given: a domain's features, sentences and texts, out of the artifacts of earlier stages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Method
from latteflow.models.methods.registry import METHODS
from latteflow.models.settings import TagsSettings
from latteflow.models.towers import clip
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_embeds
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe.pair import read_class_pairs, read_pairs
from latteflow.tasks.describe.screen import read_screened, read_text_features, usable
from latteflow.tasks.tune.models import text_reader, tuned_from
from latteflow.tasks.tune.pixels import PixelReader

if TYPE_CHECKING:
    from torch import Tensor

    from latteflow.models.methods.adaptation import TuneData
    from latteflow.models.rows import Matrix

log = logging.getLogger("latteflow.tasks")
TextFeatures = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Stages:
    """What models are made of: training images, their features, screened texts and, where a method compares, texts
    about pairs."""

    shards: StageResult
    embedded: StageResult
    screened: StageResult
    paired: StageResult | None = None


def independent_texts(domain: Domain) -> bool:
    """Whether the describer sees more of an image than its features."""
    return not isinstance(domain.describer, TagsSettings)


class Inputs:
    """What is known of a domain, read when the first method asks for it.

    Args:
        tower: file of the text tower that reads the texts (`latteclip.texts_from`); by default the untouched CLIP.
    """

    def __init__(self, domain: Domain, stages: Stages, tower: bytes | None = None) -> None:
        store = open_store(domain)
        self.domain, self.settings = domain, domain.of(LatteClipSettings)
        self._images, self._screened = store.open(stages.shards.ref), store.open(stages.screened.ref)
        self._paired = store.open(stages.paired.ref) if stages.paired else None
        self.clip, self.has_own_tower = clip.load(domain.clip), tower is not None
        self._text_features: TextFeatures = self.clip.text_features
        if tower is not None and (adapter := METHODS[self.settings.texts_from].adapter):
            self._text_features = adapter.read(tower, domain.sections)
        elif tower is not None:
            self.clip = text_reader(domain, tuned_from(tower))
            self._text_features = self.clip.text_features
        self._found = read_embeds(store.open(stages.embedded.ref))
        self.centre = self._found.shift

    def of(self, method: Method) -> TuneData:
        """What a method is given, by what it reads."""
        found: TuneData
        if method.reads == "pairs":
            found = self._pairs(as_features=not self.trains_towers(method))
        else:
            found = getattr(self, f"_{method.reads}")
        if not method.streams:
            found = found.in_memory()
        if method.reads in ("sentences", "texts") and self.trains_towers(method):
            return replace(found, pixels=PixelReader(self._images, self._found.keys.to_list(), self.clip.preprocess))
        return found

    def trains_towers(self, method: Method) -> bool:
        """Whether the method is to train the CLIP's own towers."""
        from latteflow.models.towers.embedded import EmbeddedClip

        return method.trains_towers(self.domain.sections, isinstance(self.clip.model, EmbeddedClip))

    @functools.cached_property
    def _features(self) -> TuneData:
        """The images, and features of the classes' sentences."""
        import torch

        from latteflow.models.methods.adaptation import TuneData

        return TuneData(
            pseudo_labels=torch.from_numpy(self._found.zero_shot.copy()),
            class_texts=torch.from_numpy(self._found.class_features),
            image_embeds=self._found.embeds,
            centre=torch.from_numpy(self.centre),
            near_features=self._found.near_features,
        )

    @functools.cached_property
    def _sentences(self) -> TuneData:
        """The same with every sentence by itself."""
        sentences = self._read(self._class_sentences(), self._text_features)
        return replace(self._features, class_texts=self._by_class(sentences))

    @functools.cached_property
    def _texts(self) -> TuneData:
        """The same with the texts of images and groups."""
        captions, groups = self._usable()
        own = captions.select("text", key=pl.col("member_keys").list.first())
        ordered = self._found.keys.to_frame("key").join(own, on="key", how="left", maintain_order="left")["text"]
        ordered = ordered.fill_null("")

        def read(kind: str, texts: pl.Series) -> Matrix:
            # Of texts that another tower reads, or that are to be tokens, there are as many as there is memory.
            if self.has_own_tower or (self.settings.trains_towers and self.settings.trains_texts):
                return self._read(texts.to_list(), self._text_features)
            return self._screened_features(kind, texts)

        return replace(
            self._sentences,
            image_texts=read("images", ordered),
            has_image_text=(ordered != "").to_torch(),
            group_texts=read("groups", groups["text"]) if groups.height else None,
            group_classes=groups["label"].to_torch() if groups.height else None,
            independent_texts=independent_texts(self.domain),
        )

    @functools.cached_property
    def _captions(self) -> TuneData:
        """The images with the texts that passed the screen, and the CLIP's own reading of them and of class names."""
        import torch

        from latteflow.models.methods.adaptation import CaptionData
        from latteflow.models.rows import together

        captions, groups = self._usable()
        names = self.domain.prompt_names
        row = {name: number for number, name in enumerate(names)}
        number: dict[str, int] = {}
        teacher: list[Matrix] = []
        class_features = torch.from_numpy(self._found.class_features)
        kinds: list[tuple[Sequence[str], Callable[[pl.Series], Matrix]]] = [
            (captions["text"].to_list(), functools.partial(self._screened_features, "images")),
            (groups["text"].to_list(), functools.partial(self._screened_features, "groups")),
            (names, lambda new: class_features[[row[name] for name in new]]),
        ]
        for texts, features in kinds:
            new = [text for text in dict.fromkeys(texts) if text not in number]
            number |= {text: len(number) + place for place, text in enumerate(new)}
            teacher.append(features(pl.Series(new, dtype=pl.String)))
        of_image: dict[str, list[int]] = {}
        for keys, text in zip(groups["member_keys"].to_list(), groups["text"], strict=True):
            for key in keys:
                of_image.setdefault(key, []).append(number[text])
        own = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
        found = CaptionData(
            texts=list(number),
            teacher=together(teacher),
            image_texts=torch.tensor([number[own[key]] if key in own else -1 for key in self._found.keys]),
            group_texts=[of_image.get(key, []) for key in self._found.keys],
            class_names=[number[name] for name in names],
        )
        return replace(self._features, captions=found)

    def _pairs(self, *, as_features: bool) -> TuneData:
        """The images with texts about pairs of them, as features or as tokens."""
        import torch

        from latteflow.models.methods.adaptation import PairData

        assert self._paired is not None

        def read(texts: Sequence[str]) -> Tensor:
            if as_features:
                return torch.from_numpy(self.clip.text_features(texts))
            return self.clip.tokenizer(list(texts))

        place = {key: row for row, key in enumerate(self._found.keys)}
        table = read_pairs(self._paired).filter(
            pl.col("status") == "kept", pl.col("first").is_in(list(place)), pl.col("second").is_in(list(place))
        )
        cut = self.clip.too_long(table["text"].to_list())
        table = table.filter(~cut)
        log.info("tune pc_clip pairs=%d left_out_as_too_long=%d", table.height, cut.sum())
        if table.height < 2:
            raise DataError(
                f"{table.height} texts about pairs are left, {cut.sum()} are longer than the CLIP reads; pc_clip needs "
                "2 at least: ask for shorter texts (`pair` of the prompt pack)"
            )
        first, second = (torch.tensor([place[key] for key in table[name]]) for name in ("first", "second"))
        about = read_class_pairs(self._paired) if "classes.parquet" in self._paired.files else None
        return replace(
            self._features,
            class_texts=self._by_class(read(self._class_sentences())),
            pairs=PairData(
                first=first,
                second=second,
                texts=read(table["text"].to_list()),
                class_pairs=None if about is None else about.select("label_a", "label_b").to_torch(),
                class_texts=None if about is None else read(about["text"].to_list()),
            ),
        )

    @functools.cached_property
    def _class_texts(self) -> TuneData:
        """The images, and class sentences with a description behind each; one that is none is left out."""
        import torch

        about = read_screened(self._screened, "classes").select("label", "text", "weight")
        texts = [
            f"{sentence.rstrip(' .')}. {text}" if weight else sentence
            for label, text, weight in about.iter_rows()
            for sentence in self.domain.prompts()[label]
        ]
        return replace(self._features, class_texts=self._by_class(torch.from_numpy(self.clip.text_features(texts))))

    def _read(self, texts: Sequence[str], features: TextFeatures) -> Tensor:
        """Tokens where the text tower trains, else features."""
        import torch

        if self.settings.trains_towers and self.settings.trains_texts:
            return self.clip.tokenizer(list(texts))
        return torch.from_numpy(features(texts))

    def _usable(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The texts about images and about groups that passed the screen."""
        columns = ["member_keys", "index", "label", "text", "weight"]
        captions, groups = (usable(read_screened(self._screened, kind, columns)) for kind in ("images", "groups"))
        return captions, groups

    def _screened_features(self, kind: str, texts: pl.Series) -> Matrix:
        return read_text_features(self._screened, kind, texts)

    def _class_sentences(self) -> list[str]:
        return [text for prompts in self.domain.prompts() for text in prompts]

    def _by_class(self, read: Tensor) -> Tensor:
        return read.unflatten(0, (len(self.domain.classes), -1))
