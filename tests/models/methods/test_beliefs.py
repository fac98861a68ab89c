"""What texts about images are worth: nothing where they know nothing, much where they do; the regression; errors."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latteflow.models.methods.latteclip_plus.beliefs import FACTOR, _stacked, beliefs
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce
from latteflow.models.rows import in_memory
from latteflow.models.vectors import unit

CFG = TransductionSettings()
SCALE, NEIGHBOURS = 20.0, 8


class Domain(NamedTuple):
    images: Tensor
    class_texts: Tensor
    truth: Tensor

    def told(self, labels: Tensor, seed: int) -> Tensor:
        """Texts about the class of each image, by these labels."""
        return unit(self.class_texts[labels] + 0.1 * noise(self.images.shape, seed))

    def worth(self, texts: Tensor, has_text: Tensor | None = None) -> Tensor | None:
        found = beliefs(self.images, self.class_texts, texts, has_text, SCALE, NEIGHBOURS)
        assert (found.logits is None) == (found.weight == 0) and 0 <= found.weight <= FACTOR
        return None if found.logits is None else in_memory(found.logits)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def domain(seed: int, n: int = 240, classes: int = 6) -> Domain:
    """Images around class directions; class texts so far off that zero-shot is right about half the time."""
    centres = unit(noise((classes, 32), seed))
    truth = torch.arange(n) % classes
    images = unit(centres[truth] + 0.2 * noise((n, 32), seed + 100))
    return Domain(images, unit(centres + 0.6 * noise((classes, 32), seed + 200)), truth)


@pytest.mark.parametrize("seed", range(5))
def test_texts_that_know_nothing_are_worth_nothing(seed: int) -> None:
    known = domain(seed)
    own = known.told(known.truth, seed)
    draw = torch.Generator().manual_seed(seed)
    assert known.worth(own) is not None
    assert known.worth(own[torch.randperm(len(own), generator=draw)]) is None, "of other images"
    assert known.worth(known.told(torch.zeros_like(known.truth), seed)) is None, "all about one class"
    assert known.worth(own[:1].expand_as(own)) is None, "all the same"
    zero_shot = (known.images @ known.class_texts.T).argmax(1)
    assert known.worth(known.class_texts[zero_shot]) is None, "what zero-shot says"


def test_texts_that_know_the_class_teach_unseen_images() -> None:
    known = domain(2)
    wrong = torch.arange(len(known.truth)) % 5 < 2
    texts = known.told(torch.where(wrong, known.truth.roll(1), known.truth), 1)
    seen = torch.arange(len(known.truth)) % 12 < 6
    half = Domain(known.images[seen], known.class_texts, known.truth[seen])

    def correct(said: Tensor | None) -> float:
        model = transduce(CFG, half.images, half.class_texts, SCALE, said)
        return float(((known.images[~seen] @ model.classifier.T).argmax(1) == known.truth[~seen]).float().mean())

    assert correct(half.worth(texts[seen])) > correct(None) + 0.1


def test_an_image_without_text_has_no_say() -> None:
    known = domain(0)
    has = torch.arange(len(known.truth)) % 3 > 0
    texts = torch.where(has[:, None], known.told(known.truth, 0), torch.nan)
    said = known.worth(texts, has)
    assert said is not None
    assert said[~has].eq(0).all() and said[has].ne(0).any()
    zero_shot = SCALE * known.images @ known.class_texts.T
    assert 0 < float(said[has].std()) <= FACTOR * float(zero_shot.std()) * 1.001
    assert known.worth(texts, torch.zeros_like(has)) is None


def test_the_regression_finds_the_weights_of_its_views() -> None:
    views = noise((2, 4000, 5), 0).double() * 2
    for weights in ((0.6, 0.3), (0.5, 0.0), (-0.2, 1.5)):
        target = torch.einsum("v,vnk->nk", torch.tensor(weights).double(), views).softmax(1)
        labels = torch.multinomial(target, 1, generator=torch.Generator().manual_seed(1))[:, 0]
        exact, _ = _stacked(views, target)
        torch.testing.assert_close(exact, torch.tensor(weights).double(), rtol=0, atol=1e-4)
        found, error = _stacked(views, torch.nn.functional.one_hot(labels, 5).double())
        assert (found - torch.tensor(weights)).abs().le(4 * error).all()
        assert error.lt(0.05).all()


def test_errors() -> None:
    known = domain(0)
    with pytest.raises(ValueError, match="are tokens"):
        known.worth(torch.ones(len(known.truth), 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite features"):
        known.worth(torch.full_like(known.images, torch.nan))
