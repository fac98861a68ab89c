"""The report page. The numbers here are made up; ``make_report`` draws them from a seed."""

import base64
import hashlib
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from typing import Any, Literal

import pytest
from PIL import Image, ImageDraw

from latteflow.models.methods.registry import label
from latteflow.models.settings import ZERO_SHOTS
from latteflow.tasks.report.charts import Placed, make_axis
from latteflow.tasks.report.html import clean, duration, p_value, percent, plain, points
from latteflow.tasks.report.page import (
    Caption,
    Captioned,
    Compared,
    Component,
    Counts,
    Example,
    FlagRow,
    Mistaken,
    Pairs,
    QuarantineRow,
    Report,
    RuleRow,
    Screening,
    StageRow,
    Text,
    render,
)
from latteflow.tasks.report.scores import (
    Bin,
    Calibration,
    Confidence,
    FewLabels,
    Forgotten,
    General,
    LabelFree,
    McNemar,
    Mistake,
    OfClass,
    Score,
    Scores,
    SliceScores,
    ZeroShot,
)
from latteflow.tasks.tune.select import Judged

FASHION = (
    "t-shirt", "trousers", "pullover sweater", "dress", "coat", "sandal", "shirt", "sneaker", "handbag", "ankle boot",
)  # fmt: skip
SCRIPT = "<script>window.pwned = 1</script>"
ATTRIBUTE = "\"><img src=x onerror='window.pwned = 2'>"
TEMPLATE = "{{ 7 * 191 }} {% raw %} </style></script></svg>--> & &lt;"
RIGHT_TO_LEFT = "holiday\u202egpj.exe"
INVISIBLE = "pass\u200bword \u2066x\u2069 \ufeff \x00 \x1b[31m \ud800 \u2028 end"
IDS = (*ZERO_SHOTS, "latteclip")
HOSTILE = (SCRIPT, ATTRIBUTE, TEMPLATE, RIGHT_TO_LEFT, INVISIBLE, "Z" + "\u0301" * 500, "long" * 2500, "", " ")


def picture(rng: random.Random, side: int = 112) -> bytes:
    """A small drawing as PNG bytes."""
    ground, ink = (rng.randrange(200, 256),) * 3, tuple(rng.randrange(20, 190) for _ in range(3))
    image = Image.new("RGB", (side, side), ground)
    draw, edge = ImageDraw.Draw(image), side // 6
    radius = rng.choice([0, side // 5, side // 2])
    draw.rounded_rectangle((edge, edge, side - edge, side - edge), radius=radius, fill=ink)
    draw.line((edge, side - edge, side - edge, edge), fill=ground, width=max(side // 28, 1))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_screening(classes: Sequence[str], seed: int = 2) -> Screening:
    """Thirty images and groups; every third has a refusal, every fifth of the others names its class."""
    rng = random.Random(seed)
    shown = []
    for i in range(30):
        label = classes[i % len(classes)]
        text = f"a {label} number {i} on a plain ground"
        used = Caption(
            text=text,
            weight=1.0,
            flags=["names_class"] if i % 5 == 1 else [],
            clip_score=0.31,
            clip_score_shuffled=0.12,
        )
        refusal = Caption(text="I'm sorry, but I can't help with that.", weight=0.0, flags=["refusal"], clip_score=0.1)
        members = 4 if i % 7 == 6 else 1
        shown.append(
            Captioned(
                images=[picture(rng, 48) for _ in range(members)], path=f"incoming/{i}.png", label=label,
                captions=[used, refusal] if i % 3 == 0 else [used], members=members,
            )
        )  # fmt: skip
    flags = [
        FlagRow(name="refusal", images=8, groups=2, meaning="the model declines", effect="dropped"),
        FlagRow(name="names_class", images=6, groups=0, meaning="says the name of a class"),
        FlagRow(name="cut", images=3, groups=0, meaning="stopped at the longest output", effect="weight × 0.8"),
    ]
    return Screening(texts=2493, dropped=10, kept_by_floor=1, flags=flags, with_dropped=10, others=2483, shown=shown)


def make_pairs(seed: int = 3) -> Pairs:
    """Six texts about pairs, two of them rejected."""
    rng = random.Random(seed)
    shown = [
        Compared(
            images=(picture(rng, 48), picture(rng, 48)), paths=(f"a/{i}.png", f"b/{i}.png"), text=f"the first is {i}",
            rule="refusal" if i > 3 else "",
        )
        for i in range(6)
    ]  # fmt: skip
    return Pairs(texts=1200, kept=1100, rules=[RuleRow(name="refusal", texts=100, meaning="it declines")], shown=shown)


def make_report(n_classes: int = 10, n_test: int = 1000, skill: float = 0.09, seed: int = 1, **changes: Any) -> Report:
    """A report with made-up but consistent numbers.

    Args:
        skill: what adaptation adds to a right answer's chance.
        changes: of the report, or of its scores.
    """
    rng = random.Random(seed)
    classes = FASHION[:n_classes] if n_classes <= 10 else tuple(f"species {i:03}" for i in range(1, n_classes + 1))
    before = [[0] * n_classes for _ in classes]
    after = [[0] * n_classes for _ in classes]
    ease = [rng.betavariate(3.2, 2.4) for _ in classes]
    lift = [rng.gauss(skill, 0.09) for _ in classes]
    for image in range(n_test or 500):
        i = image % n_classes
        near = [(i + d) % n_classes for d in (1, 1, 1, 2, 3, rng.randrange(1, n_classes) if n_classes > 1 else 1)]
        wrong = rng.choice([j for j in near if j != i] or [(i + 1) % n_classes])
        before[i][i if rng.random() < ease[i] else wrong] += 1
        after[i][i if rng.random() < min(max(ease[i] + lift[i], 0.02), 0.98) else wrong] += 1
    total = n_test or 500
    right_before, right_after = (sum(m[i][i] for i in range(n_classes)) / total for m in (before, after))
    half = 1.6 * math.sqrt(0.25 / total)
    gain = right_after - right_before

    def score(matrix: list[list[int]], top1: float, **more: Any) -> Score:
        return Score(
            top1=top1,
            interval=(max(top1 - 1.9 * half, 0), min(top1 + 1.9 * half, 1)),
            top5=top1 + (1 - top1) * 0.8,
            mean_per_class=top1 - 0.004,
            macro_f1=top1 - 0.011,
            calibration=Calibration(
                as_is=Confidence(ece=0.9 - top1, confidence=0.9, bins=bins((0.5, 0.4, 100), (0.95, top1, 900))),
                matched=Confidence(ece=0.05, confidence=0.6, bins=bins((0.4, 0.4, 600), (0.8, 0.9, 400))),
                temperatures=[3.2, 3.22],
            ),
            per_class={
                i: OfClass(n=sum(row), top1=row[i] / sum(row)) for i, row in enumerate(matrix) if sum(row)
            },
            **more,
        )  # fmt: skip

    def bins(*found: tuple[float, float, int]) -> list[Bin]:
        return [Bin(confidence=confidence, accuracy=accuracy, n=n) for confidence, accuracy, n in found]

    def counted(matrix: list[list[int]]) -> list[list[int]]:
        return [[i, j, n] for i, row in enumerate(matrix) for j, n in enumerate(row) if n]

    def example(kind: str) -> Example:
        truth, other = rng.sample(classes, 2)
        was, now = {"better": (other, truth), "worse": (truth, other), "changed": (other, truth)}[kind]
        n = rng.randrange(1000, 9999)
        texts = (
            Text(
                kind="image", text=f"a photo of a {now}, plain ground, seen from the front, with a diagonal pale stripe"
            ),
            Text(
                kind="group",
                text=f"All four pictures show a {now} with a single diagonal stripe; they differ in colour and outline "
                "only, and none of them is worn by a person. The fabric looks smooth, the background is light, "
                "and the objects fill most of the frame.",
            ),
        )
        return Example(
            image=picture(rng), path=f"incoming/2031-04/{n // 100}/{n}.png", before=was, before_p=rng.uniform(0.3, 0.6),
            after=now, after_p=rng.uniform(0.5, 0.97), truth=None if kind == "changed" else truth,
            texts=texts[: rng.choice([1, 2])],
        )  # fmt: skip

    label_free = LabelFree(
        agreement=0.873, margin_before=0.214, margin_after=0.391, entropy_before=1.482, entropy_after=0.977,
        predicted_before=[sum(column) for column in zip(*before, strict=True)],
        predicted_after=[sum(column) for column in zip(*after, strict=True)],
    )  # fmt: skip
    zero_shots = (right_before - 0.06, right_before, right_before - 0.01)
    adapted = score(
        after, right_after, seeds=[right_after + d for d in (-0.008, 0.0, 0.006)],
        gain=gain, gain_interval=(gain - half, gain + half), permutation_p=0.0301,
        mcnemar=McNemar(p=1e-9, only_adapted=9, only_zero_shot=3), label_free=label_free,
    )  # fmt: skip
    labelled: dict[str, Any] = {
        "confusion": {"zero_shot_centred": counted(before), "latteclip": counted(after)},
        "confused": {"latteclip": [Mistake(truth=0, answer=1, n=12, before=7, keys=["0", "1"])]},
        "slices": [
            SliceScores(by="size", name=f"{name} third", n=333, top1=dict.fromkeys(IDS, 0.5) | {"latteclip": 0.77})
            for name in ("smallest", "largest")
        ],
        "few_labels": FewLabels(
            labels=(1, 2, 4), worth={"latteclip": 4},
            top1={name: [[0.3, 0.34], [0.4, 0.42], [0.5, 0.56]] for name in ("nearest_mean", "linear_probe")},
        ),
        "general": General(
            n=480, classes=36, top1=0.211, interval=(0.2, 0.22),
            methods={"latteclip": Forgotten(top1=0.188, change=-0.023, change_interval=(-0.041, -0.004))},
        ),
    }  # fmt: skip
    scores = Scores(
        domain="made-up-domain",
        n_test=n_test,
        classes=classes,
        centre_share=0.97,
        zero_shot=ZeroShot(
            plain=None, centred=None, top1=None, own="zero_shot_centred", better="zero_shot_centred",
            methods={id: score(before, top1) for id, top1 in zip(ZERO_SHOTS, zero_shots, strict=True) if n_test},
        ),
        methods={"latteclip": adapted if n_test else Score(label_free=label_free)},
        label_free=label_free,
        **labelled if n_test else {},
    )  # fmt: skip

    fingerprints = {
        s: hashlib.sha256(s.encode()).hexdigest() for s in ("shard", "embed", "describe", "tune", "evaluate")
    }
    stages: list[tuple[str, Literal["computed", "cached"], float, float | None]] = [
        ("shard", "cached", 0.4, None), ("embed", "computed", 61.2, 32.7), ("describe", "computed", 214.9, 9.3),
        ("tune", "computed", 38.0, 5263.0), ("evaluate", "computed", 2.1, 476.2),
    ]  # fmt: skip
    report = Report(
        scores=scores,
        n_train=2000,
        model=Component(
            name="embedded", revision="lite0-minilm-1",
            note="Embedded fallback model, not CLIP: numbers are not comparable.",
        ),
        describer=Component(name="tags", note="No LMM: tags written from zero-shot scores."),
        judged=[
            Judged(
                method="latteclip", seed=seed, accepted=seed == 0, reason="neighbours <b>vouch</b> for it", score=0.4,
                estimates={"vouched": 0.4321, "agreement": 0.5},
            )
            for seed in (0, 1)
        ],
        mistaken={
            str(k): Mistaken(image=picture(rng, 48), path=f"test/{k}.png", text=f"mistaken thing {k}") for k in range(2)
        },
        counts=Counts(
            images=3014, quarantined=9, duplicates=5, texts=2503,
            texts_by_kind={"image": 2000, "group": 493, "class": 10},
        ),
        atlas=[
            *(Placed(rng.random(), rng.random(), kind, f"{kind} {i}") for i in range(20) for kind in ("same", "gain")),
            *(Placed(rng.random(), rng.random(), "prototype", f"prototype of {name}", name) for name in classes),
        ],
        examples_better=[example("better") for _ in range(6)] if n_test else [],
        examples_worse=[example("worse") for _ in range(3)] if n_test else [],
        examples_changed=[] if n_test else [example("changed") for _ in range(9)],
        screening=make_screening(classes),
        pairs=make_pairs(),
        quarantine=[
            QuarantineRow(path=f"incoming/2031-04/broken-{i}.jpg", reason=reason, detail=detail)
            for i, (reason, detail) in enumerate(
                [("truncated", "ends after 12,288 of 48,113 bytes")] * 5 + [("not_an_image", "starts with <html>")] * 3
                + [("too_large", "40,000 x 40,000 pixels")]
            )
        ],
        stages=[
            StageRow(
                name=name, status=status, seconds=seconds, images_per_s=speed, fingerprint=fingerprints[name],
                counts={"done": 2000, "cached": 2000 if status == "cached" else 0},
            )
            for name, status, seconds, speed in stages
        ],
        history={
            "loss": [2.1 * math.exp(-e / 9) + 0.6 + rng.uniform(-0.02, 0.02) for e in range(30)],
            "learning rate": [1e-3 * (1 + math.cos(math.pi * e / 30)) / 2 for e in range(30)],
            "pseudo-label agreement": [0.62 + 0.25 * (1 - math.exp(-e / 6)) for e in range(30)],
        },
        lineage={"domain file": fingerprints["shard"], "prompt pack": fingerprints["describe"]},
        versions={"latteflow": "0.1.0", "torch": "2.14.0", "open_clip_torch": "3.3.0", "altair": "6.3.0"},
        seeds=(0, 1, 2),
    )  # fmt: skip
    own = {name: value for name, value in changes.items() if name not in Scores.model_fields}
    return rescored(replace(report, **own), **{name: changes[name] for name in changes.keys() - own.keys()})


def rescored(report: Report, **changes: Any) -> Report:
    """The report with changes in what was evaluated."""
    return replace(report, scores=report.scores.model_copy(update=changes))


def hostile_report(n_test: int = 1000) -> Report:
    """Every text of the report is an attack."""
    report = make_report(n_classes=9, n_test=n_test)
    assert report.screening
    bad = iter(HOSTILE * 100)
    classes = list(HOSTILE)

    def captioned(c: Captioned) -> Captioned:
        captions = [Caption(text=text, weight=0.5, flags=list(HOSTILE)) for text in HOSTILE]
        return replace(c, path=next(bad), label=next(bad), captions=captions)

    def example(e: Example) -> Example:
        texts = [Text(kind=next(bad), text=text) for text in HOSTILE]
        truth = None if e.truth is None else next(bad)
        return replace(e, path=next(bad), before=next(bad), after=next(bad), truth=truth, texts=texts)

    pairs = [Mistake(truth=i, answer=i, n=1, before=1, keys=[str(i)]) for i in range(len(HOSTILE))]
    return replace(
        rescored(
            report, domain=SCRIPT + ATTRIBUTE + RIGHT_TO_LEFT, classes=classes,
            confused={"latteclip": pairs if n_test else []},
            slices=[SliceScores(by=text, name=text, n=9, top1=dict.fromkeys(IDS, 0.5)) for text in HOSTILE if n_test],
        ),
        model=Component(name=SCRIPT, revision=ATTRIBUTE, note=TEMPLATE),
        describer=Component(name=INVISIBLE, note="x" * 10_000),
        mistaken={
            str(i): Mistaken(image=picture(random.Random(0), 48), path=text, text=text)
            for i, text in enumerate(HOSTILE)
        },
        atlas=[Placed(i, -i, kind, text, text) for i, text in enumerate(HOSTILE) for kind in ("same", "prototype")],
        examples_better=[example(e) for e in report.examples_better],
        examples_worse=[example(e) for e in report.examples_worse],
        examples_changed=[example(e) for e in report.examples_changed],
        screening=replace(
            report.screening, shown=[captioned(c) for c in report.screening.shown[:9]],
            flags=[FlagRow(name=text, images=1, groups=1, meaning=text, effect=text) for text in HOSTILE],
        ),
        pairs=Pairs(
            texts=1, kept=1, rules=[RuleRow(name=text, texts=1, meaning=text) for text in HOSTILE],
            shown=[
                Compared(images=(picture(random.Random(0), 48),) * 2, paths=(text, text), text=text, rule=text)
                for text in HOSTILE
            ],
        ),
        counts=replace(report.counts, texts_by_kind={text: 1 for text in HOSTILE}),
        quarantine=[QuarantineRow(path=text, reason=text, detail=text) for text in HOSTILE],
        stages=[
            replace(s, name=SCRIPT, fingerprint=ATTRIBUTE, counts={SCRIPT: 1, INVISIBLE: 2}) for s in report.stages
        ],
        history={text: [1.0, 0.5, math.nan, 0.25] for text in HOSTILE},
        lineage={text: text for text in HOSTILE}, versions={text: text for text in HOSTILE},
    )  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, texts, and whether the tags balance."""

    VOID = frozenset(("meta", "link", "img", "input", "br", "hr"))

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> is given twice: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag in ("td", "th", "dt", "dd", "li", "p", "div", "span", "text"):
            self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inline:
            self.inline[self.open[-1]].append(data)
        else:
            self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.elements if attribute in attrs]

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.elements)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def by_class(report: Report, rows: Sequence[tuple[str, int, float | None, float | None]]) -> Report:
    """The report of classes with so many images, and these accuracies before and after; little else is in it."""
    scores = report.scores

    def of(score: Score, place: int) -> Score:
        per_class = {i: OfClass(n=row[1], top1=top1) for i, row in enumerate(rows) if (top1 := row[place]) is not None}  # type: ignore[misc]
        return score.model_copy(update={"per_class": per_class})

    zero_shots = {id: of(score, 2) for id, score in scores.zero_shot.methods.items()}
    free = {name: [len(rows) - 1 - i for i in range(len(rows))] for name in ("predicted_before", "predicted_after")}
    return rescored(
        replace(report, atlas=[], history={}),
        classes=[row[0] for row in rows],
        methods={id: of(score, 3) for id, score in scores.methods.items()},
        zero_shot=scores.zero_shot.model_copy(update={"methods": zero_shots}),
        label_free=scores.label_free.model_copy(update=free),
        confusion={}, confused={}, few_labels=None,
    )  # fmt: skip


def check_page(html: str) -> Page:
    """The promises that hold for every report."""
    page = Page(html)
    assert page.open == [], "every element is closed"
    ids = page.values("id")
    assert len(ids) == len(set(ids)), "ids are unique"
    references = [i for a in ("aria-labelledby", "for", "data-filter") for v in page.values(a) for i in v.split()]
    references += [v.removeprefix("#") for v in page.values("href") if v.startswith("#")]
    references += re.findall(r"url\(#([^)]+)\)", html)
    assert set(references) <= set(ids), f"dangling references: {set(references) - set(ids)}"
    # nothing is fetched and nothing runs but the one script
    assert all(v.startswith("data:image/") for v in page.values("src"))
    assert all(v.startswith("#") or v == "data:," for v in page.values("href"))
    for attribute in (
        "srcset",
        "action",
        "formaction",
        "style",
        "srcdoc",
        "xlink:href",
        "background",
        "poster",
        "ping",
    ):
        assert page.values(attribute) == []
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    active = {"iframe", "object", "embed", "base", "form", "video", "audio", "foreignobject"}
    assert {tag for tag, _ in page.elements} & active == set()
    assert page.count("script") == page.count("style") == 1
    css, js = "".join(page.inline["style"]), "".join(page.inline["script"])
    assert "url(" not in css and "@import" not in css
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for source in (css, js):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy
    # readable with a screen reader
    assert page.count("main") == page.count("header") == page.count("footer") == page.count("h1") == 1
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")
    assert page.count("table") == page.count("caption")
    for tag, attrs in page.elements:
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or (attrs.get("role") == "img" and attrs.get("aria-labelledby"))
    return page


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render(report)


def test_keeps_every_promise(html: str) -> None:
    page = check_page(html)
    assert html.startswith("<!doctype html>") and 'lang="en"' in html
    assert "http" not in html.replace("http-equiv", ""), "not even a name space is an address"
    assert page.count("figure") >= 4


def test_says_the_numbers(report: Report, html: str) -> None:
    text = check_page(html).text
    scores = report.scores.of
    adapted, baseline = scores["latteclip"], scores["zero_shot_centred"]
    assert adapted.gained is not None
    gain, low, high = adapted.gained
    assert (
        f"LatteCLIP is right on {percent(adapted.top1)} of 1,000 labelled images, {100 * gain:.1f} points more than "
        f"domain-centred zero-shot, the better baseline ({percent(baseline.top1)}); "
        f"the 95% interval of that difference is {points(low)} to {points(high)} points."
    ) in text
    for score in scores.values():
        assert percent(score.top1) in text and percent(score.top5) in text and percent(score.mean_per_class) in text
        assert all(percent(s) in text for s in score.seeds)
    for i, name in enumerate(report.scores.classes):
        was, now = baseline.per_class[i], adapted.per_class[i]
        assert f"{name} n = {now.n}" in text and percent(was.top1) in text and percent(now.top1) in text
    for stage in report.stages:
        assert stage.fingerprint in text and duration(stage.seconds) in text
    for part in ("Embedded fallback model, not CLIP", "No LMM: tags written", "3,014", "truncated (5)", "5 min 17 s"):
        assert part in text
    assert "torch 2.14.0" in text and "seeds 0, 1, 2" in text
    assert text.count("cached 2,000") == 1


@pytest.mark.parametrize(
    ("shift", "interval", "word", "phrase"),
    [
        (0.05, (0.031, 0.069), "It helped.", "5.0 points more"),
        (-0.05, (-0.069, -0.031), "It did not help.", "5.0 points fewer"),
        (0.006, (-0.009, 0.021), "Too close to call.", "−0.9 to +2.1 points, includes zero"),
        (0.006, (0.0, 0.021), "Too close to call.", "includes zero"),
        (0.0, (-0.01, 0.01), "Too close to call.", "the same as"),
    ],
)
def test_headline_is_honest(
    report: Report, shift: float, interval: tuple[float, float], word: str, phrase: str
) -> None:
    found = report.scores.methods["latteclip"]
    methods = {"latteclip": found.model_copy(update={"gain": shift, "gain_interval": interval})}
    text = check_page(render(replace(rescored(report, methods=methods), history={}))).text
    words = {"It helped.", "It did not help.", "Too close to call.", "Accuracy is unknown."}
    assert [w for w in words if w in text] == [word]
    assert phrase in text


def test_the_gate_tells_what_it_thinks() -> None:
    for n_test in (1000, 0):
        html = render(make_report(n_test=n_test))
        text = check_page(html).text
        assert all(part in text for part in ("LatteCLIP, seed 1", "accepted", "refused", "vouched", "0.432"))
        assert "<b>vouch</b>" not in html and "neighbours <b>vouch</b> for it" in text
    assert 'id="judged"' not in render(replace(make_report(), judged=()))


def test_without_labels_no_accuracy_is_claimed() -> None:
    html = render(make_report(n_test=0))
    text = check_page(html).text
    assert "Accuracy is unknown." in text and "nobody can say here whether adaptation helped" in text
    assert "It changed the answer for 12.7% of 500 images" in text
    for statistic in ("0.214", "0.391", "1.482", "0.977", "87.3%"):
        assert statistic in text
    for absent in ('id="methods"', 'id="classes"', 'id="confusion"', "is right on", 'class="mark'):
        assert absent not in html
    assert text.count("incoming/2031-04/") >= 9 and "Changed most" in text


def test_collapsed_predictions_are_told() -> None:
    report = make_report(n_test=0)
    collapsed = report.scores.label_free.model_copy(update={"predicted_after": [500, *[0] * 9]})
    text = Page(render(rescored(report, label_free=collapsed))).text
    assert "classes that are never predicted went from 0 to 9" in text


@pytest.mark.parametrize("n_test", [1000, 0])
def test_hostile_texts_are_only_text(n_test: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latteflow.tasks.report.page.label", lambda id: f"{id} {ATTRIBUTE}")  # a method of a package
    html = render(hostile_report(n_test))
    page = check_page(html)
    html.encode()
    for hidden in "\u202e\u200b\u2066\u2069\ufeff\x00\x1b\ud800\u2028":
        assert hidden not in html
    assert SCRIPT in page.text and "{{ 7 * 191 }}" in page.text and "1337" not in page.text
    assert "holiday[U+202E]gpj.exe" in page.text and "pass[U+200B]word" in page.text
    assert "long" * 500 in html and "long" * 510 not in html, "a long text is clipped for good at 2,000 characters"
    assert "8,000 more characters are in the store." in page.text
    assert "\u0301" * 7 not in html
    assert len(html.encode()) < 500_000


def test_hostile_names_in_a_chart() -> None:
    names = [f"{i}{text}" for i, text in enumerate([*HOSTILE, "\uffff", "]]>", "&#0;"] * 3)]
    rows = [(name, 9, i / 40, 0.5) for i, name in enumerate(names)]
    html = render(replace(by_class(make_report(), rows), history={name: [1.0] for name in names}))
    check_page(html)
    chart = html[html.index('<svg class="chart"') : html.index("</svg>", html.index('<svg class="chart"'))]
    assert "&lt;script" in chart and "<script" not in chart


def test_long_texts_open_and_short_ones_do_not(report: Report) -> None:
    texts = [Text(kind="image", text="short"), Text(kind="group", text="one two " * 60)]
    examples = [replace(report.examples_better[0], texts=texts)]
    html = render(replace(report, examples_better=examples, examples_worse=[], history={}))
    assert html.count('<details class="text">') == 1
    assert '<p class="text"><bdi>short</bdi></p>' in html
    assert "one two " * 60 in html.replace("</bdi>", " ")


@pytest.mark.parametrize("n_classes", [2, 3, 24, 25, 30, 31, 100, 300])
def test_few_and_many_classes(n_classes: int) -> None:
    report = make_report(n_classes, 1200, history={})
    html = render(report)
    page = check_page(html)
    assert all(percent(each.top1) in page.text for each in report.scores.methods["latteclip"].per_class.values())
    for name in report.scores.classes:
        assert name in page.text
    assert ('class="heat"' in html) == (n_classes > 12) and ('class="matrix' in html) == (n_classes <= 30)
    assert ("Top-5" in page.text) == (n_classes > 5)
    assert html.count("data-filter=") == (2 if n_classes > 24 else 0)
    assert ('id="scatter-title"' in html) == (n_classes > 24)
    assert len(html.encode()) < 1_000_000


def test_classes_are_sorted_by_change_and_unmeasured_ones_come_last(report: Report) -> None:
    rows = [
        ("steady", 9, 0.5, 0.5),
        ("unseen", 0, None, None),
        ("worse", 9, 0.9, 0.2),
        ("better", 9, 0.1, 0.4),
    ]
    text = Page(render(by_class(report, rows))).text
    section = text[text.index("Class by class") : text.index("What is mistaken")]
    names = ["better n = 9", "steady n = 9", "worse n = 9", "unseen n = 0"]
    assert sorted(names, key=section.index) == names
    assert "+30.0" in section and "−70.0" in section and "unseen n = 0 – – –" in " ".join(section.split())


def test_many_classes_without_a_test_image(report: Report) -> None:
    text = check_page(render(by_class(report, [(f"class {i}", 0, None, None) for i in range(40)]))).text
    assert "No class changed." in text and "Accuracy of 0 classes" in text


def test_confusion_matrix_counts_and_shades(report: Report) -> None:
    counts = {"zero_shot_centred": [[0, 0, 60], [0, 1, 40]], "latteclip": [[0, 0, 97], [0, 1, 3]]}
    html = render(replace(rescored(report, confusion=counts, confused={}), history={}))
    for cell in ('"good-9">97', '"bad-1">3', '"good-7">60', '"bad-6">40', '"good-8">+37', '"good-8">−37'):
        assert f"<td class={cell}</td>" in html
    assert Page(html).text.count("t-shirt → trousers") == 1


def test_what_labels_say_beyond_accuracy_is_there(report: Report) -> None:
    html = render(report)
    text = check_page(html).text
    assert "p 0.030 by permutation, < 0.001 by McNemar" in text
    for id, score in report.scores.of.items():
        assert f"{label(id)} {percent(score.top1)} 90.0% " in text and percent(score.macro_f1) in text
    assert html.count('id="reliability-') == 8, "title and description of a diagram of each method"
    assert "t-shirt → trousers 12 images, 7 before mistaken thing 0 mistaken thing 1" in text
    assert "size largest third 333 50.0% 50.0% 50.0% 77.0%+27.0" in text
    assert (
        "It takes 4 labelled images of each class to reach LatteCLIP; 2 are not enough." in text
        and "32.0% 41.0% 53.0%" in text
    )
    assert html.count("<title>gain") == 20 and "<title>prototype of dress</title>" in html
    assert "data-choose" not in html.split("<script>")[0], "nothing to choose from"


def two_methods(report: Report) -> Report:
    """The same of a second method."""
    scores = report.scores
    twice = {
        name: {**getattr(scores, name), "clamp": getattr(scores, name)["latteclip"]}
        for name in ("methods", "confusion", "confused")
    }
    return replace(rescored(report, **twice, slices=[], general=None), history={})


def test_every_method_has_its_details(report: Report) -> None:
    html = render(two_methods(report))
    page = check_page(html)
    assert page.values("data-method") == ["0", "1", "0", "1"] and page.count("select") == 6
    assert page.text.count("CLAMP Accuracy by class") == 1 and html.count('id="1-matrix-after"') == 1


def test_the_card_says_what_is_known_and_what_is_not(report: Report) -> None:
    text = check_page(render(replace(report, history={}))).text
    worst, found = min(report.scores.methods["latteclip"].per_class.items(), key=lambda item: item[1].top1)
    assert (
        f"Weakest on {report.scores.classes[worst]} ({percent(found.top1, 0)})" in text
        and "confidence is 90.0% on average" in text
    )
    assert (
        "Nothing about its accuracy: there are no labels." in check_page(render(make_report(n_test=0, history={}))).text
    )


def test_tokens_and_their_cost_are_told(report: Report) -> None:
    stages = [
        replace(s, tokens=(120_000, 4_500), cost="0.31 USD") if s.name == "describe" else s for s in report.stages
    ]
    text = check_page(render(replace(report, stages=stages, history={}))).text
    assert text.count("tokens of its texts: 120,000 of prompts, 4,500 of answers, 0.31 USD") == 1


def test_p_values_read_as_such() -> None:
    assert [p_value(p) for p in (None, 0.04567, 1.0, 0.0001)] == ["–", "0.046", "1.000", "< 0.001"]


def test_same_report_same_bytes(html: str) -> None:
    render(make_report(40, 400))
    assert render(make_report()) == html


def test_charts_are_static_pictures_with_a_text_alternative(html: str) -> None:
    start = r'<svg class="chart" role="img" aria-labelledby="curve-\d-title curve-\d-desc"'
    charts = re.findall(start + ".*?</svg>", html, re.S)
    assert len(charts) == 3
    assert "<title" in charts[0] and "Line chart. It goes from" in charts[0] and ">epoch</text>" in charts[0]
    assert 'class="stroke-accent"' in charts[0] and not re.search(r"#0000\d\d", html), "colours come from the theme"
    assert html.count("Training history per epoch") == 1


def test_a_loss_that_is_not_a_number_leaves_a_gap(report: Report) -> None:
    text = check_page(render(replace(report, history={"loss": [1.0, math.nan, 0.5], "late": [1.0]}))).text
    assert "2 – –" in text and "3 0.5000 –" in text


def test_small_and_fast_enough() -> None:
    start = time.process_time()
    examples = [*make_report().examples_better] * 2
    report = make_report(100, 1000, examples_better=examples, examples_worse=examples)
    html = render(report)
    assert html.count('class="photo"') == 24
    assert len(html.encode()) < 1_000_000
    assert time.process_time() - start < 20, "about 2 s"


def test_nothing_but_the_necessary() -> None:
    bare = make_report(
        2,
        10,
        quarantine=[],
        screening=None,
        pairs=None,
        stages=[],
        history={},
        lineage={},
        versions={},
        seeds=(),
        slices=[],
        few_labels=None,
        atlas=[],
    )
    bare = replace(bare, examples_better=[], examples_worse=[], counts=Counts(images=10))
    bare = rescored(bare, confusion={}, confused={}, general=None)
    page = check_page(render(bare))
    assert "Every image could be read." in page.text and page.count("img") == 0


def test_texts_are_counted_by_flag_and_shown_beside_their_images(html: str) -> None:
    page = check_page(html)
    text = page.text
    assert "2,493 texts were screened. 10 were dropped; 1 more would have been" in text
    assert (
        "refusal the model declines dropped 8 2" in text
        and "cut stopped at the longest output weight × 0.8 3 0" in text
    )
    assert "Shown are 10 of 10 images and groups with a dropped text, and 20 of 2,483 others" in text
    assert text.count("I'm sorry, but I can't help with that.") == 10 and "0.31 own, 0.12 others" in text
    cards = [attrs for _, attrs in page.elements if "data-state" in attrs]
    assert sum(attrs["data-state"] == "dropped" for attrs in cards) == 10 and len(cards) == 30
    assert {attrs["data-flags"] for attrs in cards} == {"", "0", "1", "0 1"}


def test_no_text_becomes_an_attribute_that_scripts_read() -> None:
    page = check_page(render(hostile_report()))
    for name in ("data-flags", "data-label", "data-state", "data-by", "value"):
        assert all(re.fullmatch(r"[a-z0-9 ]*", value) for value in page.values(name)), name
    assert f"{SCRIPT}, " not in page.text and SCRIPT in page.text


def test_a_page_of_texts_without_a_flag(report: Report) -> None:
    assert report.screening
    shown = [c for c in report.screening.shown if not c.is_dropped and not c.captions[0].flags]
    calm = replace(report.screening, dropped=0, kept_by_floor=0, flags=[], with_dropped=0, shown=shown)
    text = check_page(render(replace(report, screening=calm, history={}))).text
    assert "None was dropped." in text and "No text was flagged." in text
    assert 'id="texts"' not in render(replace(report, screening=None, history={}))


def test_the_wait_of_the_engine_is_told_where_it_is_known(report: Report) -> None:
    stages = [replace(s, engine_wait=0.27) if s.name == "describe" else s for s in report.stages]
    assert "engine waiting for images" not in render(report)
    text = check_page(render(replace(report, stages=stages, history={}))).text
    assert text.count("engine waiting for images 27% of the time") == 1


def test_many_quarantined_files_are_counted_not_listed(report: Report) -> None:
    rows = [QuarantineRow(path=f"bad/{i:04}.jpg", reason="truncated") for i in range(500)]
    text = Page(render(replace(report, quarantine=rows, history={}))).text
    assert "truncated (500)" in text and "The first 40 of 500 files" in text
    assert "bad/0039.jpg" in text and "bad/0040.jpg" not in text


def test_only_pictures_are_shown(report: Report) -> None:
    gif = BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    for data, problem in ((b"<svg onload='x()'/>", "not a picture"), (gif.getvalue(), "is GIF")):
        example = replace(report.examples_better[0], image=data, path="incoming/odd")
        with pytest.raises(ValueError, match=f"'incoming/odd'.*{problem}"):
            render(replace(report, examples_better=[example], history={}))
    jpeg = BytesIO()
    Image.new("RGB", (28, 20)).save(jpeg, "JPEG")
    example = replace(report.examples_better[0], image=jpeg.getvalue())
    html = render(replace(report, examples_better=[example], history={}))
    assert 'class="tiny" width="28" height="20" src="data:image/jpeg;base64,' in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("a\u202eb", "a[U+202E]b"),
        ("a\u200db", "a[U+200D]b"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🔬 ❤\ufe0f", "👩\u200d🔬 ❤\ufe0f"),
        ("line\nline\ttab", "line\nline\ttab"),
        ("\x07\x9b\ud83d", "[U+0007][U+009B][U+D83D]"),
        ("\U000e0041", "[U+E0041]"),
        ("\uffff\U0001fffe", "[U+FFFF][U+1FFFE]"),
        ("cafe\u0301 ก็ำ नि", "cafe\u0301 ก็ำ नि"),
        ("a" + "\u0336" * 50, "a" + "\u0336" * 6),
        ("שלום world", "שלום world"),
    ],
)
def test_clean_shows_what_hides_and_keeps_what_scripts_need(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_clipping() -> None:
    assert clean("x" * 10, 4) == "xxxx…" and clean("x" * 4, 4) == "xxxx"
    assert plain(" a \n b ") == "a b" and plain("  ") == "(empty)"
    assert len(plain("\u200b" * 100, 20)) == 21


def test_numbers_read_as_numbers() -> None:
    assert [percent(v) for v in (0.6599, 0, 1, None, math.nan)] == ["66.0%", "0.0%", "100.0%", "–", "–"]
    assert [points(v) for v in (0.048, -0.003, 0.0, -0.0001, None)] == ["+4.8", "−0.3", "0.0", "0.0", "–"]
    lengths = [duration(s) for s in (0.04, 9.99, 59.6, 200, 7500)]
    assert lengths == ["0.0 s", "10.0 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0.61, 0.68], [0.6, 0.62, 0.64, 0.66, 0.68]),
        ([0.5, 0.5], [0.494, 0.496, 0.498, 0.5, 0.502, 0.504, 0.506]),
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_axis_is_round_and_holds_its_values(values: list[float], ticks: list[float]) -> None:
    axis = make_axis(values)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.at(axis.lo) == "0.00%" and axis.at(axis.hi) == axis.at(axis.hi + 1) == "100.00%"
    assert all(axis.lo - 1e-9 <= v <= axis.hi + 1e-9 for v in values)
