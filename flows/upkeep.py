"""gc and verify over the domains that somebody named: by domain file, or all of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latteflow.flows.errors import UsageError
from latteflow.flows.pipeline import repaired
from latteflow.flows.plan import plan
from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.captions import CaptionStore
from latteflow.storage.errors import DataError
from latteflow.storage.inventory import domains
from latteflow.storage.objects import ObjectStore
from latteflow.storage.upkeep import Loose, garbage, leftovers
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.ship.promote import champions


def histories(files: Sequence[Domain], url: str | None) -> list[History]:
    """Each domain that is meant, once.

    Raises:
        UsageError: neither domain files nor a store were given, or both.
        DataError: there is no such store, or nothing of a domain in it.
    """
    if bool(files) == bool(url):
        raise UsageError("give domain files, or --store URL for all domains of a store")
    if url:
        store = ArtifactStore(ObjectStore(url))
        names = domains(store.objects)
        found = [each for each in (History(store, name) for name in names) if each.inventory.is_domain]
        if not found:
            what = f"{url!r} is no store: latteflow wrote none of it" if names else f"store {url!r} holds nothing"
            raise DataError(f"{what}; check the path")
        return found
    distinct = {(each.store, each.name): each for each in files}
    return [history(each) for each in distinct.values()]


def history(domain: Domain) -> History:
    """What the store of a domain holds of it.

    Raises:
        DataError: nothing.
    """
    found = History(open_store(domain), domain.name)
    if not found.inventory.is_domain:
        raise DataError(
            f"store {domain.store!r} holds nothing of domain {domain.name!r}; run it first, or check `store` and `name`"
        )
    return found


def stores(found: Sequence[History]) -> list[ArtifactStore]:
    """The stores of some domains, each once."""
    return list({each.store.objects.url: each.store for each in found}.values())


@dataclass(frozen=True)
class Swept:
    """What `gc` found to go, and took if it was told to.

    Attributes:
        loose: each with the store it lies in.
        alone: domains of which nothing goes, and why.
        merged: small files of texts that went into others.
    """

    loose: list[tuple[ArtifactStore, Loose]]
    alone: dict[str, str]
    merged: int = 0

    @property
    def bytes(self) -> int:
        return sum(one.bytes for _, one in self.loose)


def sweep(found: Sequence[History], files: Sequence[Domain], older_than: float, *, delete: bool) -> Swept:
    """What nothing needs of some domains and of the texts of their stores; it is deleted if ``delete`` says so.

    Args:
        files, older_than: as for :func:`loose`.
    """
    going: list[tuple[ArtifactStore, Loose]] = []
    alone: dict[str, str] = {}
    for each in found:
        free = loose(each, files, older_than)
        if isinstance(free, str):
            alone[each.domain] = free
        else:
            going += [(each.store, one) for one in free]
    going += [(store, one) for store in stores(found) for one in leftovers(store, older_than)]
    if not delete:
        return Swept(going, alone)
    for owner, one in going:
        owner.objects.delete(one.key)
    captions = [CaptionStore(store.objects) for store in stores(found)]
    return Swept(going, alone, sum(each.compact(describer) for each in captions for describer in each.describers()))


def loose(history: History, files: Sequence[Domain], older_than: float) -> list[Loose] | str:
    """What nothing needs of a domain, in the order in which to delete it; or why all of it is left alone.

    Args:
        files: domain files whose current artifacts are kept, beside those of the newest complete run.
        older_than: seconds; younger objects stay.
    """
    running = history.inventory.under_way(older_than)
    if running:
        return f"{', '.join(running)} is under way"
    newest = history.newest_run()
    if not newest:
        return "it has no complete run yet"
    own = [each for each in files if (each.store, each.name) == (history.store.objects.url, history.domain)]
    roots = [*newest.values(), *_served(history), *(a for each in own for a in _current(each))]
    return garbage(history.inventory, roots, older_than)


def _served(history: History) -> list[Artifact]:
    """The champion's models, and those that `rollback` would go back to."""
    every = {each.version: each for each in champions(history.store, history.domain)}
    if not every:
        return []
    newest = every[max(every)]
    refs = [each.tuned for each in (newest, every.get(newest.previous)) if each]
    found = (history.store.load(ref.domain, ref.stage, ref.fingerprint) for ref in refs)
    return [artifact for artifact in found if artifact is not None]


def _current(domain: Domain) -> list[Artifact]:
    """What a run of the domain file would take from the store now."""
    store = open_store(domain)
    return [store.open(each.result.ref) for each in repaired(plan, domain) if each.result and not each.reasons]
