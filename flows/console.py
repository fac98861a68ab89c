"""What the commands print. Names and texts come from outside: nothing in them is markup or reaches the terminal raw."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from latteflow.tasks.core.progress import Step, duration, watch

if TYPE_CHECKING:
    from latteflow.flows.begin import Begun
    from latteflow.flows.doctor import Check
    from latteflow.flows.plan import Planned
    from latteflow.storage.artifacts import Artifact
    from latteflow.storage.upkeep import Loose
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import StageResult
    from latteflow.tasks.report.compare import Comparison
    from latteflow.tasks.report.history import History
    from latteflow.tasks.report.lineage import Guess, Lineage
    from latteflow.tasks.report.scores import General, Scores
    from latteflow.tasks.ship.nights import Night
    from latteflow.tasks.ship.promote import Champion

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
_TOLD_AT_ZERO = frozenset({"accepted", "images", "kept", "labelled", "texts"})
"""Counts that say most where there is none; the others, of what went wrong, are left out then."""
_PIPE = 160
"""Columns of a table that nobody's window bounds."""
console = Console(width=None if sys.stdout.isatty() else _PIPE, **_PLAIN)
failures = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE, **_PLAIN)


def progress() -> Progress:
    """A bar on standard error that goes when it is done; nothing at all where that is no terminal."""
    return Progress(console=failures, transient=True, disable=not failures.is_terminal)


class Bar:
    """How far a stage is, on standard error, as long as it is under way."""

    every_s = 0.5

    def __init__(self) -> None:
        self._shown: Progress | None = None

    def show(self, step: Step) -> None:
        if self._shown is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[of]}"))
            self._shown = Progress(*columns, console=failures, transient=True)
            self._shown.add_task("", of="")
            self._shown.start()
        left = "" if step.left_s is None else f", {duration(step.left_s)} left"
        of = f"{step.done} of {step.total} {step.unit}{left}"
        self._shown.update(TaskID(0), description=step.label, completed=step.done, total=step.total, of=of)

    def end(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = None


def printable(text: str, keep: str = "") -> str:
    """A text whose control, direction and surrogate characters are written as escapes."""
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def typed(path: Path) -> str:
    """A path as it is typed into a shell."""
    return printable(shlex.quote(str(path)))


def log_to_terminal() -> None:
    """Our own progress, and everybody's warnings, on standard error: a bar at a terminal, else a line a minute."""

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record), keep="\n")

    handler = RichHandler(console=failures, show_path=False)
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("latteflow").setLevel(logging.INFO)
    if failures.is_terminal:
        watch(Bar())


def fail(message: str) -> None:
    """A mistake of the user's or the world's, in one message."""
    failures.print(f"error: {printable(message, keep=chr(10))}", style="red")


def document(value: Mapping[str, Any]) -> str:
    """One for programs: JSON that any terminal and pipe can carry."""
    return json.dumps(value, indent=2, allow_nan=False)


def begun(found: Begun) -> Table:
    """What `init` wrote and why, and what to do next."""
    table = _pairs()
    file = typed(found.file)
    named = f"{len(found.classes)} classes" if found.classes else "no classes yet"
    table.add_row("domain", f"{file}: {found.images}, {named}")
    if found.labels:
        labels = printable(str(found.labels_file))
        table.add_row("labels", f"{labels}: by sub-folders, of {len(found.labels):,} images, for `evaluate` alone")
    for what, choice in {"model": found.model, "resize": found.resize, "describer": found.describer}.items():
        table.add_row(what, printable(f"{choice.line}: {choice.why}"))
    if found.schema_is_old:
        table.add_row("schema", "latteflow.schema.json is of another version; `latteflow schema` prints this one's")
    first = "" if found.classes else f"name the classes in {file}, then "
    table.add_row("next", f"{first}latteflow plan {file}")
    return table


def checks(found: Sequence[Check]) -> Table:
    """What `doctor` looked at, found, and advises."""
    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    table = _pairs()
    table.add_column(overflow="fold")
    for each in found:
        said = f"{each.found}; {each.advice}" if each.advice else each.found
        table.add_row(each.name, Text(each.state, colours[each.state]), printable(said))
    return table


def results(found: Iterable[StageResult]) -> Table:
    """What became of each stage of a run."""
    table = _table("stage", "", "seconds>", "artifact", "counts")
    for each in found:
        state = Text("cached", "green") if each.cached else "done"
        table.add_row(each.label, state, f"{each.seconds:.1f}", each.ref.fingerprint[:12], _counts(each.counts))
    return table


def scores(found: Scores) -> Table | str:
    """The accuracies of a run; what can be said without labels, if there are none."""
    if not found.n_test:
        changed = {name: 1 - score.label_free.agreement for name, score in found.methods.items() if score.label_free}
        told = ", ".join(f"{share:.1%} by {name}" for name, share in changed.items())
        return f"no labels: images that changed class: {told}; accuracy is unknown"
    n, seen = found.n_test, found.n_seen
    where = f"on {n} images adapted to" if seen == n else f"on {n} test images, {seen} adapted to" if seen else ""
    table = _table(where or f"on {n} test images", "top-1>", "95 % interval>", "gain over the better zero-shot>")
    for name, score in found.of.items():
        low, high = score.interval or (math.nan, math.nan)
        gain = _change(*score.gained) if score.gained else ""
        top1 = f"{100 * (score.top1 or 0.0):.1f}"
        table.add_row(name.replace("_", " "), top1, f"{100 * low:.1f} - {100 * high:.1f}", gain)
    return table


def forgotten(general: General) -> Table:
    """What became of the accuracy on images of another kind."""
    table = _table(f"on {general.n} general images", "top-1>", "change>")
    table.add_row("zero shot", f"{100 * general.top1:.1f}", "")
    for name, own in general.methods.items():
        table.add_row(name.replace("_", " "), f"{100 * own.top1:.1f}", _change(own.change, *own.change_interval))
    return table


def _change(change: float, low: float, high: float) -> str:
    return f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def plan(planned: Sequence[Planned]) -> Table:
    """What a run would do, and why."""
    table = _table("stage", "", "to make>", "time>", "why")
    for each in planned:
        if not each.reasons:
            table.add_row(each.label, Text("cached", "green"), "", "", "")
            continue
        unit = each.unit.removesuffix("s") if each.work == 1 else each.unit
        work = f"{'up to ' if each.at_most else ''}{each.work} {unit}"
        table.add_row(
            each.label,
            Text("will run", "yellow"),
            work,
            duration(each.seconds),
            Text("\n".join(map(printable, each.reasons))),
        )
    return table


def totals(domain: Domain, planned: Sequence[Planned]) -> str:
    """Images, texts, tokens, time and cost of a plan in a few lines."""
    from latteflow.models.settings import LanguageModelSettings

    lines = []
    for each in planned:
        if each.label.startswith("shard "):
            split, images = each.label.removeprefix("shard "), each.images
            lines.append(f"{split} images: {images.new} new, {images.kept} kept, {images.removed} removed")
    running = [each for each in planned if each.reasons]
    if not running:
        return "\n".join([*lines, "nothing to do"])
    texts = [each for each in running if each.unit == "texts"]
    bound = "up to " if any(each.at_most for each in texts) else ""
    lines.append(f"texts to write: {bound}{sum(each.work for each in texts)}, tokens: {_tokens(texts)}")
    unknown = [each.label for each in running if each.seconds is None]
    seconds = sum(each.seconds or 0.0 for each in running)
    without = f", not counting {', '.join(unknown)} (never timed)" if unknown else ""
    lines.append("time: unknown" if len(unknown) == len(running) else f"time: about {duration(seconds)}{without}")
    models = [each for each in (domain.describer, domain.pairs.describer) if isinstance(each, LanguageModelSettings)]
    if models and any(each.work for each in texts):
        lines.append(_cost(domain, planned, texts))
    return "\n".join(lines)


def champions(found: Sequence[Champion]) -> Table:
    """The models that a domain served, newest first."""
    table = _table("version>", "since", "model", "method", "seed>", "score>", "why")
    for each in reversed(found):
        seed = "" if each.seed is None else str(each.seed)
        model = f"tune {each.tuned.fingerprint[:12]}"
        table.add_row(str(each.version), each.at, model, each.method, seed, f"{each.score:+.3f}", Text(each.reason))
    return table


def nights(found: Sequence[Night]) -> Table:
    """What nights came to, newest first."""
    table = _table("night (UTC)", "ended as", "took>", "images>", "new>", "gone>", "set aside>", "champion>", "why")
    for each in reversed(found):
        counts = (each.images, each.new, each.removed, each.quarantined, each.champion)
        at, words = each.at[:16].replace("T", " "), Text(printable(each.why))
        table.add_row(at, each.state, duration(each.seconds), *map(str, counts), words)
    return table


def _tokens(texts: Sequence[Planned]) -> str:
    if any(each.tokens is None for each in texts):
        return "unknown; `latteflow preview` measures them on some images"
    prompt, output = (sum(each.tokens[place] for each in texts if each.tokens) for place in (0, 1))
    return f"about {prompt:,} in prompts and {output:,} in answers" if prompt + output else "none"


def _cost(domain: Domain, planned: Sequence[Planned], texts: Sequence[Planned]) -> str:
    from latteflow.flows.plan import cost

    timed = all(each.seconds is not None for each in texts)
    hours = f"{sum(each.seconds or 0 for each in texts) / 3600:.2g}" if timed else "unknown"
    found = cost(domain, planned)
    if found is None:
        return f"engine: {hours} hours; cost: unknown, see `prices` in docs/describers.md"
    images = max(each.images.new + each.images.kept for each in texts)
    each_thousand = f" ({1000 * found / images:.3g} for 1,000 images)" if images else ""
    return f"engine: {hours} hours; cost: about {found:.3g} {printable(domain.prices.currency)}{each_thousand}"


def ranking(sentence: str, paths: Sequence[str], values: Sequence[float], count: int) -> Table:
    """Both ends of an order."""
    table = _table("place>", "value>", printable(sentence))
    n = len(paths)
    shown = [*range(n)] if n <= 2 * count else [*range(count), *range(n - count, n)]
    for place in shown:
        if place and place - 1 not in shown:
            table.add_row("...", "", "")
        table.add_row(str(place + 1), f"{values[place]:+.3f}", printable(paths[place]))
    return table


def comparison(found: Comparison) -> Table:
    """Two runs on the images that both have."""
    table = _table(f"on {found.labelled} labelled of {found.n} shared images", "A>", "B>", "B minus A>")
    table.add_row("method", found.one.method, found.other.method, "")
    if found.top1 and (own := found.gain):
        gain = _change(own.gain, *own.gain_interval)
        table.add_row("top-1", *(f"{100 * each:.1f}" for each in found.top1), gain)
        table.add_row("p, permutation test", "", "", f"{own.permutation_p:.4f}")
        table.add_row("p, McNemar, first seeds", "", "", f"{own.mcnemar.p:.4f}")
    table.add_row("same answer", "", "", f"{found.agreement:.1%}")
    table.add_row("settings that differ", "", "", str(len(found.settings)))
    return table


def artifacts(history: History) -> Table:
    """All artifacts of a domain, those of the newest run marked."""
    from latteflow.tasks.report.lineage import newest_artifacts

    current = {artifact.fingerprint for artifact in newest_artifacts(history).values()}
    table = _table("stage", "artifact", "", "made", "size>", "counts")
    for stage in history.inventory.stages:
        for made in history.inventory.made(stage):
            each = made.artifact
            mark = Text("current", "green") if each.fingerprint in current else ""
            table.add_row(
                history.label(each), each.fingerprint[:12], mark, moment(made.modified),
                size(sum(file.bytes for _, file in each.files.values())), _counts(each.counts),
            )  # fmt: skip
    return table


def artifact(history: History, found: Artifact) -> Table:
    """What an artifact was made from, in words."""
    table = _pairs()
    table.add_row("artifact", f"{history.label(found)} {found.fingerprint}")
    made = next(each for each in history.inventory.made(found.stage) if each.artifact.fingerprint == found.fingerprint)
    table.add_row("made", f"{moment(made.modified)}, by version {found.manifest['version']} of the stage")
    table.add_row("counts", _counts(found.counts))
    table.add_row("made from", "")
    for name, value in sorted(_flat(history.in_words(found.inputs))):
        table.add_row(f"  {printable(name)}", printable(value))
    table.add_row("files", "")
    for kind, (number, total) in sorted(_files(found).items()):
        table.add_row(f"  {printable(kind)}", f"{number}, {size(total)}")
    table.add_row("libraries", ", ".join(f"{name} {version}" for name, version in found.manifest["versions"].items()))
    return table


def difference(history: History, old: Artifact, new: Artifact) -> str:
    """Why two artifacts of a stage are not the same, in words."""
    names = [f"{history.label(each)} {each.fingerprint[:12]}" for each in (old, new)]
    lines = history.difference(old.inputs, new.inputs)
    versions = [each.manifest["version"] for each in (old, new)]
    if versions[0] != versions[1]:
        lines.insert(0, f"code of the stage: version {versions[0]} -> {versions[1]}")
    same = "their content is the same" if old.ref.digest == new.ref.digest else "their content differs"
    return "\n".join([f"{names[0]} -> {names[1]}; {same}", *(f"  {printable(line)}" for line in lines)])


def lineage(found: Lineage) -> Table:
    """An image, followed through a run."""
    table = _pairs()
    table.add_row("image", printable(found.path))
    table.add_row("content", f"sha256 {found.sha256}")
    if found.refused:
        table.add_row("quarantined", printable(found.refused))
        return table
    table.add_row("key", found.key + (" (no longer in the source)" if found.removed else ""))
    table.add_row(
        "shard",
        _from(
            found,
            f"{found.shard} of {found.split}, {found.width} x {found.height}, {size(found.bytes)}",
            f"shard {found.split}",
        ),
    )
    if found.duplicate_of:
        table.add_row("duplicate of", found.duplicate_of)
    table.add_row("pseudo-label", _from(found, _guesses(found.pseudo_labels), f"embed {found.split}"))
    for said in found.texts:
        weight = [f"weight {said.weight:.2g}"] if said.weight is not None and said.weight < 1 else []
        notes = f" [{', '.join([*said.flags, *weight])}]" if said.flags or weight else ""
        text = f"{printable(said.text + notes)}, by {printable(said.by)}"
        table.add_row(f"text, {said.kind}", _from(found, text, "describe" if said.kind == "image" else "group"))
    if "tune" in found.artifacts:
        table.add_row("model", f"tune {found.artifacts['tune'][:12]}")
    for guess in found.predictions:
        table.add_row("prediction", _from(found, f"{_guesses([guess])} by {guess.by.replace('_', ' ')}", "evaluate"))
    if not found.predictions and "evaluate" in found.artifacts:
        table.add_row("prediction", "none: only the images of `evaluation: source` were evaluated")
    if found.truth is not None:
        table.add_row("label", printable(found.truth))
    return table


def loose(found: Sequence[Loose]) -> Table:
    """What `gc` would take, by domain, stage and kind."""
    table = _table("domain", "stage", "kind", "objects>", "size>")
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for each in found:
        domain, stage, *_ = each.key.split("/")
        counts[domain, stage, each.kind] += 1
        sizes[domain, stage, each.kind] += each.bytes
    for place, number in sorted(counts.items()):
        domain, stage, kind = place
        table.add_row(printable(domain), printable(stage), kind, str(number), size(sizes[place]))
    return table


def size(number: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _table(*columns: str) -> Table:
    """Columns by title; one that ends in > stands to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.removesuffix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _pairs() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number or name in _TOLD_AT_ZERO)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from _flat(each, f"{prefix}{name}.")
        else:
            text = each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
            yield f"{prefix}{name}", text if len(text) <= 200 else f"{text[:197]}..."


def _files(found: Artifact) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[int, int]] = {}
    for name, (_, file) in found.files.items():
        kind = f"*.{name.partition('.')[2]}" if name.startswith(("shard-", "seed-")) else name
        number, total = kinds.get(kind, (0, 0))
        kinds[kind] = number + 1, total + file.bytes
    return kinds


def _guesses(guesses: Sequence[Guess]) -> str:
    return ", ".join(
        printable(each.name) + (f" {each.probability:.2f}" if each.probability is not None else "") for each in guesses
    )


def _from(found: Lineage, text: str, label: str) -> str:
    return f"{text} ({label} {found.artifacts[label][:12]})" if label in found.artifacts else text
