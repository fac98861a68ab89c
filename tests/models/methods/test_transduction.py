"""Anchored transduction: the equations against a plain loop, what it promises on hard domains, and its errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from latteflow.models import rows as rows_of
from latteflow.models.methods.adaptation import TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.registry import adapt
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction import tuning as transduction
from latteflow.models.methods.transduction.tuning import nearest, propagate, transduce, whitening

pytestmark = pytest.mark.slow

CFG = TransductionSettings()
DIM = 16


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=-1)


def domain(
    sizes: list[int], seed: int = 0, noise: float = 0.2, text_noise: float = 0.25
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images around class directions, texts at some distance from them, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    classes = unit(torch.randn(len(sizes), DIM, generator=generator))
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    images = unit(classes[truth] + noise * torch.randn(len(truth), DIM, generator=generator))
    texts = unit(classes + text_noise * torch.randn(len(sizes), DIM, generator=generator))
    return images, texts, truth


def accuracy(labels: torch.Tensor, truth: torch.Tensor) -> float:
    return float((labels == truth).double().mean())


def test_equations_against_a_plain_loop() -> None:
    images, texts, _ = domain([4, 3, 5])
    x, t = images.double(), texts.double()
    cfg = TransductionSettings(neighbours=2, max_steps=3, tolerance=0, spread=0.6)
    n, c, scale = len(x), len(t), 7.0
    belief = [[math.exp(scale * float(x[i] @ t[k])) for k in range(c)] for i in range(n)]
    belief = [[b / sum(row) for b in row] for row in belief]
    moment = sum(torch.outer(row, row) for row in x) / n
    shrunk = moment + 0.03 * torch.linalg.eigvalsh(moment)[-1] * torch.eye(DIM, dtype=torch.float64)
    inverse = torch.linalg.inv(shrunk)  # u_i . u_j = x_i inverse x_j
    y = belief
    for _ in range(transduction.ROUNDS):
        after = []
        for i in range(n):
            near = sorted((j for j in range(n) if j != i), key=lambda j: -float(x[i] @ x[j]))[:2]
            w = [max(0.0, float(x[i] @ x[j])) for j in near]
            theirs = [sum(a * y[j][k] for a, j in zip(w, near, strict=True)) / sum(w) for k in range(c)]
            after.append([0.4 * belief[i][k] + 0.6 * theirs[k] for k in range(c)])
        y = after
    anchors = t.clone()
    best = [max(range(c), key=lambda k, i=i: y[i][k]) for i in range(n)]
    top = sum(float(x[i] @ inverse @ t[best[i]]) for i in range(n))
    anchors *= top / sum(float(t[b] @ inverse @ t[b]) for b in best)
    z, kappa = y, None
    spread = torch.std(scale * x @ t.T, correction=0)
    for _ in range(3):
        means = [
            (sum(z[i][k] * x[i] for i in range(n)) + 20 * anchors[k]) / (sum(z[i][k] for i in range(n)) + 20)
            for k in range(c)
        ]
        evidence = torch.tensor([[float(x[i] @ inverse @ means[k]) for k in range(c)] for i in range(n)])
        kappa = float(spread / torch.std(evidence, correction=0)) if kappa is None else kappa
        z = [[y[i][k] * math.exp(kappa * float(evidence[i, k])) for k in range(c)] for i in range(n)]
        z = [[value / sum(row) for value in row] for row in z]
    found = transduce(cfg, x, t, scale)
    torch.testing.assert_close(found.assignments, torch.tensor(z, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        x @ found.classifier.T, scale * x @ t.T + kappa * x @ inverse @ torch.stack(means).T, rtol=0, atol=1e-5
    )


def test_better_than_the_texts_alone_also_on_unseen_images() -> None:
    images, texts, truth = domain([60] * 5, noise=0.3, text_noise=0.5)
    unseen = torch.arange(len(images)) % 3 == 0
    found = transduce(CFG, images[~unseen], texts, 20.0)
    before = (images @ texts.T).argmax(1)
    assert accuracy(found.labels, truth[~unseen]) > accuracy(before[~unseen], truth[~unseen]) + 0.05
    after = (images[unseen] @ found.prototypes.T).argmax(1)
    assert accuracy(after, truth[unseen]) > accuracy(before[unseen], truth[unseen]) + 0.05


def test_converges() -> None:
    images, texts, _ = domain([50, 30, 40, 20], noise=0.35, text_noise=0.4)
    changes = [
        transduce(TransductionSettings(max_steps=n, tolerance=0), images, texts, 20.0).change for n in (1, 5, 20, 80)
    ]
    assert changes[0] > changes[1] > changes[2] > changes[3]
    assert changes[3] < 1e-5
    ended = transduce(TransductionSettings(max_steps=80), images, texts, 20.0)
    assert ended.steps < 80 and ended.change <= CFG.tolerance


def test_order_does_not_matter_and_runs_are_equal() -> None:
    images, texts, _ = domain([30, 20, 10], noise=0.3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    found, again, moved = (transduce(CFG, rows, texts, 20.0) for rows in (images, images, images[order]))
    assert found.assignments.equal(again.assignments)
    torch.testing.assert_close(moved.assignments, found.assignments[order], rtol=0, atol=1e-4)
    torch.testing.assert_close(moved.prototypes, found.prototypes, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "may_lose"),
    [
        # Few classes and long tails can cost: images of large classes are shared out (docs/methods.md).
        pytest.param([40, 40, 0, 0, 0, 0, 0, 0], 0.15, id="few of the classes"),
        pytest.param([200, 60, 20, 6, 2, 1], 0.05, id="long tail"),
        pytest.param([100, 100, 100, 0], 0, id="an absent class"),
        pytest.param([1, 1, 0, 0, 0, 1], 0, id="fewer images than classes"),
        pytest.param([2, 0], 0, id="two images"),
        pytest.param([1, 0], 0, id="one image"),
    ],
)
def test_hard_domains_keep_what_the_texts_know(sizes: list[int], may_lose: float) -> None:
    images, texts, truth = domain(sizes)
    found = transduce(CFG, images, texts, 20.0)
    assert found.assignments.isfinite().all() and found.prototypes.isfinite().all()
    torch.testing.assert_close(found.assignments.sum(1), torch.ones(len(images)))
    assert accuracy(found.labels, truth) >= accuracy((images @ texts.T).argmax(1), truth) - may_lose
    absent = [k for k, size in enumerate(sizes) if not size]
    # Nothing was seen of an absent class, so its text still finds its own prototype.
    assert ((texts @ found.prototypes.T).argmax(1)[absent] == torch.tensor(absent)).all()


def test_duplicates_and_an_image_at_the_centre() -> None:
    images, texts, truth = domain([10, 10, 10])
    found = transduce(CFG, images.repeat(5, 1), texts, 20.0)
    assert accuracy(found.labels, truth.repeat(5)) > 0.95
    copies = found.assignments.unflatten(0, (5, -1))
    torch.testing.assert_close(copies[0], copies[4], rtol=0, atol=2e-2)
    centre = transduce(CFG, torch.cat([images, torch.zeros(1, DIM)]), texts, 20.0)
    torch.testing.assert_close(centre.assignments[-1], torch.full((3,), 1 / 3))
    same = transduce(CFG, images[:1].repeat(9, 1), texts, 20.0)
    assert (same.labels == truth[0]).all()


def test_more_classes_than_dimensions_and_equal_texts() -> None:
    images, texts, _ = domain([3] * 40)
    twice = torch.cat([texts, texts[:1]])
    found = transduce(CFG, images, twice, 20.0)
    assert found.assignments.isfinite().all()
    torch.testing.assert_close(found.assignments[:, 0], found.assignments[:, -1])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _, _ = domain([20, 20])
    rows, weights = nearest(images, 5)
    assert not (rows == torch.arange(40)[:, None]).any()
    monkeypatch.setattr(rows_of, "BLOCK_NUMBERS", 40 * 7)
    in_blocks, their_weights = nearest(images, 5)
    assert in_blocks.equal(rows)
    torch.testing.assert_close(their_weights, weights)


def test_beliefs_travel_and_keep_their_sums() -> None:
    """Three images in a row, of which the last has no neighbour that is like it at all: solved by hand."""
    beliefs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    rows, weights = torch.tensor([[1], [2], [0]]), torch.tensor([[1.0], [1.0], [0.0]])
    found = propagate(beliefs, rows, weights, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.625, 0.375], [0.25, 0.75], [0.0, 1.0]]))
    torch.testing.assert_close(propagate(beliefs, rows, weights, 0.0), beliefs)
    draws = torch.Generator().manual_seed(0)
    beliefs = torch.rand(40, 3, generator=draws).softmax(1)
    rows, weights = nearest(unit(torch.randn(40, DIM, generator=draws)), 4)
    found, share = propagate(beliefs, rows, weights, 0.7), 0.7 * weights
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    own = (1 - share.sum(1, keepdim=True)) * beliefs
    torch.testing.assert_close(found, own + (share[:, :, None] * found[rows]).sum(1), rtol=0, atol=1e-4)


def test_whitening() -> None:
    stretched = torch.diag(torch.tensor([2.0, 1.0]))  # moment: 2, 1/2
    expected = torch.diag(torch.tensor([(2 + 0.2) ** -0.5, (0.5 + 0.2) ** -0.5]))
    torch.testing.assert_close(whitening(stretched, 0.1), expected)


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        (torch.ones(0, 4), torch.ones(2, 4)),
        (torch.ones(3, 4), torch.ones(1, 4)),
        (torch.ones(3, 4), torch.ones(2, 5)),
        (torch.full((3, 4), float("nan")), torch.ones(2, 4)),
    ],
)
def test_errors_say_what_is_wrong(images: torch.Tensor, texts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="transduce needs"):
        transduce(CFG, images, texts, 20.0)


@pytest.mark.parametrize("method", ["transduction", "latteclip_plus"])
def test_another_tower_says_who_is_near(method: str) -> None:
    """One that sees the classes clearly, where the CLIP's features hardly tell them apart."""
    generator = torch.Generator().manual_seed(0)
    classes, truth = unit(torch.randn(4, 32, generator=generator)), torch.arange(400) % 4
    embeds = classes[truth] + 0.45 * torch.randn(400, 32, generator=generator)
    texts = unit(classes + 0.3 * torch.randn(4, 32, generator=generator))
    clear = unit(torch.eye(4)[truth] + 0.05 * torch.randn(400, 4, generator=generator))
    data = TuneData(pseudo_labels=(unit(embeds) @ texts.T).argmax(1), class_texts=texts, image_embeds=embeds)

    def right(near: torch.Tensor | None) -> float:
        found = adapt(method, replace(data, near_features=near), LatteClipSettings(epochs=2), scale=20.0)
        return accuracy(found.assignments.argmax(1), truth)

    assert right(unit(embeds)) == right(None)
    assert right(clear) > right(None) + 0.03
