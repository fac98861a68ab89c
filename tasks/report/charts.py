"""Charts: Altair, drawn to SVG while the page is built. Colours stand for CSS classes, so they follow the theme."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from latteflow.tasks.report.html import plain
from latteflow.tasks.report.scores import Bin

INK, MUTED, LINE, ACCENT, LOSS = "#000001", "#000002", "#000003", "#000004", "#000005"
CSS_COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", LOSS: "loss"}


@dataclass(frozen=True)
class Placed:
    """A mark of the map.

    ``kind`` is prototype, gain (wrong before, right after), loss, or same; ``told`` shows when it is pointed at.
    """

    x: float
    y: float
    kind: str
    told: str
    name: str = ""


def curve(name: str, values: Sequence[float], id: str) -> Markup:
    """A value over the epochs."""
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


def scatter(rows: Sequence[tuple[str, float, float]], id: str = "scatter") -> Markup:
    """Accuracy of each class, ``(name, before, after)``, one mark each."""
    import altair as alt

    known = sorted(rows, key=lambda row: (row[1] - row[2], row[0]))
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
        layers.properties(width=330, height=330), id, f"Accuracy of {len(data)} classes before and after",
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


def reliability(as_is: Sequence[Bin], matched: Sequence[Bin], id: str) -> Markup:
    """Accuracy of answers by their confidence, before and after a temperature."""
    import altair as alt

    axis = alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    scale = alt.Scale(domain=[0, 1])
    x = alt.X("confidence:Q", title="confidence", scale=scale, axis=axis)
    y = alt.Y("accuracy:Q", title="share that is right", scale=scale, axis=axis)
    layers = alt.layer(
        alt.Chart(alt.Data(values=[{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]))
        .mark_line(color=MUTED, strokeDash=[4, 4], strokeWidth=1)
        .encode(x=x, y=y)
    )
    most = max(each.n for each in [*as_is, *matched])
    for points, colour, shape in ((as_is, LOSS, "square"), (matched, ACCENT, "circle")):
        data = [{"confidence": each.confidence, "accuracy": each.accuracy, "n": each.n} for each in points]
        chart = alt.Chart(alt.Data(values=data)).encode(x=x, y=y)
        size = alt.Size("n:Q", legend=None, scale=alt.Scale(domain=[0, most], range=[20, 260]))
        layers += chart.mark_line(color=colour, strokeWidth=2)
        layers += chart.mark_point(color=colour, filled=True, opacity=0.85, shape=shape).encode(size=size)
    return _svg(
        layers.properties(width=300, height=300), id, "Accuracy of answers by their confidence",
        "Reliability diagram. On the dashed diagonal, answers are right as often as they are sure; below it, they are "
        "too sure. The numbers are in the table beside it.",
    )  # fmt: skip


def learning(
    labels: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]], levels: Sequence[tuple[str, float, bool]]
) -> Markup:
    """Accuracy by labelled images of each class, and levels ``(name, top1, is_adapted)`` reached without."""
    import altair as alt

    x = alt.X("k:Q", title="labelled images of each class", scale=alt.Scale(type="log", base=2, nice=False),
              axis=alt.Axis(values=list(labels), format="d"))  # fmt: skip
    y = alt.Y("top1:Q", title="top-1", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(format="%", tickCount=5))
    layers = alt.layer()
    for (name, draws), shape in zip(curves.items(), ("circle", "square"), strict=True):
        rows = [
            {"k": k, "top1": sum(each) / len(each), "low": min(each), "high": max(each),
             "name": name if k == labels[-1] else ""}
            for k, each in zip(labels, draws, strict=True)
        ]  # fmt: skip
        chart = alt.Chart(alt.Data(values=rows)).encode(x=x)
        layers += chart.mark_rule(color=MUTED, strokeWidth=4, opacity=0.4).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
        layers += chart.mark_line(color=MUTED, strokeWidth=2).encode(y=y)
        layers += chart.mark_point(color=MUTED, filled=True, size=40, opacity=1, shape=shape).encode(y=y)
        layers += chart.mark_text(color=MUTED, align="right", dy=-12, fontSize=11).encode(y=y, text="name:N")
    for name, top1, is_adapted in levels:
        line = alt.Chart(alt.Data(values=[{"top1": top1, "name": plain(name, 30), "k": labels[0]}])).encode(y=y)
        colour = ACCENT if is_adapted else LOSS
        layers += line.mark_rule(color=colour, strokeDash=[5, 4], strokeWidth=1.5)
        layers += line.mark_text(color=INK, align="left", dx=4, dy=-7, fontSize=11).encode(x=x, text="name:N")
    return _svg(
        layers.properties(width=520, height=280), "few-labels-chart", "What labels would bring",
        "Line chart of accuracy by labelled images of each class, with lines at what was reached without labels. "
        "The values are in the table.",
    )  # fmt: skip


def atlas(points: Sequence[Placed]) -> Markup:
    """A map of images and prototypes; what a mark is shows when the pointer rests on it."""
    import altair as alt

    kinds = {"same": MUTED, "gain": ACCENT, "loss": LOSS, "prototype": INK}
    shapes = ["circle", "triangle-up", "triangle-down", "cross"]
    data = [{"x": p.x, "y": p.y, "kind": p.kind, "told": plain(p.told, 160), "name": plain(p.name, 22)} for p in points]
    bare = alt.Axis(labels=False, ticks=False, grid=False, domain=False)
    chart = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("x:Q", title=None, axis=bare, scale=alt.Scale(zero=False, padding=24)),
        y=alt.Y("y:Q", title=None, axis=bare, scale=alt.Scale(zero=False, padding=24)),
        color=alt.Color("kind:N", legend=None, scale=alt.Scale(domain=list(kinds), range=list(kinds.values()))),
        shape=alt.Shape("kind:N", legend=None, scale=alt.Scale(domain=list(kinds), range=shapes)),
        description=alt.Description("told:N"),
    )
    n = sum(point.kind != "prototype" for point in points)
    size = min(max(26, 8_000 / max(n, 1)), 130)  # few marks are larger
    images = chart.transform_filter("datum.kind != 'prototype'").mark_point(filled=True, size=size, opacity=0.65)
    marks = chart.transform_filter("datum.kind == 'prototype'").mark_point(filled=True, size=size + 64, opacity=1)
    names = chart.transform_filter("datum.kind == 'prototype'").mark_text(fontSize=11, dy=-13).encode(text="name:N")
    return _svg(
        (images + marks + names).properties(width=720, height=560), "map", f"Map of {n} images and the prototypes",
        "Scatter plot: what the model finds alike lies close together. Each mark says what it is when pointed at.",
        hover=True,
    )  # fmt: skip


def _svg(chart: Any, id: str, title: str, description: str, *, hover: bool = False) -> Markup:
    """The chart as inline SVG: theme colours as classes, a title and a description.

    Args:
        hover: marks say their description when pointed at.

    Marks must not be clipped: the converter numbers clip paths over the life of the process, so the bytes would differ.
    """
    from xml.etree import ElementTree

    import vl_convert

    styled = chart.configure(aria=hover, font="sans-serif", padding=4).configure_view(stroke=None)
    styled = styled.configure_axis(
        labelColor=MUTED, titleColor=MUTED, gridColor=LINE, domainColor=LINE, tickColor=LINE,
        labelFontSize=11, titleFontSize=11, titleFontWeight="normal", titlePadding=8, tickSize=4,
    )  # fmt: skip
    spec = styled.to_dict(validate=False)  # half of the time of a page; the converter refuses what it cannot draw
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg({**spec, "background": None}))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        told = element.attrib.pop("aria-label", "")
        if element.attrib.pop("aria-roledescription", "") == "point" and told:
            tip = ElementTree.SubElement(element, "title")
            tip.text = told
        for attribute in ("font-family", "pointer-events", "aria-hidden", "role", "style"):
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
