"""The rule by which a model is served: what it measures, and what it refuses."""

import numpy as np
import pytest

from flows.pipeline import run_plainly
from storage.errors import DataError
from tasks.domain import Domain
from tasks.promote import Scores, better, champion, promote, read_champion, rollback, scores


def rings(labels: list[int], k: int = 3) -> np.ndarray:
    """Neighbours of an image: those next to it in a circle."""
    n = len(labels)
    return np.array([[(row + step) % n for step in range(1, k + 1)] for row in range(n)])


def test_consistency_is_agreement_beyond_chance() -> None:
    blocks = np.repeat([0, 1, 2], 100)
    clean = scores(blocks, rings(blocks.tolist()), 3)
    assert clean.consistency == pytest.approx((294 / 300 - 1 / 3) / (2 / 3))
    assert clean.classes == pytest.approx(3)
    dice = np.random.default_rng(0).integers(0, 3, 3000)
    assert abs(scores(dice, rings(dice.tolist()), 3).consistency) < 0.03
    assert scores(np.zeros(9, int), rings([0] * 9), 3) == Scores(0.0, 1.0)


@pytest.mark.parametrize(
    ("challenger", "rival", "yes", "told"),
    [
        (Scores(0.9, 3.0), None, True, "zero-shot 0.5"),
        (Scores(0.9, 1.4), None, False, "collapsed"),
        (Scores(0.5, 3.0), None, False, "is not above zero-shot's"),
        (Scores(0.8, 3.0), Scores(0.9, 3.0), False, "is below the champion's"),
        (Scores(0.9, 3.0), Scores(0.9, 3.0), True, "champion 0.9"),
    ],
)
def test_the_rule(challenger: Scores, rival: Scores | None, yes: bool, told: str) -> None:
    promoted, why = better(challenger, Scores(0.5, 2.9), rival)
    assert promoted == yes and told in why


def test_nothing_to_roll_back_to_is_said(domain: Domain) -> None:
    with pytest.raises(DataError, match="'shapes' has no champion yet"):
        champion(domain)
    with pytest.raises(DataError, match="'shapes' has no champion yet"):
        rollback(domain)


def test_what_is_not_better_than_zero_shot_is_not_served(domain: Domain) -> None:
    still = domain.model_copy(update={"latteclip": domain.latteclip.model_copy(update={"lr": 0.0})})
    found = {each.label: each for each in run_plainly(still)}
    decision = promote(still, found["shard train"], found["embed train"], found["tune"])
    assert not decision.promote and read_champion(still) is None
    again = promote(still, found["shard train"], found["embed train"], found["tune"])
    assert again == decision
