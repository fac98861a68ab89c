"""What is served, and what is not; the rule itself is in tests/models/judge/test_selection.py."""

import pytest

from latteflow.flows.pipeline import run_plainly
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ship.promote import champion, promote, read_champion, rollback


def test_nothing_to_roll_back_to_is_said(domain: Domain) -> None:
    with pytest.raises(DataError, match="'shapes' has no champion yet"):
        champion(domain)
    with pytest.raises(DataError, match="'shapes' has no champion yet"):
        rollback(domain)


def test_what_is_not_better_than_zero_shot_is_not_served(domain: Domain) -> None:
    still = domain.model_copy(update={"latteclip": domain.latteclip.model_copy(update={"lr": 0.0})})
    found = {each.label: each for each in run_plainly(still)}
    decision = promote(still, *(found[name] for name in ("shard train", "embed train", "screen", "tune")))
    assert not decision.promote and read_champion(still) is None
    again = promote(still, *(found[name] for name in ("shard train", "embed train", "screen", "tune")))
    assert again == decision
