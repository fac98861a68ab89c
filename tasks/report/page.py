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
from latteflow.tasks.report import charts
from latteflow.tasks.report.charts import Axis, Placed, make_axis
from latteflow.tasks.report.html import OPEN_TEXT_LIMIT, TEXT_LIMIT, data_url, html, percent, plain

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

OF_A_CLASS = Axis(0, 1, [0, 0.25, 0.5, 0.75, 1])
"""Accuracies of classes are shown on one axis, whatever they are."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model that took part: the classifier's backbone or the describer. ``note`` is what a reader must know of it."""

    name: str
    revision: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How sure answers are and how often right; ``matched`` is after a temperature that was set without labels.

    Errors are expected calibration errors; of the bins each is ``(confidence, share that is right, answers)``.
    """

    confidence: float
    error: float
    matched_error: float
    temperature: float
    bins: Sequence[charts.Point]
    matched_bins: Sequence[charts.Point]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison. Rates are shares in [0, 1]; None where there are no labels.

    ``interval`` is the 95 % bootstrap interval of ``top1``. ``permutation_p`` and ``mcnemar_p`` compare with the better
    baseline. An id that starts with ``zero_shot`` is a baseline.
    """

    id: str
    label: str
    top1: float | None = None
    interval: Interval | None = None
    top5: float | None = None
    mean_per_class: float | None = None
    macro_f1: float | None = None
    permutation_p: float | None = None
    mcnemar_p: float | None = None
    calibration: Calibration | None = None
    seeds: Sequence[float] = ()
    note: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.id.startswith("zero_shot")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the gate thinks of one adapted model; ``estimates`` by name, see :mod:`models.judge.selection`."""

    model: str
    accepted: bool
    reason: str
    estimates: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Accuracy of one class in [0, 1] with the better baseline and after adaptation; None without test images."""

    name: str
    n: int
    zero_shot: float | None
    adapted: float | None


@dataclass(frozen=True, kw_only=True)
class Mistaken:
    """One image of a confused pair; ``text`` is about it or about the training image nearest to it."""

    image: bytes
    path: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Confused:
    """A pair of classes with images of one that are taken for the other: ``n`` of them, ``before`` by the baseline."""

    truth: str
    predicted: str
    n: int
    before: int
    shown: Sequence[Mistaken] = ()


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What labels say of an adapted method. ``confusion`` counts, rows = truth, columns = answers, as ``classes``."""

    id: str
    per_class: Sequence[ClassRow] = ()
    confusion: Sequence[Sequence[int]] = ()
    confused: Sequence[Confused] = ()


@dataclass(frozen=True, kw_only=True)
class SliceRow:
    """Accuracy of the methods, by id, on ``n`` images that have something in common."""

    by: str
    name: str
    n: int
    top1: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class FewLabels:
    """What classifiers reach that learn from ``labels`` images of each class: for each learner the draws' accuracies.

    ``worth`` is the least number of labels that reach a method; None where none does.
    """

    labels: Sequence[int]
    top1: Mapping[str, Sequence[Sequence[float]]]
    worth: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class ForgottenRow:
    """Top-1 of an adapted model on images of another kind, and how it changed."""

    id: str
    top1: float
    change: float
    change_interval: Interval


@dataclass(frozen=True, kw_only=True)
class General:
    """``n`` labelled images of another kind: top-1 of the untouched model, and what adapting made of it."""

    n: int
    classes: int
    top1: float
    methods: Sequence[ForgottenRow]


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
class LabelFree:
    """What can be said without labels, before (better baseline) and after adaptation.

    ``agreement`` is the share of images whose class did not change, ``margin`` the mean of top-1 minus top-2
    probability, ``entropy`` the mean in nats, ``predicted`` the images per predicted class, in the classes' order.
    """

    agreement: float
    margin_before: float
    margin_after: float
    entropy_before: float
    entropy_after: float
    predicted_before: Sequence[int]
    predicted_after: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page says.

    ``gain_interval`` is the 95 % interval of the paired difference in top-1 between the methods ``adapted`` and
    ``best_baseline``, as a share (0.01 = one point). ``confusion_before`` is of that baseline, and ``details`` of
    adapted methods. ``n_test`` = 0 means no labels: then accuracies are None and ``examples_changed`` is shown.

    Raises:
        ValueError: with every contradiction in the data, among them a ``best_baseline`` that is not the best.
    """

    domain: str
    title: str
    classes: Sequence[str]
    n_train: int
    n_test: int
    n_seen: int = 0
    """Of the labelled images, those that the models were adapted to."""
    model: Component
    describer: Component
    centre_share: float
    """How much of the images' mean embedding is subtracted, 0 to 1."""
    methods: Sequence[Method]
    adapted: str
    best_baseline: str
    counts: Counts
    label_free: LabelFree
    gain_interval: Interval | None = None
    selection: str = ""
    judged: Sequence[Judged] = ()
    """What was kept without labels, and why, as the end of a sentence."""
    confusion_before: Sequence[Sequence[int]] = ()
    details: Sequence[Detail] = ()
    slices: Sequence[SliceRow] = ()
    few_labels: FewLabels | None = None
    general: General | None = None
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

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ValueError("the report contradicts itself: " + "; ".join(problems))

    def method(self, id: str) -> Method:
        return next(m for m in self.methods if m.id == id)


def _problems(report: Report) -> Iterable[str]:
    n_classes = len(report.classes)
    by_id = {m.id: m for m in report.methods}
    if n_classes < 2:
        yield f"{n_classes} classes, at least 2 are needed"
    for role in ("adapted", "best_baseline"):
        if getattr(report, role) not in by_id:
            yield f"{role} is {getattr(report, role)!r}, which is none of the methods {sorted(by_id)}"
    for role in ("predicted_before", "predicted_after"):
        if (n := len(getattr(report.label_free, role))) != n_classes:
            yield f"{role} has {n} entries for {n_classes} classes"
    matrices = {"confusion_before": report.confusion_before} | {
        f"confusion of {d.id}": d.confusion for d in report.details
    }
    for role, matrix in matrices.items():
        if len(matrix) and {len(matrix), *map(len, matrix)} != {n_classes}:
            yield f"{role} is not {n_classes} x {n_classes}"
    if len({len(matrix) > 0 for matrix in matrices.values()}) > 1:
        yield "one confusion matrix without the others: give all or none"
    for detail in report.details:
        if detail.id not in by_id:
            yield f"details are of {detail.id!r}, which is none of the methods {sorted(by_id)}"
    if report.n_test == 0:
        return
    if report.gain_interval is None:
        yield f"{report.n_test} labelled images but no gain_interval"
    top1 = {m.id: m.top1 for m in report.methods if m.top1 is not None}
    for role in ("adapted", "best_baseline"):
        if getattr(report, role) in by_id and getattr(report, role) not in top1:
            yield f"{report.n_test} labelled images but no top1 of {getattr(report, role)!r}"
    best = max((m for m in report.methods if m.is_baseline and m.id in top1), key=lambda m: top1[m.id], default=None)
    if best and top1[best.id] > top1.get(report.best_baseline, math.inf):
        yield f"best_baseline is {report.best_baseline!r}, but {best.id!r} is better ({top1[best.id]:.4f})"


def render(report: Report) -> str:
    """The page as one HTML string that needs nothing else: no script for charts, no font, no request.

    Raises:
        ValueError: an example image is not PNG, JPEG or WebP.
    """
    return html(
        "page.html.j2",
        r=report,
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


def _view(report: Report) -> dict[str, Any]:
    """Everything derived, so that the template only places it."""
    adapted, baseline = report.method(report.adapted), report.method(report.best_baseline)
    labelled = report.n_test > 0
    free = report.label_free
    n_predicted = sum(free.predicted_after)
    gain = adapted.top1 - baseline.top1 if adapted.top1 is not None and baseline.top1 is not None else None
    verdict, gain_axis, methods_axis = "unknown", None, None
    if labelled and gain is not None and report.gain_interval is not None:
        low, high = report.gain_interval
        verdict = "better" if low > 0 else "worse" if high < 0 else "unclear"
        gain_axis = make_axis([0.0, gain, low, high], 4)
        methods_axis = make_axis(
            v for m in report.methods for v in (m.top1, *(m.interval or ()), *m.seeds) if v is not None
        )
    shares = [[n / max(sum(counts), 1) for n in counts] for counts in (free.predicted_before, free.predicted_after)]
    history = {key: list(values) for key, values in report.history.items() if len(values)}
    return {
        "adapted": adapted,
        "baseline": baseline,
        "labelled": labelled,
        "verdict": verdict,
        "headline": _headline(verdict, report.n_seen, report.n_test),
        "seen_note": metrics.seen_note(report.n_seen, report.n_test),
        "gain": gain,
        "gain_axis": gain_axis,
        "methods_axis": methods_axis,
        "has_top5": len(report.classes) > 5,  # else every class is among the best five
        "n_predicted": n_predicted,
        "never_before": sum(n == 0 for n in free.predicted_before),
        "never_after": sum(n == 0 for n in free.predicted_after),
        "details": [_detailed(report, detail, number) for number, detail in enumerate(report.details)],
        "calibrated": [m for m in report.methods if m.calibration],
        "diagrams": [
            charts.reliability(m.calibration.bins, m.calibration.matched_bins, f"reliability-{number}")
            for number, m in enumerate(report.methods)
            if m.calibration
        ],
        "learning": _learning(report),
        "map": charts.atlas(report.atlas) if report.atlas else "",
        "predicted": sorted_changes(
            (Change(c, None, b, a) for c, b, a in zip(report.classes, *shares, strict=True)),
            make_axis([0.0, *shares[0], *shares[1]]),
        ),
        "captions": _captions(report.screening) if report.screening else None,
        "reasons": sorted(Counter(q.reason for q in report.quarantine).items(), key=lambda item: (-item[1], item[0])),
        "total_s": sum(s.seconds for s in report.stages),
        "weakest": _weakest(report),
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


def _headline(verdict: str, n_seen: int, n_test: int) -> str:
    """The verdict; before it, if so, that the images are those it was adapted to."""
    said = _VERDICTS[verdict]
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
class Detailed:
    """What labels say of a method. ``tag`` keeps ids apart: empty for the first, which links elsewhere lead to."""

    method: Method
    tag: str
    per_class: Changes
    scatter: Markup
    matrices: Sequence[Matrix]
    confusions: Sequence[Confusion]
    confused: Sequence[Confused]


def _detailed(report: Report, detail: Detail, number: int) -> Detailed:
    tag = f"{number}-" if number else ""
    known = [(r.name, r.zero_shot, r.adapted) for r in detail.per_class if None not in (r.zero_shot, r.adapted)]
    return Detailed(
        method=report.method(detail.id),
        tag=tag,
        per_class=sorted_changes((Change(c.name, c.n, c.zero_shot, c.adapted) for c in detail.per_class), OF_A_CLASS),
        scatter=charts.scatter(known, f"{tag}scatter") if len(detail.per_class) > ROWS_IN_FULL else Markup(""),  # type: ignore[arg-type]
        matrices=_matrices(report.confusion_before, detail.confusion),
        confusions=_confusions(report, detail),
        confused=detail.confused,
    )


def _weakest(report: Report) -> list[ClassRow]:
    """The classes that the adapted method knows worst."""
    known = [row for row in report.details[0].per_class if row.adapted is not None] if report.details else []
    return sorted(known, key=lambda row: (row.adapted or 0.0, row.name))[:WEAKEST]


def _learning(report: Report) -> Markup:
    if report.few_labels is None:
        return Markup("")
    shown = [report.method(id) for id in (report.best_baseline, report.adapted)]
    levels = [(m.label, m.top1, not m.is_baseline) for m in shown if m.top1 is not None]
    curves = {name.replace("_", " "): draws for name, draws in report.few_labels.top1.items()}
    return charts.learning(report.few_labels.labels, curves, levels)


def _confusions(report: Report, detail: Detail) -> list[Confusion]:
    """The mistakes that are most frequent before or after, most frequent first."""
    before, after = report.confusion_before, detail.confusion
    found = [
        Confusion(truth, predicted, int(before[i][j]), int(after[i][j]))
        for i, truth in enumerate(report.classes)
        for j, predicted in enumerate(report.classes)
        if i != j and len(after) and (before[i][j] or after[i][j])
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


def _matrices(*confusions: Sequence[Sequence[int]]) -> list[Matrix]:
    """After, before and their difference; shades say right or wrong (better or worse) and the share of the row."""
    before, after = ([[int(n) for n in row] for row in matrix] for matrix in confusions)
    if not after:
        return []
    change = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(after, before, strict=True)]
    matrices = []
    for id, label, counts in (
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
        picture = _picture(shades, len(counts), label) if len(counts) > MATRIX_CELLS_ON_A_PHONE else Markup("")
        matrices.append(Matrix(id, label, rows if len(counts) <= MATRIX_CELLS_WITH_NUMBERS else [], picture))
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
