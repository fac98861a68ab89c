"""The share of a domain's centre that is no class: by a plain computation, and on domains where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latteflow.models.judge import shift
from latteflow.models.judge.shift import centre_share
from latteflow.models.vectors import unit

DIM, K, SCALE = 32, 8, 30.0


def domain(
    classes: int, pull: float, n: int = 240, seed: int = 0, spread: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the first of K classes, something in common that pulls them towards others, and the texts."""
    draws = torch.Generator().manual_seed(seed)
    texts = unit(torch.randn(K, DIM, generator=draws))
    truth = torch.arange(n) % classes
    common = pull * unit(texts[-2:].sum(0))
    images = texts[truth] + common + spread * torch.randn(n, DIM, generator=draws)
    return images * 7, texts, truth


def right(images: Tensor, texts: Tensor, truth: Tensor, share: float) -> float:
    return float(((unit(images - share * images.mean(0)) @ texts.T).argmax(1) == truth).double().mean())


def test_what_all_images_share_is_taken_out() -> None:
    images, texts, truth = domain(K, pull=2.0)
    share = centre_share(images, texts, SCALE)
    assert share > 0.9
    assert right(images, texts, truth, share) > right(images, texts, truth, 0.0) + 0.2


def test_where_the_mean_is_class_it_stays() -> None:
    images, texts, truth = domain(2, pull=0.0)
    share = centre_share(images, texts, SCALE)
    assert share < 0.1
    assert right(images, texts, truth, share) > right(images, texts, truth, 1.0) + 0.2


@pytest.mark.parametrize("images", [torch.ones(40, DIM), torch.eye(DIM)[:7], torch.randn(1, DIM)])
def test_images_that_say_nothing(images: Tensor) -> None:
    assert centre_share(images, unit(torch.eye(DIM)[:3]), SCALE) == 0


@pytest.mark.parametrize("n", [8, 9, 40])
def test_few_images_and_many_classes_give_a_share(n: int) -> None:
    draws = torch.Generator().manual_seed(n)
    share = centre_share(torch.randn(n, DIM, generator=draws), unit(torch.randn(90, DIM, generator=draws)), SCALE)
    assert 0 <= share <= 1


def test_the_scale_of_embeds_and_the_precision_do_not_matter() -> None:
    images, texts, _ = domain(3, pull=0.5, n=60)
    share = centre_share(images, texts, SCALE)
    assert centre_share(100 * images, texts, SCALE) == pytest.approx(share, abs=1e-6)
    assert centre_share(images.double(), texts.double(), SCALE) == pytest.approx(share, abs=1e-4)


def test_many_images_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, _ = domain(K, pull=2.0, n=300)
    whole = centre_share(images, texts, SCALE)
    monkeypatch.setattr(shift, "MOST_IMAGES", 100)
    assert centre_share(images, texts, SCALE) != whole
    assert centre_share(images, texts, SCALE) == centre_share(images.roll(1, 0).roll(-1, 0), texts, SCALE) > 0.8


def test_what_is_not_finite_is_refused() -> None:
    images, texts, _ = domain(3, pull=0.5, n=20)
    images[3, 0] = math.nan
    with pytest.raises(ValueError, match="embed the images again"):
        centre_share(images, texts, SCALE)


def test_density_of_one_class_is_the_gaussian_of_its_images() -> None:
    """With one class, no matter what is believed, the mixture is one Gaussian: by the textbook."""
    draws = torch.Generator().manual_seed(3)
    u, others = torch.randn(50, 4, generator=draws).double(), torch.randn(6, 4, generator=draws).double()
    found = shift._log_density(u, torch.zeros(1, 4).double(), torch.ones(50, 1).double(), others)
    # Texts are all alike, so the anchor lies at the mean of the images, and the mean does not move.
    mean, moment = u.mean(0), u.T @ u
    rho = shift._oas(moment / 50, 50)
    within = moment / 50 - torch.outer(mean, mean)
    covariance = (1 - rho) * within + (rho + 1e-4) * within.trace() / 4 * torch.eye(4)
    gaussian = torch.distributions.MultivariateNormal(mean, covariance)
    expected = gaussian.log_prob(others) + 2 * math.log(2 * math.pi)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
