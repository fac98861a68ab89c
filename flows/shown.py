"""What a run leaves in Prefect's UI: tables and pages beside its log. Nothing is decided by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from latteflow.models.judge.metrics import seen_note
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import Step
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.scores import Scores, read_scores
from latteflow.tasks.ship.nights import Night


def key(domain: Domain, what: str) -> str:
    """Of an artifact; Prefect takes letters, digits and dashes."""
    return f"{domain.name.replace('_', '-')}-{what}"


def stages(domain: Domain, results: Sequence[StageResult]) -> None:
    """What became of each stage, the accuracies, and where the report lies."""
    rows: list[dict[str, Any]] = [
        {
            "stage": each.label,
            "": "cached" if each.cached else "done",
            "seconds": round(each.seconds, 1),
            "artifact": each.ref.fingerprint[:12],
            "counts": ", ".join(f"{number} {name}" for name, number in sorted(each.counts.items())),
        }
        for each in results
    ]
    create_table_artifact(rows, key=key(domain, "stages"), description=f"Stages of {domain.name}")
    by_label = {each.label: each for each in results}
    if "report" in by_label:
        store = open_store(domain)
        where = store.open(by_label["report"].ref).address("report.html")
        text = _page(domain, where, read_scores(store.open(by_label["evaluate"].ref)))
        create_markdown_artifact(text, key=key(domain, "report"), description=f"Report of {domain.name}")


class Bar:
    """How far a stage is, in the UI: an artifact of its own, once it takes longer than some seconds."""

    every_s = 5.0

    def __init__(self, domain: Domain, label: str) -> None:
        self._key = key(domain, f"{label}-progress")
        self._artifact: Any = None

    def show(self, step: Step) -> None:
        share = 100.0 * step.done / max(step.total, 1)
        if self._artifact is None:
            self._artifact = create_progress_artifact(share, key=self._key, description=str(step))
        else:
            update_progress_artifact(self._artifact, share, description=str(step))

    def end(self) -> None:
        if self._artifact is not None:
            update_progress_artifact(self._artifact, 100.0, description="done")


def nights(domain: Domain, found: Sequence[Night]) -> None:
    """What the nights came to, newest first."""
    rows: list[dict[str, Any]] = [
        {
            "night": each.at,
            "": each.state,
            "seconds": each.seconds,
            "images": f"{each.images} ({each.new} new, {each.removed} removed, {each.quarantined} unreadable)",
            "texts retired": each.retired,
            "made": ", ".join(each.made) or "nothing",
            "champion": each.champion,
            "why": each.why,
        }
        for each in reversed(found)
    ]
    create_table_artifact(rows, key=key(domain, "nights"), description=f"Nights of {domain.name}")


def _page(domain: Domain, where: str, scores: Scores) -> str:
    lines = [f"# {domain.name}", "", f"Report: `{where}`", ""]
    if note := seen_note(scores.n_seen, scores.n_test):
        lines += [f"Mind that {note}.", ""]
    if scores.n_test:
        lines += ["| method | top-1 | gain over the better zero-shot |", "| --- | --- | --- |"]
        lines += [
            f"| {name.replace('_', ' ')} | {100 * (score.top1 or 0.0):.1f} | {100 * (score.gain or 0.0):+.1f} |"
            for name, score in scores.methods.items()
        ]
    else:
        lines.append("No labels: accuracy is unknown.")
    return "\n".join(lines)
