"""What commands tell programs, for `--json`: one document each. Names of fields stay; more of them may come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latteflow.models.settings import own_zero_shot
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store

if TYPE_CHECKING:
    from latteflow.flows.doctor import Check
    from latteflow.flows.plan import Planned
    from latteflow.tasks.report.history import History
    from latteflow.tasks.report.lineage import Lineage
    from latteflow.tasks.ship.nights import Night
    from latteflow.tasks.ship.promote import Champion

Document = dict[str, Any]
_SCORES = {"top1", "interval", "gain", "gain_interval"}


def run(domain: Domain, results: Sequence[StageResult]) -> Document:
    """The end of a run; what a report says only where one was made."""
    found: Document = {
        "domain": domain.name,
        "stages": [
            {
                "stage": each.label,
                "state": "cached" if each.cached else "done",
                "seconds": each.seconds,
                "artifact": each.ref.fingerprint,
                "counts": dict(each.counts),
            }
            for each in results
        ],
    }
    by_label = {each.label: each for each in results}
    return {**found, **_reported(domain, by_label)} if "report" in by_label else found


def _reported(domain: Domain, results: Mapping[str, StageResult]) -> Document:
    from latteflow.tasks.report.report import kept
    from latteflow.tasks.report.scores import read_scores
    from latteflow.tasks.tune.select import read_selection

    folder = Path(domain.output) / domain.name
    store = open_store(domain)
    found = read_scores(store.open(results["evaluate"].ref))
    selection = read_selection(store.open(results["select"].ref))
    best = selection.best
    told = found.of.items() if found.n_test else ()
    return {
        "labelled": found.n_test,
        "adapted_to": found.n_seen,
        "scores": {name: score.model_dump(mode="json", include=_SCORES, exclude_unset=True) for name, score in told},
        "kept": {
            "method": best.method if best else own_zero_shot(domain.clip.centre),
            "seed": best.seed if best else None,
            "why": kept(domain, selection),
        },
        "report": str(folder / "report.html"),
        "metrics": str(folder / "metrics.json"),
    }


def plan(domain: Domain, planned: Sequence[Planned]) -> Document:
    """What a run would do; estimates are null where nobody measured."""
    from latteflow.flows.plan import cost

    running = [each for each in planned if each.reasons]
    texts = [each for each in running if each.unit == "texts"]
    seconds = [each.seconds for each in running]
    tokens = [each.tokens for each in texts]
    return {
        "domain": domain.name,
        "stages": [_planned(each) for each in planned],
        "images": {
            each.label.removeprefix("shard "): {
                "new": each.images.new, "kept": each.images.kept, "removed": each.images.removed,
            }
            for each in planned
            if each.label.startswith("shard ")
        },
        "texts": sum(each.work for each in texts),
        "prompt_tokens": None if None in tokens else sum(each.prompt for each in tokens if each),
        "output_tokens": None if None in tokens else sum(each.output for each in tokens if each),
        "seconds": None if None in seconds else sum(each for each in seconds if each),
        "cost": cost(domain, planned),
        "currency": domain.prices.currency,
    }  # fmt: skip


def _planned(each: Planned) -> Document:
    return {
        "stage": each.label,
        "state": "will run" if each.reasons else "cached",
        "reasons": list(each.reasons),
        "artifact": each.result.ref.fingerprint if each.result and not each.reasons else None,
        "unit": each.unit,
        "work": each.work,
        "at_most": each.at_most,
        "seconds": each.seconds,
    }


def artifacts(history: History) -> Document:
    """All artifacts of a domain, newest first within a stage."""
    from latteflow.tasks.report.lineage import newest_artifacts

    current = {artifact.fingerprint for artifact in newest_artifacts(history).values()}
    return {
        "domain": history.domain,
        "artifacts": [
            {
                "stage": history.label(made.artifact),
                "artifact": made.artifact.fingerprint,
                "current": made.artifact.fingerprint in current,
                "made": _moment(made.modified),
                "bytes": sum(file.bytes for _, file in made.artifact.files.values()),
                "counts": dict(made.artifact.counts),
            }
            for stage in history.inventory.stages
            for made in history.inventory.made(stage)
        ],
    }


def image(domain: str, found: Lineage) -> Document:
    """An image, followed through a run."""
    guesses = ("pseudo_labels", "predictions")
    told = asdict(found)
    return {"domain": domain, **told, **{name: [_guess(each) for each in told[name]] for name in guesses}}


def _guess(guess: Mapping[str, Any]) -> Document:
    return {"by": guess["by"], "class": guess["name"], "probability": guess["probability"]}


def champions(domain: str, found: Sequence[Champion]) -> Document:
    """The model that a domain serves, and those before it, newest first."""
    told = [_champion(each) for each in reversed(found)]
    return {"domain": domain, "champion": told[0] if told else None, "earlier": told[1:]}


def nights(domain: str, found: Sequence[Night]) -> Document:
    """What the nights of a domain came to, newest first."""
    return {"domain": domain, "nights": [{**asdict(each), "made": list(each.made)} for each in reversed(found)]}


def _champion(each: Champion) -> Document:
    return {
        "version": each.version,
        "since": each.at,
        "artifact": each.tuned.fingerprint,
        "method": each.method,
        "seed": each.seed,
        "score": each.score,
        "why": each.reason,
    }


def verified(objects: int, size: int, wrong: Sequence[str]) -> Document:
    """What `verify` read, and a sentence for each thing that was damaged."""
    return {"sound": not wrong, "objects": objects, "bytes": size, "damaged": list(wrong)}


def examined(checks: Sequence[Check]) -> Document:
    """What `doctor` found."""
    return {
        "healthy": all(check.state != "problem" for check in checks),
        "checks": [check._asdict() for check in checks],
    }


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
