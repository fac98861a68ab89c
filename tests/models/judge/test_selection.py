"""Selection without labels: what duels measure, and that models which only look good are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latteflow.models.judge.selection import (
    BAR,
    NEIGHBOURS,
    SHARE,
    Duel,
    Evidence,
    duel,
    estimates,
    hearing,
    judge,
    kappa,
    neighbours,
)
from latteflow.models.methods.transduction.tuning import nearest
from latteflow.models.vectors import unit

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
    assert duel(features, one, other).score == 0
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


def evidence(features: Tensor, labels: Tensor, zero_shot: Tensor) -> Evidence:
    return Evidence(kappa(labels, zero_shot[neighbours(features)], K), duel(features, labels, zero_shot))


def test_the_truth_is_accepted_and_what_is_broken_refused() -> None:
    features, truth, zero_shot = world()
    mended = torch.where(torch.arange(len(truth)) % 2 == 0, truth, zero_shot)
    for good in (truth, mended):
        assert judge([evidence(features, good, zero_shot)], 1.0).accepted
    noisier = torch.where(torch.arange(len(truth)) % 4 == 0, (zero_shot + 1) % K, zero_shot)
    shuffled = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))]
    for broken in ((truth + 1) % K, torch.zeros_like(truth), shuffled, noisier, zero_shot):
        verdict = judge([evidence(features, broken, zero_shot)], 1.0)
        assert not verdict.accepted and "asked for" in verdict.reason
    assert "do not vouch for it" in verdict.reason and "2 standard errors" in verdict.reason


def test_a_zero_shot_that_knows_nothing_vouches_for_nobody() -> None:
    features, truth, _ = world()
    by_chance = torch.randint(K, (len(truth),), generator=torch.Generator().manual_seed(1))
    for labels in (truth, (truth + 1) % K, by_chance):
        assert not judge([evidence(features, labels, by_chance)], 1.0).accepted


def test_a_method_is_judged_by_all_its_seeds() -> None:
    won, lost = Duel(0.2, 0.05), Duel(-0.2, 0.05)
    high, low = Evidence(BAR + 0.1, won), Evidence(0.0, won)
    assert judge([high, high], 0.0).accepted and not judge([high, low], 0.0).accepted
    assert judge([high, low], 0.0).score == pytest.approx((BAR + 0.1) / 2)
    between = Evidence(BAR - SHARE / 2, won)
    assert judge([between], 1.0).accepted and not judge([between], 0.0).accepted
    assert not judge([high, high._replace(duel=lost)], 1.0).accepted
    assert not judge([high._replace(duel=Duel(0.2, 0.1))], 1.0).accepted
    assert "(duel with zero-shot -0.200 (±0.050), and more than" in judge([high._replace(duel=lost)], 1.0).reason
    assert f"more than {BAR:g} is asked for" in judge([low], 0.0).reason


def test_what_it_cannot_see() -> None:
    """A class went to another that zero-shot gave there now and then; only errors far away still have its name."""
    features, truth, zero_shot = world()
    given_up = torch.where(truth == 2, 3, truth)
    assert judge([evidence(features, given_up, zero_shot)], 1.0).accepted


def test_kappa_with_several() -> None:
    a = torch.tensor([0, 1, 1, 0])
    b = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 0]])  # 6 of 8 agree, both are half 0 and half 1
    assert kappa(a, b, 2) == pytest.approx((6 / 8 - 1 / 2) / (1 / 2))
    assert kappa(a, b[:, :1], 2) == kappa(a, b[:, 0], 2)


def test_estimates_by_hand() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])  # classes 0 0 1 0
    near = torch.tensor([[1], [0], [3], [2]])
    found = estimates(probabilities, torch.tensor([0, 1, 0, 1]), near)
    assert found["agreement"] == pytest.approx((1 / 4 - 1 / 2) / (1 / 2))
    assert found["vouched"] == pytest.approx((3 / 4 - 1 / 2) / (1 / 2))  # zero-shot gives the neighbours 1 0 1 0
    assert found["neighbourhood"] == pytest.approx((2 / 4 - 10 / 16) / (6 / 16))
    assert found["confidence"] == pytest.approx(0.7)
    each = [-sum(p * math.log(p) for p in row) for row in ((0.8, 0.2), (0.6, 0.4), (0.1, 0.9), (0.5, 0.5))]
    assert found["information"] == pytest.approx(math.log(2) - sum(each) / 4)
    sure = estimates(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([[0], [1]]))
    assert sure == pytest.approx(dict.fromkeys(sure, 1.0) | {"information": math.log(2)})


def test_what_estimates_think_of_the_truth() -> None:
    features, truth, zero_shot = world()
    near = nearest(features, NEIGHBOURS)[0]
    mended, renamed = torch.where(torch.arange(len(truth)) % 2 == 0, truth, zero_shot), (truth + 1) % K
    one_hot = torch.eye(K)
    true, half, before, named = (
        estimates(one_hot[labels], zero_shot, near) for labels in (truth, mended, zero_shot, renamed)
    )
    assert true["vouched"] > half["vouched"] > before["vouched"] > named["vouched"]
    assert true["neighbourhood"] == named["neighbourhood"] > half["neighbourhood"] > before["neighbourhood"]
    assert before["agreement"] == 1 and true["agreement"] > named["agreement"]


def test_a_hearing_by_hand() -> None:
    said = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [math.log(3), 0.0], [0.0, 0.0], [9.0, 0.0]])
    one, other = torch.tensor([1, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 0])
    # Votes 1/2, 1/2, -1/2 of three texts; the fourth image has none, and about the last nobody disagrees.
    found = hearing(said, one, other)
    assert found == pytest.approx((1 / 6, math.sqrt(2 / 3) / 3))
    assert hearing(said, other, one) == pytest.approx((-1 / 6, math.sqrt(2 / 3) / 3))
    assert hearing(said, one, one) == (0, 0)


def test_texts_about_the_same_change_of_class_are_not_independent() -> None:
    one, other = torch.tensor([1] * 50 + [2] * 50), torch.zeros(100, dtype=torch.int64)
    said = torch.zeros(100, 3)
    said[:50, 1], said[50:, 2] = 4, -4  # all for one change, all against the other: no more than two voices
    vote = float(said[0].softmax(0)[1] - said[0].softmax(0)[0])
    lost = float(said[50].softmax(0)[2] - said[50].softmax(0)[0])
    found = hearing(said, one, other)
    assert found == pytest.approx(((vote + lost) / 2, (vote - lost) / 2))  # ten times that of a hundred voices


def test_texts_that_are_worth_something_decide_alone() -> None:
    bad, good = Evidence(0.1, Duel(-0.2, 0.01)), Evidence(0.9, Duel(0.2, 0.01))
    assert judge([bad], 0.0, Duel(0.2, 0.05)).accepted
    assert not judge([good], 1.0, Duel(0.1, 0.06)).accepted
    assert "images' texts" in judge([good], 1.0, Duel(0.1, 0.06)).reason
    assert judge([good], 1.0).accepted
