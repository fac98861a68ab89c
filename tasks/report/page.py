"""The report page: plain data in, one self-contained HTML file out.

``render`` is a pure function: same report, same bytes; no clock, no network, no files but the templates beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

from markupsafe import Markup
from PIL import Image

from latteflow.models.judge import metrics
from latteflow.models.methods.registry import METHODS, label
from latteflow.models.settings import ZERO_SHOTS
from latteflow.tasks.report import charts
from latteflow.tasks.report.charts import Axis, Placed, make_axis
from latteflow.tasks.report.html import OPEN_TEXT_LIMIT, TEXT_LIMIT, data_url, html, percent, plain, points
from latteflow.tasks.report.scores import Mistake, Score, Scores, verdict
from latteflow.tasks.tune.select import Judged

ROWS_IN_FULL = 24
"""Up to this many classes every list is whole; above, the ends are shown and the whole list can be opened."""
ROWS_AT_EACH_END = 10
MATRIX_CELLS_WITH_NUMBERS = 30
"""Up to this many classes the confusion matrix is a table of numbers; above, it is a picture."""
MATRIX_CELLS_ON_A_PHONE = 12
"""The same where the page is narrow."""
TOP_CONFUSIONS = 15
QUARANTINE_ROWS = 40
WEAKEST = 3
CONFUSED, MISTAKEN = 8, 3
"""Pairs of classes that are mistaken, of each method, and images of each, with pictures."""

OF_A_CLASS = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1])
"""Accuracies of classes are shown on one axis, whatever they are."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model that took part: the classifier's backbone or the describer. ``note`` is what a reader must know of it."""

    name: str
    revision: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Mistaken:
    """One image of a confused pair; ``text`` is about it or about the training image nearest to it."""

    image: bytes
    path: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text that was used for an image. ``kind``: image, group, class, pair or tags."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with its answer before and after. ``image`` is a PNG, JPEG or WebP thumbnail, best under 20 kB."""

    image: bytes
    path: str
    before: str
    before_p: float
    after: str
    after_p: float
    truth: str | None = None
    texts: Sequence[Text] = ()

    @property
    def alt(self) -> str:
        """What happened to the image."""
        truth = f"Labelled {plain(self.truth)}. " if self.truth is not None else ""
        return f"{truth}Zero-shot answer {plain(self.before)}, adapted answer {plain(self.after)}."


@dataclass(frozen=True, kw_only=True)
class FlagRow:
    """How many texts have a flag, what it says, and what it does to a text's weight."""

    name: str
    images: int
    groups: int
    meaning: str = ""
    effect: str = ""


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text as screening left it. Weight 0 is not used; scores are cosines with the own and with other images."""

    text: str
    weight: float
    flags: Sequence[str] = ()
    clip_score: float | None = None
    clip_score_shuffled: float | None = None


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """An image, or a group of ``members`` images, with all its texts. ``images`` are thumbnails, of a group some."""

    images: Sequence[bytes]
    path: str
    label: str
    """The pseudo-class."""
    captions: Sequence[Caption]
    members: int = 1

    @property
    def is_dropped(self) -> bool:
        """Whether a text of it is not used."""
        return any(caption.weight == 0 for caption in self.captions)


@dataclass(frozen=True, kw_only=True)
class Screening:
    """What became of the texts: numbers over all of them, and some to look at.

    ``with_dropped`` and ``others`` count the images and groups that have a text that is not used, and the rest;
    ``shown`` holds some or all of both.
    """

    texts: int
    dropped: int
    kept_by_floor: int
    flags: Sequence[FlagRow]
    with_dropped: int
    others: int
    shown: Sequence[Captioned]


@dataclass(frozen=True, kw_only=True)
class RuleRow:
    """How many texts about pairs a rule rejected, and what it says."""

    name: str
    texts: int
    meaning: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A pair with its text; ``rule`` is why the text is not used, empty where it is. ``images`` are two thumbnails."""

    images: tuple[bytes, bytes]
    paths: tuple[str, str]
    text: str
    rule: str = ""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What became of the texts about pairs, and some of each kind to look at."""

    texts: int
    kept: int
    rules: Sequence[RuleRow]
    shown: Sequence[Compared]


@dataclass(frozen=True, kw_only=True)
class Counts:
    images: int
    quarantined: int = 0
    duplicates: int = 0
    overlap: int = 0
    """Test images whose very bytes are also among the training images."""
    texts: int = 0
    texts_by_kind: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QuarantineRow:
    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRow:
    name: str
    status: Literal["computed", "cached"]
    seconds: float
    images_per_s: float | None = None
    fingerprint: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    engine_wait: float | None = None
    """Share of the time in which a describer's engine waited for images."""
    tokens: tuple[int, int] | None = None
    """Of prompts and of answers, of all its texts, also of those that an earlier run paid for."""
    cost: str = ""
    """Of those tokens, by the prices of the domain file."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page says: what was evaluated, and what else a run has to show.

    Attributes:
        selection: what was kept without labels, and why, as the end of a sentence.
        judged: what the gate thinks of each adapted model.
        mistaken: by key, the first MISTAKEN images of the first CONFUSED pairs of each method.
        examples_changed: shown where there are no labels, the other two where there are.
    """

    scores: Scores
    n_train: int
    model: Component
    describer: Component
    counts: Counts
    selection: str = ""
    judged: Sequence[Judged] = ()
    mistaken: Mapping[str, Mistaken] = field(default_factory=dict)
    atlas: Sequence[Placed] = ()
    examples_better: Sequence[Example] = ()
    examples_worse: Sequence[Example] = ()
    examples_changed: Sequence[Example] = ()
    screening: Screening | None = None
    pairs: Pairs | None = None
    quarantine: Sequence[QuarantineRow] = ()
    stages: Sequence[StageRow] = ()
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seeds: Sequence[int] = ()


def render(report: Report) -> str:
    """The page as one HTML string that needs nothing else: no script for charts, no font, no request.

    Raises:
        ValueError: an example image is not PNG, JPEG or WebP.
    """
    return html(
        "page.html.j2",
        r=report,
        scores=report.scores,
        text_limit=TEXT_LIMIT,
        open_text_limit=OPEN_TEXT_LIMIT,
        quarantine_limit=QUARANTINE_ROWS,
        **_view(report),
    )


# What the template shows


@dataclass(frozen=True)
class Change:
    """One class before and after: a row with a dumbbell."""

    name: str
    n: int | None
    before: float | None
    after: float | None

    @property
    def gain(self) -> float | None:
        return self.after - self.before if self.before is not None and self.after is not None else None


@dataclass(frozen=True)
class Changes:
    """Rows sorted by change, largest gain first: whole, or both ends of a long list."""

    rows: Sequence[Change]
    gains: Sequence[Change]
    losses: Sequence[Change]
    axis: Axis

    @property
    def is_short(self) -> bool:
        return len(self.rows) <= ROWS_IN_FULL


def sorted_changes(rows: Iterable[Change], axis: Axis) -> Changes:
    """Largest gain first; what has none comes last."""
    ordered = sorted(rows, key=lambda c: (c.gain is None, -(c.gain or 0), c.name))
    gains = [c for c in ordered if (c.gain or 0) > 0][:ROWS_AT_EACH_END]
    losses = [c for c in reversed(ordered) if (c.gain or 0) < 0][:ROWS_AT_EACH_END]
    return Changes(ordered, gains, losses, axis)


@dataclass(frozen=True)
class Confusion:
    truth: str
    predicted: str
    before: int
    after: int


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    id: str
    score: Score

    @property
    def label(self) -> str:
        return label(self.id)

    @property
    def is_baseline(self) -> bool:
        return self.id in ZERO_SHOTS

    @property
    def seeds(self) -> Sequence[float]:
        """Top-1 of each seed, where anything is drawn."""
        return self.score.seeds if not self.is_baseline and METHODS[self.id].is_seeded else ()

    @property
    def note(self) -> str:
        if self.score.gained is None:
            return ""
        gain, low, high = map(points, self.score.gained)
        return f"{gain} points ({low} to {high}) over the better baseline"


def _view(report: Report) -> dict[str, Any]:
    """Everything derived, so that the template only places it."""
    scores = report.scores
    methods = [Method(id, scores.of.get(id, Score())) for id in (*ZERO_SHOTS, *scores.methods)]
    adapted = next(m for m in methods if not m.is_baseline)
    baseline = next(m for m in methods if m.id == scores.zero_shot.better)
    free = scores.label_free
    gain_axis, methods_axis = None, None
    if adapted.score.gained is not None:
        gain_axis = make_axis([0.0, *adapted.score.gained], 4)
        methods_axis = make_axis(
            v for m in methods for v in (m.score.top1, *(m.score.interval or ()), *m.seeds) if v is not None
        )
    shares = [[n / max(sum(counts), 1) for n in counts] for counts in (free.predicted_before, free.predicted_after)]
    history = {key: list(values) for key, values in report.history.items() if len(values)}
    own = methods[len(ZERO_SHOTS) :] if scores.n_test else []
    calibrated = [(m, m.score.calibration) for m in methods if m.score.calibration]
    return {
        "title": f"{scores.domain}: CLIP adapted without labels",
        "label": label,
        "methods": methods,
        "adapted": adapted,
        "baseline": baseline,
        "labelled": scores.n_test > 0,
        "verdict": verdict(adapted.score.gain_interval),
        "headline": _headline(verdict(adapted.score.gain_interval), scores.n_seen, scores.n_test),
        "seen_note": metrics.seen_note(scores.n_seen, scores.n_test),
        "gain_axis": gain_axis,
        "methods_axis": methods_axis,
        "has_top5": len(scores.classes) > 5,  # else every class is among the best five
        "n_predicted": sum(free.predicted_after),
        "never_before": sum(n == 0 for n in free.predicted_before),
        "never_after": sum(n == 0 for n in free.predicted_after),
        "details": [_detailed(report, m, baseline, number) for number, m in enumerate(own)],
        "calibrated": calibrated,
        "diagrams": [
            charts.reliability(found.as_is.bins, found.matched.bins, f"reliability-{methods.index(m)}")
            for m, found in calibrated
        ],
        "learning": _learning(scores, baseline, adapted),
        "map": charts.atlas(report.atlas) if report.atlas else "",
        "predicted": sorted_changes(
            (Change(c, None, b, a) for c, b, a in zip(scores.classes, *shares, strict=True)),
            make_axis([0.0, *shares[0], *shares[1]]),
        ),
        "captions": _captions(report.screening) if report.screening else None,
        "reasons": sorted(Counter(q.reason for q in report.quarantine).items(), key=lambda item: (-item[1], item[0])),
        "total_s": sum(s.seconds for s in report.stages),
        "weakest": _weakest(_changes(scores, baseline, adapted)),
        "longest_s": max((s.seconds for s in report.stages), default=0) or 1,
        "stage_fingerprints": [(s.name, s.fingerprint) for s in report.stages if s.fingerprint],
        "history": history,
        "n_epochs": max(map(len, history.values()), default=0),
        "curves": [charts.curve(key, values, f"curve-{i}") for i, (key, values) in enumerate(history.items(), 1)],
    }


_VERDICTS = {
    "better": "it helped",
    "worse": "it did not help",
    "unclear": "too close to call",
    "unknown": "accuracy is unknown",
}


def _headline(found: str, n_seen: int, n_test: int) -> str:
    """The verdict; before it, if so, that the images are those it was adapted to."""
    said = _VERDICTS[found]
    if not n_seen:
        return f"{said.capitalize()}."
    share = "" if n_seen == n_test else f", {percent(n_seen / n_test)} of which"
    return f"On {'images' if share else 'the images'}{share} it was adapted to: {said}."


@dataclass(frozen=True)
class Captions:
    """What the text browser filters by: numbers stand for flags and classes, so that no text becomes an attribute."""

    flags: Sequence[str]
    labels: Sequence[str]
    cards: Sequence[tuple[Captioned, str, int]]
    """Each with the numbers of its flags, and that of its class."""
    shown_dropped: int
    shown_others: int


def _captions(screening: Screening) -> Captions:
    shown = screening.shown
    flags = list(dict.fromkeys(row.name for row in screening.flags))
    number = {name: place for place, name in enumerate(flags)}
    labels = sorted({each.label for each in shown})
    cards = []
    for each in shown:
        own = {number[name] for caption in each.captions for name in caption.flags if name in number}
        cards.append((each, " ".join(map(str, sorted(own))), labels.index(each.label)))
    dropped = sum(each.is_dropped for each in shown)
    return Captions(flags, labels, cards, dropped, len(shown) - dropped)


@dataclass(frozen=True)
class Confused:
    """A pair of classes with images of one that are taken for the other."""

    truth: str
    predicted: str
    mistake: Mistake
    shown: Sequence[Mistaken]


@dataclass(frozen=True)
class Detailed:
    """What labels say of a method. ``tag`` keeps ids apart: empty for the first, which links elsewhere lead to."""

    method: Method
    tag: str
    per_class: Changes
    scatter: Markup
    matrices: Sequence[Matrix]
    confusions: Sequence[Confusion]
    confused: Sequence[Confused]


def _detailed(report: Report, method: Method, baseline: Method, number: int) -> Detailed:
    scores, tag = report.scores, f"{number}-" if number else ""
    names = scores.classes
    rows = _changes(scores, baseline, method)
    before, after = (_matrix(scores, each) for each in (baseline, method))
    known = [(row.name, row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    return Detailed(
        method=method,
        tag=tag,
        per_class=sorted_changes(rows, OF_A_CLASS),
        scatter=charts.scatter(known, f"{tag}scatter") if len(rows) > ROWS_IN_FULL else Markup(""),
        matrices=_matrices(before, after),
        confusions=_confusions(names, before, after),
        confused=[
            Confused(names[m.truth], names[m.answer], m, [report.mistaken[key] for key in m.keys[:MISTAKEN]])
            for m in scores.confused.get(method.id, ())[:CONFUSED]
        ],
    )


def _changes(scores: Scores, baseline: Method, method: Method) -> list[Change]:
    """Of each class, whether it has images or not."""
    before, after = baseline.score.per_class, method.score.per_class
    return [
        Change(
            name,
            after[number].n if number in after else 0,
            before[number].top1 if number in before else None,
            after[number].top1 if number in after else None,
        )
        for number, name in enumerate(scores.classes)
    ]


def _matrix(scores: Scores, method: Method) -> list[list[int]]:
    """Images by true class (row) and answer."""
    matrix = [[0] * len(scores.classes) for _ in scores.classes]
    for truth, answer, count in scores.confusion.get(method.id, ()):
        matrix[truth][answer] = count
    return matrix


def _weakest(rows: Sequence[Change]) -> list[Change]:
    """The classes that the adapted method knows worst."""
    known = [row for row in rows if row.after is not None]
    return sorted(known, key=lambda row: (row.after or 0.0, row.name))[:WEAKEST]


def _learning(scores: Scores, *shown: Method) -> Markup:
    if scores.few_labels is None:
        return Markup("")
    levels = [(m.label, m.score.top1, not m.is_baseline) for m in shown if m.score.top1 is not None]
    curves = {name.replace("_", " "): draws for name, draws in scores.few_labels.top1.items()}
    return charts.learning(scores.few_labels.labels, curves, levels)


def _confusions(classes: Sequence[str], before: list[list[int]], after: list[list[int]]) -> list[Confusion]:
    """The mistakes that are most frequent before or after, most frequent first."""
    found = [
        Confusion(truth, predicted, before[i][j], after[i][j])
        for i, truth in enumerate(classes)
        for j, predicted in enumerate(classes)
        if i != j and (before[i][j] or after[i][j])
    ]
    return sorted(found, key=lambda c: (-max(c.before, c.after), -c.after, c.truth, c.predicted))[:TOP_CONFUSIONS]


@dataclass(frozen=True)
class Cell:
    """One number of a matrix and its shade: ``good-0`` .. ``good-9``, ``bad-0`` .. ``bad-9`` or nothing."""

    count: int
    shade: str


@dataclass(frozen=True)
class Matrix:
    """One confusion matrix: cells, a picture where there are too many to read, or both, for wide and narrow pages."""

    id: str
    label: str
    rows: Sequence[Sequence[Cell]]
    picture: Markup


def _matrices(before: list[list[int]], after: list[list[int]]) -> list[Matrix]:
    """After, before and their difference; shades say right or wrong (better or worse) and the share of the row."""
    change = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(after, before, strict=True)]
    matrices = []
    for id, name, counts in (
        ("after", "After adaptation", after),
        ("before", "Zero-shot", before),
        ("change", "Change", change),
    ):
        shades = {
            (i, j): _shade(n, max(sum(after[i]), 1), i == j, id == "change")
            for i, row in enumerate(counts)
            for j, n in enumerate(row)
            if n
        }
        rows = [[Cell(n, shades.get((i, j), "")) for j, n in enumerate(row)] for i, row in enumerate(counts)]
        picture = _picture(shades, len(counts), name) if len(counts) > MATRIX_CELLS_ON_A_PHONE else Markup("")
        matrices.append(Matrix(id, name, rows if len(counts) <= MATRIX_CELLS_WITH_NUMBERS else [], picture))
    return matrices


def _shade(count: int, row_total: int, is_diagonal: bool, is_change: bool) -> str:
    is_good = is_diagonal == (count > 0) if is_change else is_diagonal
    # The square root keeps rare mistakes visible; a change is rarely a whole row, so it starts darker.
    share = min(math.sqrt(abs(count) / row_total * (2 if is_change else 1)), 1)
    return f"{'good' if is_good else 'bad'}-{min(int(share * 10), 9)}"


def _picture(shades: Mapping[tuple[int, int], str], n: int, label: str) -> Markup:
    """One pixel per cell on a clear ground, so that one picture serves light and dark."""
    colour = {"good": (58, 124, 190), "bad": (216, 104, 32)}
    pixels = bytearray(4 * n * n)
    for (i, j), shade in shades.items():
        kind, _, level = shade.partition("-")
        at = 4 * (i * n + j)
        pixels[at : at + 4] = bytes((*colour[kind], 60 + 195 * int(level) // 9))
    buffer = BytesIO()
    Image.frombytes("RGBA", (n, n), bytes(pixels)).save(buffer, "PNG", optimize=True)
    return Markup('<img class="heat" width="{0}" height="{0}" src="{1}" alt="{2}">').format(
        n, data_url("image/png", buffer.getvalue()),
        f"{label}: confusion matrix of {n} classes as a heat map, truth downwards, answer to the right. "
        "The most frequent confusions are in the table that follows.",
    )  # fmt: skip
