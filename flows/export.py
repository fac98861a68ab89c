"""export: the model that a run keeps, or that somebody names, as a folder to ship."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latteflow.flows.pipeline import repaired, run_plainly
from latteflow.models.settings import ZERO_SHOT
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.report import kept
from latteflow.tasks.ship.export import Format, RunRecord, check_export, export_tuned, export_zero_shot, record_of
from latteflow.tasks.ship.promote import champion
from latteflow.tasks.tune.models import check_model
from latteflow.tasks.tune.select import read_selection


def export(
    domain: Domain,
    folder: Path,
    *,
    method: str | None = None,
    seed: int | None = None,
    formats: Sequence[Format] = (),
    force: bool = False,
) -> str:
    """Write a model as a folder of its own; what is not made yet is made before.

    Args:
        folder: new, empty, or of an earlier export, which is replaced when the new one is whole.
        method, seed: which; by default what the gate keeps, which may be zero-shot.
        formats: written into the folder as well.
        force: among other files, which stay.

    Returns:
        The gate's word on it.

    Raises:
        DataError: the domain has no such model, or there can be no such folder.
        ModelError: the folder holds other things, or the model has no such form.
    """
    _check(domain, folder, formats, force=force)
    if method != ZERO_SHOT:
        check_model(domain, seed, method)
    results = {result.label: result for result in repaired(run_plainly, domain)}
    store = open_store(domain)
    selected, evaluated = (store.open(results[label].ref) for label in ("select", "evaluate"))
    selection = read_selection(selected)
    record = record_of(selected, evaluated, kept(domain, selection))
    if method is seed is None:
        method, seed = (selection.best.method, selection.best.seed) if selection.best else (ZERO_SHOT, None)
    if method == ZERO_SHOT:
        export_zero_shot(domain, results["embed train"], folder, record, formats, force=force)
    else:
        export_tuned(domain, results["tune"], seed, folder, record, formats, method=method, force=force)
    return record.verdict


def export_champion(domain: Domain, folder: Path, *, formats: Sequence[Format] = (), force: bool = False) -> None:
    """Write the model that the domain serves; args and errors as of :func:`export`."""
    _check(domain, folder, formats, force=force)
    found = champion(domain)
    record = RunRecord(f"champion {found.version}: {found.reason}")
    tuned = StageResult.of(found.tuned)
    export_tuned(domain, tuned, found.seed, folder, record, formats, method=found.method, force=force)


def _check(domain: Domain, folder: Path, formats: Sequence[Format], *, force: bool) -> None:
    check_export(domain, folder, force=force)
    if "transformers" in formats:
        from latteflow.models.ship.to_transformers import check

        check(domain.clip)
