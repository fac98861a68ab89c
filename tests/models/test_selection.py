"""Selection without labels: what duels measure, and that models which only look good are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.losses import unit
from models.selection import NEIGHBOURS, best, duel, judge, kappa

K = 5


def world(n: int = 600, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features around class directions, the truth, and a zero-shot that errs on four of ten images at random."""
    draws = torch.Generator().manual_seed(seed)
    centres = unit(torch.randn(K, 16, generator=draws))
    truth = torch.arange(n) % K
    features = unit(centres[truth] + noise * torch.randn(n, 16, generator=draws) / 4)
    wrong = torch.rand(n, generator=draws) < 0.4
    moved = (truth + torch.randint(1, K, (n,), generator=draws)) % K
    return features, truth, torch.where(wrong, moved, truth)


def test_by_hand() -> None:
    angles = torch.linspace(0, 1, 2 * NEIGHBOURS + 1)
    features = torch.stack([angles.cos(), angles.sin()], 1)
    both = (torch.arange(2 * NEIGHBOURS + 1) > NEIGHBOURS).long()  # the first eleven are 0, the others 1
    one, other = both.clone(), both.clone()
    one[0], other[0] = 0, 1  # its neighbours are all 0
    assert duel(features, one, other) == (1, 0) and duel(features, other, one) == (-1, 0)
    one[0], other[0] = 2, 1  # nobody near it is either
    assert duel(features, one, other).score == 0 and not duel(features, one, other).is_won
    assert duel(features, both, both) == duel(features[:3], one[:3], other[:3]) == (0, 0)
    one[1], other[1] = 1, 0  # the ten neighbours of both are now nine 0 and a 1: -0.1 and -0.8
    assert duel(features, one, other) == pytest.approx((-0.45, 0.35 / 2**0.5))
    with pytest.raises(ValueError, match="21, 21, 20"):
        duel(features, one, other[:-1])


def test_kappa() -> None:
    a = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    assert kappa(a, a, 3) == 1
    b = torch.tensor([0, 1, 1, 1, 2, 0, 0, 2])  # agree 5 of 8; shares 3/8 3/8 2/8 and 3/8 3/8 2/8
    chance = (9 + 9 + 4) / 64
    assert kappa(a, b, 3) == pytest.approx((5 / 8 - chance) / (1 - chance))
    assert kappa(torch.zeros(4).long(), torch.zeros(4).long(), 3) == 0


def test_the_truth_is_accepted_and_what_is_broken_refused() -> None:
    features, truth, zero_shot = world()
    zero_shots = {"zero_shot": zero_shot}
    assert judge(features, truth, zero_shots, K).accepted
    mended = torch.where(torch.arange(len(truth)) % 2 == 0, truth, zero_shot)
    assert judge(features, mended, zero_shots, K).accepted
    renamed = (truth + 1) % K  # a perfect clustering under the wrong names
    verdict = judge(features, renamed, zero_shots, K)
    assert not verdict.accepted and "little to do with zero-shot" in verdict.reason
    for broken in (torch.zeros_like(truth), truth[torch.randperm(len(truth))]):
        assert not judge(features, broken, zero_shots, K).accepted
    noisier = torch.where(torch.arange(len(truth)) % 4 == 0, (zero_shot + 1) % K, zero_shot)
    verdict = judge(features, noisier, zero_shots, K)
    assert not verdict.accepted and "do not vouch" in verdict.reason and verdict.duels["zero_shot"].score < 0


def test_what_it_cannot_see() -> None:
    """A class went to another that zero-shot gave there now and then; only errors far away still have its name."""
    features, truth, zero_shot = world()
    assert judge(features, torch.where(truth == 2, 3, zero_shot), {"zero_shot": zero_shot}, K).accepted


def test_every_zero_shot_must_be_beaten() -> None:
    features, truth, zero_shot = world()
    better = torch.where(torch.arange(len(truth)) % 4 == 0, zero_shot, truth)
    half = torch.where(torch.arange(len(truth)) % 2 == 0, zero_shot, truth)
    assert judge(features, half, {"plain": zero_shot}, K).accepted
    verdict = judge(features, half, {"plain": zero_shot, "centred": better}, K)
    assert not verdict.accepted and "duel with centred" in verdict.reason


def test_the_best_wins_most_duels() -> None:
    features, truth, zero_shot = world()
    models = {
        "zero_shot": zero_shot,
        "half": torch.where(torch.arange(len(truth)) % 2 == 0, truth, zero_shot),
        "most": torch.where(torch.arange(len(truth)) % 10 > 0, truth, zero_shot),
    }
    assert best(features, models) == "most" and best(features, {"only": truth}) == "only"
    assert best(features, {"a": truth, "b": truth}) == "a"
