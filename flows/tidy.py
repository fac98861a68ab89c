"""tidy: `gc` on a schedule, so that the store of a domain does not grow for ever."""

from __future__ import annotations

import functools
from typing import Annotated, Any

from prefect.states import Completed
from pydantic import Field

from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.flows.pipeline import repaired
from latteflow.flows.upkeep import Swept, history, sweep
from latteflow.storage.lease import lease
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store

DAY_S = 86400.0
Days = Annotated[float, Field(gt=0, description="Leave alone what is younger, in days.")]


@domain_flow()
def tidy(domain: DomainOrFile, days: Days = 7.0) -> Any:
    """Delete what no current run of the domain needs and is older than so many days. Texts are never deleted.

    It waits for a run of the domain that is under way, and others wait for it.
    """
    with lease(open_store(domain).objects, f"{domain.name}/lock", wait=True):
        swept = repaired(functools.partial(_swept, older_than=days * DAY_S), domain)
    words = [f"{len(swept.loose)} objects deleted, {swept.bytes / 1e6:.1f} MB", *swept.alone.values()]
    return Completed(message="; ".join(words))


def _swept(domain: Domain, older_than: float) -> Swept:
    return sweep([history(domain)], [domain], older_than, delete=True)
