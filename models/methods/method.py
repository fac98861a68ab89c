"""What a method is to the rest of the product: one record. No torch here, so that reading a domain file loads none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from latteflow.models.settings import Settings, TrainingSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from latteflow.models.methods.adaptation import Adapted, TuneData

S = TypeVar("S", bound=Settings)
LAST_BLOCKS = {"last_blocks": 2}
"""What shapes a model that trains the last blocks of a tower: which tensors these are. Raised when that changes."""

Reads = Literal["features", "sentences", "texts", "captions", "pairs", "class_texts"]
"""What fills a method's :class:`~models.methods.adaptation.TuneData`.

features: the images' embeds and one feature for each class. sentences: each sentence of a class by itself, and pixels
where towers are trained. texts: these, and features of the screened texts of images and groups. captions: the texts
themselves. pairs: texts about pairs of images. class_texts: what a describer said of each class behind its sentence.
"""


class Sections:
    """Sections of a domain file, each by the type of its settings; those that are not given have their defaults."""

    def __init__(self, *given: Settings) -> None:
        self._given = {type(each): each for each in given}

    def of(self, kind: type[S]) -> S:
        """The section of this type."""
        found = self._given.get(kind)
        return found if isinstance(found, kind) else kind()


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a method has to work with.

    Attributes:
        data: of the domain, on the device to work on; what is in it says :attr:`Method.reads`.
        sections: of the domain file.
        training: how models are trained, whatever the method.
        clip: the CLIP, to be copied where its towers are trained (:attr:`Method.trains_towers`), else None.
        scale: ``exp(logit_scale)`` of the CLIP.
        seed: of all that is drawn.
        engine: further arguments for :func:`models.methods.training.train`: where checkpoints go, who hears of steps.
    """

    data: TuneData
    sections: Sections = field(default_factory=Sections)
    training: TrainingSettings | None = None
    clip: nn.Module | None = None
    scale: float = 100.0
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)

    def of(self, kind: type[S]) -> S:
        """The section of this type."""
        return self.sections.of(kind)

    @property
    def options(self) -> dict[str, Any]:
        """Seed, scale and the engine's arguments, as the methods take them."""
        return {"seed": self.seed, "scale": self.scale, **self.engine}


@dataclass(frozen=True)
class Section:
    """A section of the domain file that shapes a method's models, as far as the method reads it."""

    settings: type[Settings]
    unread: Collection[str] = ()

    def read(self, sections: Sections) -> dict[str, Any]:
        """What of it shapes a model, as JSON values."""
        return sections.of(self.settings).model_dump(mode="json", exclude=set(self.unread) or None)


@dataclass(frozen=True)
class Adapter:
    """A text tower that is a file of its own, beside the model's.

    Attributes:
        read: bytes of the file and the sections to a function from texts to unit features ``(n, dim)``.
        note: a line of the exported model's card; the file lies there as ``<method>.safetensors``.
    """

    read: Callable[[bytes, Sections], Callable[[Sequence[str]], np.ndarray]]
    note: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a CLIP to a domain without labels.

    Attributes:
        name: in domain files.
        label: for people.
        how: what the card of an exported model says it was adapted by, with the source.
        adapt: the method itself.
        reads: what it is given.
        sections: of the domain file, by name; methods may share them.
        is_seeded: whether anything is drawn or trained. If so, there is a model for each of the domain's seeds.
        learns_from_images: False where the classifier is made of texts alone, so that all images are new to it.
        weighs_texts: whether it matters who wrote the texts (`TuneData.independent_texts`).
        made_from: what shapes a model besides its data, sections, training and seed, as JSON values.
        trains_towers: whether the sections ask to train the CLIP's own towers; the second argument says whether the
            CLIP is the embedded model.
        works_on_features: True where towers cannot be trained, so that a domain file which asks for it is refused.
        reads_for_others: whether other methods can have their texts read by its text tower (`texts_from`).
        adapter: of a method whose text tower is no CLIP's.
        streams: whether it takes embeds of images and texts as :class:`models.rows.Rows`, which may be on disk; if not,
            they are tensors, however many there are.
        mistake: what is wrong with the sections, as the domain file's reader is to be told; empty if nothing is.
    """

    name: str
    label: str
    how: str
    adapt: Callable[[Given], Adapted]
    reads: Reads = "features"
    sections: Mapping[str, Section] = field(default_factory=dict)
    is_seeded: bool = True
    learns_from_images: bool = True
    weighs_texts: bool = False
    made_from: Callable[[Sections], Mapping[str, Any]] = lambda sections: {}
    trains_towers: Callable[[Sections, bool], bool] = lambda sections, embedded: False
    works_on_features: bool = False
    reads_for_others: bool = False
    adapter: Adapter | None = None
    streams: bool = False
    mistake: Callable[[Sections], str] = lambda sections: ""

    @property
    def reads_image_texts(self) -> bool:
        """Whether texts about images shape its models, be it one or two at a time."""
        return self.reads in ("texts", "captions", "pairs")

    @property
    def reads_texts(self) -> bool:
        """Whether screened texts of images, groups or classes shape its models."""
        return self.reads in ("texts", "captions", "class_texts")
