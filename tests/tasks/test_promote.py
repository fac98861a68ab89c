"""The rule by which a model is served: what it measures, and what it refuses."""

import pytest
import torch

from flows.pipeline import run_plainly
from storage.errors import DataError
from tasks.domain import Domain
from tasks.promote import better, champion, promote, read_champion, rollback


def test_a_challenger_must_beat_zero_shot_and_not_lose_to_the_champion() -> None:
    truth = torch.arange(3).repeat_interleave(40)
    features = torch.nn.functional.one_hot(truth, 8).float() + 0.1 * torch.randn(
        120, 8, generator=torch.Generator().manual_seed(0)
    )
    features = torch.nn.functional.normalize(features, dim=1)

    def wrong(every: int) -> torch.Tensor:
        return torch.where(torch.arange(120) % every == 0, (truth + 1) % 3, truth)

    zero_shots = {"plain zero-shot": wrong(4)}
    assert better(features, truth, zero_shots, None, 3)[0]
    assert better(features, truth, zero_shots, wrong(7), 3)[0]
    yes, why = better(features, wrong(7), zero_shots, truth, 3)
    assert not yes and "vouch for the champion" in why
    assert not better(features, wrong(4), zero_shots, None, 3)[0]
    yes, why = better(features, torch.zeros_like(truth), zero_shots, None, 3)
    assert not yes and "little to do with zero-shot" in why


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
