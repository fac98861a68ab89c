"""preview: a few images with the questions about them and the model's answers, before a run asks about all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latteflow.models.texts.describers import Kind
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe.describe import class_questions
from latteflow.tasks.describe.group import look_alikes
from latteflow.tasks.describe.texts import Gallery, Question, Texts, describer_identity
from latteflow.tasks.report.html import html, picture_url, thumbnail

SIDE_PX, MEMBER_PX = 224, 80


@dataclass(frozen=True)
class Answered:
    """One question, and what came back."""

    kind: Kind
    prompt: str
    text: str
    flags: tuple[str, ...]
    detail: str
    """Why there is no text."""
    tokens: tuple[int, int]
    """Of the prompt and of the answer."""


@dataclass(frozen=True)
class Row:
    """One image; pictures are data URLs."""

    path: str
    label: str
    """The class that the untouched CLIP sees in it."""
    picture: str
    members: tuple[str, ...]
    """Pictures of its group."""
    answers: tuple[Answered, ...]


def preview(domain: Domain, shards: StageResult, embedded: StageResult, count: int = 5) -> Path:
    """Describe a few images, of as many pseudo-classes as there are, and write ``OUTPUT/<name>/preview.html``.

    The texts are kept in the caption store: a run does not ask for them again, and `plan` knows from them how many
    tokens a text has.

    Raises:
        ModelError: the describer cannot be used.
    """
    store = open_store(domain)
    gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
    chosen = _spread(gallery.labels, count)
    members = {group.anchor: group.members for group in look_alikes(gallery.labels, domain.group.size)}
    label = {key: domain.classes[gallery.labels[key]] for key in chosen}
    asked: dict[Kind, dict[str, list[Question]]] = {
        "image": {key: gallery.questions("image", [key]) for key in chosen},
        "group": {key: gallery.questions("group", members[key]) for key in chosen},
        "class": {key: class_questions(domain, [label[key]]) for key in chosen},
    }
    answers: dict[str, list[Answered]] = defaultdict(list)
    engines: Counter[str] = Counter()
    for kind, questions in asked.items():
        identity = describer_identity(domain, embedded, kind)
        for key, table in Texts(domain, store.objects, kind, gallery, identity).write(questions):
            for row in table.iter_rows(named=True):
                tokens = (row["prompt_tokens"] or 0, row["output_tokens"] or 0)
                detail, flags = row["detail"] or "", tuple(row["flags"])
                answers[key].append(Answered(kind, row["prompt"] or "", row["text"], flags, detail, tokens))
                engines[" by ".join(dict.fromkeys((row["model"], row["engine"])))] += 1
    rows = [
        Row(
            path=gallery.path(key),
            label=label[key],
            picture=_picture(gallery, key, SIDE_PX),
            members=tuple(_picture(gallery, member, MEMBER_PX) for member in members[key]),
            answers=tuple(answers[key]),
        )
        for key in chosen
    ]
    path = Path(domain.output) / domain.name / "preview.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = domain.prompt_pack.id if domain.prompt_pack else None
    path.write_text(
        html("preview.html.j2", domain=domain.name, rows=rows, describer=", ".join(engines), pack=pack),
        encoding="utf-8",
    )
    return path


def _spread(labels: Mapping[str, int], count: int) -> list[str]:
    """Keys of different pseudo-classes, the same ones every time."""
    rank: Counter[int] = Counter()
    ranked = []
    for key in sorted(labels):
        ranked.append((rank[labels[key]], labels[key], key))
        rank[labels[key]] += 1
    return [key for _, _, key in sorted(ranked)[:count]]


def _picture(gallery: Gallery, key: str, side_px: int) -> str:
    return picture_url(thumbnail(gallery.image(key), side_px))
