"""The report page: plain data in, one self-contained HTML file out.

``render`` is a pure function: same report, same bytes; no clock, no network, no files but the template beside it.
Every text is untrusted (a language model wrote it, or a stranger named the file), so all of it is escaped, isolated
from the direction of its neighbours, freed of invisible characters and clipped. A strict content security policy, with
the hashes of the one style sheet and the one script, is the second line of defence.
"""

import base64
import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from models.images import to_rgb

NAME_LIMIT = 64
TEXT_LIMIT = 180
"""Characters of a text that show before the reader opens it."""
OPEN_TEXT_LIMIT = 2_000
"""Characters of a text that the page holds at all; the store has the rest."""
ROWS_IN_FULL = 24
"""Up to this many classes every list is whole; above, the ends are shown and the whole list can be opened."""
ROWS_AT_EACH_END = 10
MATRIX_CELLS_WITH_NUMBERS = 30
"""Up to this many classes the confusion matrix is a table of numbers; above, it is a picture."""
TOP_CONFUSIONS = 15
QUARANTINE_ROWS = 40

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model that took part: the classifier's backbone or the describer. ``note`` is what a reader must know of it."""

    name: str
    revision: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison. Rates are shares in [0, 1]; None where there are no labels.

    ``interval`` is the 95 % bootstrap interval of ``top1``. An id that starts with ``zero_shot`` is a baseline.
    """

    id: str
    label: str
    top1: float | None = None
    interval: Interval | None = None
    top5: float | None = None
    mean_per_class: float | None = None
    seeds: Sequence[float] = ()
    note: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.id.startswith("zero_shot")


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Accuracy of one class in [0, 1] with the better baseline and after adaptation; None without test images."""

    name: str
    n: int
    zero_shot: float | None
    adapted: float | None


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
    ``best_baseline``, as a share (0.01 = one point). Confusions are counts, rows = truth, columns = prediction, in the
    order of ``classes``. ``n_test`` = 0 means no labels: then accuracies are None and ``examples_changed`` is shown.

    Raises:
        ValueError: with every contradiction in the data, among them a ``best_baseline`` that is not the best.
    """

    domain: str
    title: str
    classes: Sequence[str]
    n_train: int
    n_test: int
    model: Component
    describer: Component
    centring: bool
    methods: Sequence[Method]
    adapted: str
    best_baseline: str
    counts: Counts
    label_free: LabelFree
    gain_interval: Interval | None = None
    selection: str = ""
    """What was kept without labels, and why, as the end of a sentence."""
    per_class: Sequence[ClassRow] = ()
    confusion_before: Sequence[Sequence[int]] = ()
    confusion_after: Sequence[Sequence[int]] = ()
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
    for role in ("confusion_before", "confusion_after"):
        shape = {len(getattr(report, role)), *(len(row) for row in getattr(report, role))}
        if len(getattr(report, role)) and shape != {n_classes}:
            yield f"{role} is not {n_classes} x {n_classes}"
    if len(report.confusion_before) != len(report.confusion_after):
        yield "one confusion matrix without the other: give both or none"
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


def html(template: str, **view: Any) -> str:
    """A template of this folder, filled. Its policy lets a browser run our own style and script, and fetch nothing."""
    folder = Path(__file__).parent
    css, js = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    if "</style" in css.lower() or "</script" in js.lower():
        raise ValueError("page.css and page.js are inlined and must not hold a closing style or script tag")
    env = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "name": name_html, "plain": plain, "clean": clean, "percent": percent, "points": points, "number": number,
        "decimal": decimal, "duration": duration, "image": image_html, "thumbnail": thumbnail_html,
    }  # fmt: skip
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{_sha256(css)}'",
        f"script-src 'sha256-{_sha256(js)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    page = env.get_template(template).render(css=Markup(css), js=Markup(js), policy="; ".join(policy), **view)
    return page.strip() + "\n"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# Untrusted text


def clean(text: str, limit: int = OPEN_TEXT_LIMIT) -> str:
    """At most ``limit`` characters of ``text`` with nothing in them that hides, reorders or piles up.

    Invisible and direction-changing characters become ``[U+202E]``, so a reader sees that they are there; joiners stay
    where scripts and emoji need them, between two non-ASCII characters. Runs of combining marks are cut to six.
    """
    clipped = text[:limit] + ("…" if len(text) > limit else "")
    if clipped.isascii() and clipped.isprintable():
        return clipped
    out: list[str] = []
    marks = 0
    for before, char, after in zip(" " + clipped, clipped, clipped[1:] + " ", strict=False):
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        joins = char in "\u200c\u200d" and not before.isascii() and not after.isascii()
        hides = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(char) & 0xFFFE == 0xFFFE
        if hides and char not in "\n\t" and not joins:
            out.append(f"[U+{ord(char):04X}]")
        elif marks <= 6:
            out.append(char)
    return "".join(out)


def plain(text: str, limit: int = NAME_LIMIT) -> str:
    """``clean`` on one line, for attributes and chart labels; the marks of invisible characters count too."""
    shown = clean(" ".join(text.split()) or "(empty)", limit)
    return shown if len(shown) <= limit + 1 else shown[:limit] + "…"


def name_html(text: str, limit: int = NAME_LIMIT) -> Markup:
    """A class name, path or other short text, isolated; more of it in the tooltip where it had to be clipped."""
    title = Markup(' title="{}"').format(plain(text, 400)) if len(text) > limit else ""
    return Markup("<bdi{}>{}</bdi>").format(title, plain(text, limit))


# Numbers


def percent(share: float | None, digits: int = 1) -> str:
    return _signless(share, 100, digits) + "%" if _known(share) else "–"


def points(share: float | None, digits: int = 1) -> str:
    """A difference in percentage points with its sign: ``+4.8``, ``−0.3``, ``0.0``."""
    return _signed(f"{100 * share:+.{digits}f}") if share is not None and math.isfinite(share) else "–"


def number(value: float | None) -> str:
    return f"{value:,.0f}".replace("-", "−") if value is not None and math.isfinite(value) else "–"


def decimal(value: float | None, digits: int = 3) -> str:
    return _signless(value, 1, digits) if _known(value) else "–"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _signless(value: float | None, factor: int, digits: int) -> str:
    assert value is not None
    return f"{factor * value + 0.0:.{digits}f}".replace("-", "−")


def _signed(text: str) -> str:
    return text[1:] if not text.strip("+-0.") else text.replace("-", "−")


@dataclass(frozen=True)
class Axis:
    """A linear scale with round ticks; ``at`` gives an SVG position as a percentage of the plot's width."""

    lo: float
    hi: float
    ticks: Sequence[float]

    @property
    def digits(self) -> int:
        """Decimals that tick labels in percent need."""
        return 0 if all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in self.ticks) else 1

    def at(self, value: float) -> str:
        return f"{100 * min(max((value - self.lo) / (self.hi - self.lo), 0), 1):.2f}%"


def make_axis(values: Iterable[float], n_ticks: int = 5) -> Axis:
    """The smallest axis that holds ``values`` and starts and ends at a round number."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    lo, hi = min(known), max(known)
    if hi - lo < 1e-9:
        lo, hi = lo - 0.005, hi + 0.005
    raw = (hi - lo) / n_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return Axis(first * step, last * step, [i * step for i in range(first, last + 1)])


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


def _changes(rows: Iterable[Change], axis: Axis) -> Changes:
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
        "gain": gain,
        "gain_axis": gain_axis,
        "methods_axis": methods_axis,
        "n_predicted": n_predicted,
        "never_before": sum(n == 0 for n in free.predicted_before),
        "never_after": sum(n == 0 for n in free.predicted_after),
        "per_class": _changes(
            (Change(c.name, c.n, c.zero_shot, c.adapted) for c in report.per_class), Axis(0, 1, [0, 0.25, 0.5, 0.75, 1])
        ),
        "scatter": _scatter(report.per_class) if len(report.per_class) > ROWS_IN_FULL else "",
        "predicted": _changes(
            (Change(c, None, b, a) for c, b, a in zip(report.classes, *shares, strict=True)),
            make_axis([0.0, *shares[0], *shares[1]]),
        ),
        "matrices": _matrices(report),
        "confusions": _confusions(report),
        "captions": _captions(report.screening) if report.screening else None,
        "reasons": sorted(Counter(q.reason for q in report.quarantine).items(), key=lambda item: (-item[1], item[0])),
        "total_s": sum(s.seconds for s in report.stages),
        "longest_s": max((s.seconds for s in report.stages), default=0) or 1,
        "stage_fingerprints": [(s.name, s.fingerprint) for s in report.stages if s.fingerprint],
        "history": history,
        "n_epochs": max(map(len, history.values()), default=0),
        "curves": [_curve(key, values, f"curve-{i}") for i, (key, values) in enumerate(history.items(), 1)],
    }


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


def _confusions(report: Report) -> list[Confusion]:
    """The mistakes that are most frequent before or after, most frequent first."""
    found = [
        Confusion(truth, predicted, int(report.confusion_before[i][j]), int(report.confusion_after[i][j]))
        for i, truth in enumerate(report.classes)
        for j, predicted in enumerate(report.classes)
        if i != j and len(report.confusion_after) and (report.confusion_before[i][j] or report.confusion_after[i][j])
    ]
    return sorted(found, key=lambda c: (-max(c.before, c.after), -c.after, c.truth, c.predicted))[:TOP_CONFUSIONS]


@dataclass(frozen=True)
class Cell:
    """One number of a matrix and its shade: ``good-0`` .. ``good-9``, ``bad-0`` .. ``bad-9`` or nothing."""

    count: int
    shade: str


@dataclass(frozen=True)
class Matrix:
    """One confusion matrix: cells, or a picture where there are too many cells to read."""

    id: str
    label: str
    rows: Sequence[Sequence[Cell]]
    picture: Markup


def _matrices(report: Report) -> list[Matrix]:
    """After, before and their difference; shades say right or wrong (better or worse) and the share of the row."""
    before, after = ([[int(n) for n in row] for row in m] for m in (report.confusion_before, report.confusion_after))
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
        if len(counts) > MATRIX_CELLS_WITH_NUMBERS:
            matrices.append(Matrix(id, label, [], _picture(shades, len(counts), label)))
        else:
            rows = [[Cell(n, shades.get((i, j), "")) for j, n in enumerate(row)] for i, row in enumerate(counts)]
            matrices.append(Matrix(id, label, rows, Markup("")))
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
        n, _data_url("image/png", buffer.getvalue()),
        f"{label}: confusion matrix of {n} classes as a heat map, truth downwards, answer to the right. "
        "The most frequent confusions are in the table that follows.",
    )  # fmt: skip


def image_html(example: Example) -> Markup:
    """The thumbnail with a description of what happened to it."""
    truth = f"Labelled {plain(example.truth)}. " if example.truth is not None else ""
    alt = f"{truth}Zero-shot answer {plain(example.before)}, adapted answer {plain(example.after)}."
    return thumbnail_html(example.image, example.path, alt)


def thumbnail(image: Image.Image, side_px: int) -> bytes:
    """A picture for the page, no side longer than ``side_px``: PNG where it is tiny, to stay crisp, else JPEG."""
    small = to_rgb(image).copy()
    small.thumbnail((side_px, side_px))
    out = BytesIO()
    small.save(out, "PNG" if max(small.size) <= 64 else "JPEG", quality=80)
    return out.getvalue()


def picture_url(data: bytes) -> str:
    """PNG or JPEG bytes, as an address that holds them."""
    return _data_url("image/png" if data.startswith(b"\x89PNG") else "image/jpeg", data)


def thumbnail_html(data: bytes, path: str, alt: str) -> Markup:
    """A picture with its size, and crisp pixels where it is tiny."""
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path!r}: the example image is not a picture; give PNG, JPEG or WebP bytes") from error
    if image.format not in ("PNG", "JPEG", "WEBP"):
        raise ValueError(f"{path!r}: the example image is {image.format}; give PNG, JPEG or WebP bytes")
    return Markup('<img class="{}" width="{}" height="{}" src="{}" alt="{}">').format(
        "tiny" if max(image.size) < 80 else "photo", *image.size,
        _data_url(f"image/{image.format.lower()}", data), alt,
    )  # fmt: skip


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


# Charts: Altair, drawn to SVG while the page is built. Colours stand for CSS classes, so the charts follow the theme.

INK, MUTED, LINE, ACCENT, LOSS = "#000001", "#000002", "#000003", "#000004", "#000005"
CSS_COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", LOSS: "loss"}


def _curve(name: str, values: Sequence[float], id: str) -> Markup:
    import altair as alt

    points = [{"epoch": i, "value": v if math.isfinite(v) else None} for i, v in enumerate(values, 1)]
    known = [v for v in values if math.isfinite(v)]
    x = alt.X("epoch:Q", title="epoch", scale=alt.Scale(domain=[1, max(len(values), 2)]), axis=alt.Axis(tickMinStep=1))
    chart = alt.Chart(alt.Data(values=points)).encode(x=x)
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=4))
    layers = chart.mark_line(color=ACCENT, strokeWidth=2).encode(y=y)
    if len(values) <= 40:
        layers = layers + chart.mark_point(color=ACCENT, filled=True, size=26, opacity=1).encode(y=y)
    span = f" It goes from {known[0]:.4g} to {known[-1]:.4g}." if known else ""
    return _svg(
        layers.properties(width=268, height=130), id, f"{plain(name)} over {len(values)} epochs",
        f"Line chart.{span} The values are in the table below the charts.",
    )  # fmt: skip


def _scatter(rows: Sequence[ClassRow]) -> Markup:
    import altair as alt

    known = [(r.name, r.zero_shot, r.adapted) for r in rows if r.zero_shot is not None and r.adapted is not None]
    known.sort(key=lambda row: (row[1] - row[2], row[0]))
    labelled = _apart(known) | _apart(known[::-1])
    data = [
        {
            "before": before, "after": after, "name": plain(name, 22) if row in labelled else "",
            "kind": "gain" if after > before else "loss" if after < before else "same",
        }
        for row in known for name, before, after in [row]
    ]  # fmt: skip
    axis = alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    scale = alt.Scale(domain=[0, 1])
    colour = alt.Color(
        "kind:N", legend=None, scale=alt.Scale(domain=["gain", "loss", "same"], range=[ACCENT, LOSS, MUTED])
    )
    chart = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("before:Q", title="zero-shot accuracy", scale=scale, axis=axis),
        y=alt.Y("after:Q", title="adapted accuracy", scale=scale, axis=axis),
    )
    diagonal = alt.Chart(alt.Data(values=[{"before": 0, "after": 0}, {"before": 1, "after": 1}])).mark_line(
        color=MUTED, strokeDash=[4, 4], strokeWidth=1
    )
    shape = alt.Shape(
        "kind:N",
        legend=None,
        scale=alt.Scale(domain=["gain", "loss", "same"], range=["triangle-up", "triangle-down", "circle"]),
    )
    dots = chart.mark_point(filled=True, size=46, opacity=0.75).encode(color=colour, shape=shape)
    left = chart.mark_text(align="left", dx=8, fontSize=11, color=INK).encode(text="name:N")
    right = chart.mark_text(align="right", dx=-8, fontSize=11, color=INK).encode(text="name:N")
    layers = (
        diagonal.encode(x="before:Q", y="after:Q")
        + dots
        + left.transform_filter("datum.before <= 0.6")
        + right.transform_filter("datum.before > 0.6")
    )
    n_gain = sum(row["kind"] == "gain" for row in data)
    n_loss = sum(row["kind"] == "loss" for row in data)
    return _svg(
        layers.properties(width=330, height=330), "scatter", f"Accuracy of {len(data)} classes before and after",
        f"Scatter plot, one mark per class. {n_gain} classes lie above the diagonal (better), {n_loss} below (worse). "
        "The values are in the tables of this section.",
    )  # fmt: skip


def _apart(rows: Sequence[tuple[str, float, float]], n: int = 3) -> set[tuple[str, float, float]]:
    """The first ``n`` rows whose labels do not lie on each other."""
    chosen: list[tuple[str, float, float]] = []
    for row in rows[:40]:
        if len(chosen) < n and all(abs(row[2] - c[2]) > 0.05 or abs(row[1] - c[1]) > 0.4 for c in chosen):
            chosen.append(row)
    return set(chosen)


def _svg(chart: Any, id: str, title: str, description: str) -> Markup:
    """The chart as inline SVG: theme colours as classes, a title and a description.

    Marks must not be clipped: the converter numbers clip paths over the life of the process, so the bytes would differ.
    """
    from xml.etree import ElementTree

    import vl_convert

    styled = chart.configure(aria=False, font="sans-serif", padding=4).configure_view(stroke=None)
    styled = styled.configure_axis(
        labelColor=MUTED, titleColor=MUTED, gridColor=LINE, domainColor=LINE, tickColor=LINE,
        labelFontSize=11, titleFontSize=11, titleFontWeight="normal", titlePadding=8, tickSize=4,
    )  # fmt: skip
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg({**styled.to_dict(), "background": None}))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for attribute in ("font-family", "pointer-events", "aria-hidden", "aria-roledescription", "role", "style"):
            element.attrib.pop(attribute, None)
        classes = [
            f"{attribute}-{CSS_COLOURS[colour]}"
            for attribute in ("fill", "stroke")
            if (colour := element.get(attribute, "")) in CSS_COLOURS and element.attrib.pop(attribute)
        ]
        element.attrib.pop("class", None)
        if classes:
            element.set("class", " ".join(classes))
    width, height = root.get("width", "300"), root.get("height", "200")
    root.attrib = {
        "class": "chart", "role": "img", "aria-labelledby": f"{id}-title {id}-desc",
        "width": width, "height": height, "viewBox": root.get("viewBox", f"0 0 {width} {height}"),
    }  # fmt: skip
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, {"id": f"{id}-{tag}"})
        child.text = text
        root.insert(position, child)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))
