"""evaluate: the models as they are against labels that came or changed, and the report."""

from __future__ import annotations

import functools

from latteflow.flows import shown
from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.flows.pipeline import repaired, run_plainly
from latteflow.tasks.core.stage import StageResult


@domain_flow()
def evaluate(domain: DomainOrFile) -> list[StageResult]:
    """Score the newest models again. Nothing is sharded, described or tuned; a stage that would have to is an error."""
    results = repaired(functools.partial(run_plainly, start="evaluate"), domain)
    shown.stages(domain, results)
    return results
