"""latteclip_plus: what it hands on from step to step, that it helps, its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latteflow.models.methods.adaptation import TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import classify, tune
from latteflow.models.methods.latteclip_plus.beliefs import beliefs
from latteflow.models.methods.latteclip_plus.tuning import tune_plus
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce
from latteflow.models.vectors import unit

pytestmark = pytest.mark.slow

ANCHORED = TransductionSettings(anchor=5)
LATTE = LatteClipSettings(epochs=3, batch_size=16, lr=1e-3)


def domain(seed: int = 0, n: int = 150) -> tuple[TuneData, torch.Tensor]:
    """Images around class directions, class texts far off, image texts near the truth."""
    generator = torch.Generator().manual_seed(seed)
    classes = unit(torch.randn(5, 16, generator=generator))
    truth = torch.arange(n) % 5
    texts = unit(classes + 0.35 * torch.randn(5, 16, generator=generator))
    images = unit(classes[truth] + 0.25 * torch.randn(n, 16, generator=generator))
    described = unit(classes[truth] + 0.25 * torch.randn(n, 16, generator=generator))
    z = classify(images, texts).argmax(1)
    return TuneData(
        pseudo_labels=z, class_texts=texts, image_embeds=2 * images, image_texts=described, group_texts=described,
        group_classes=z,
    ), truth  # fmt: skip


def test_it_is_transduce_tune_transduce() -> None:
    data, _ = domain()
    x = unit(data.image_embeds)
    assert data.image_texts is not None
    weight, said = beliefs(x, data.class_features, data.image_texts, None, 20.0, ANCHORED.neighbours)
    first = transduce(ANCHORED, x, data.class_texts, 20.0, said)
    tuned = tune(LATTE, replace(data, pseudo_labels=first.labels), seed=3, scale=20.0)
    last = transduce(ANCHORED, unit(x @ tuned.image_map), tuned.prototypes, 20.0, said)
    found = tune_plus(LATTE, ANCHORED, data, seed=3, scale=20.0)
    assert found.text_weight == weight > 0
    assert found.image_map.equal(tuned.image_map)
    assert found.prototypes.equal(last.prototypes)
    assert found.assignments is not None and found.assignments.equal(last.assignments)
    # Zero-shot's own labels are not looked at.
    blind = replace(data, pseudo_labels=torch.zeros_like(data.pseudo_labels))
    other = tune_plus(LATTE, ANCHORED, blind, seed=3, scale=20.0)
    assert other.prototypes.equal(found.prototypes)


def test_better_than_zero_shot() -> None:
    data, truth = domain()
    found = tune_plus(LATTE, ANCHORED, data, scale=20.0)
    before = float((data.pseudo_labels == truth).float().mean())
    after = classify(unit(data.image_embeds @ found.image_map), found.prototypes).argmax(1)
    assert float((after == truth).float().mean()) > before + 0.05


def test_prototypes_only_has_no_map() -> None:
    data, _ = domain()
    found = tune_plus(LATTE.model_copy(update={"train": "prototypes"}), ANCHORED, data, scale=20.0)
    assert found.image_map is None
    torch.testing.assert_close(found.prototypes.norm(dim=1), torch.ones(5))


def test_errors_say_what_it_needs() -> None:
    data, _ = domain()
    for cfg, given, message in (
        (LATTE.model_copy(update={"train": "all"}), data, "latteclip_plus works on cached features"),
        (LATTE, replace(data, image_embeds=None), "image_embeds are needed"),
        (LATTE, replace(data, class_texts=torch.ones(5, 4, dtype=torch.int64)), "needed as embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_plus(cfg, ANCHORED, given)


def test_texts_that_are_worth_nothing_leave_the_model_without_texts() -> None:
    data, _ = domain()
    assert data.image_texts is not None
    none = replace(data, image_texts=None, group_texts=None, group_classes=None)
    without = tune_plus(LATTE, ANCHORED, none, scale=20.0).prototypes
    assert not tune_plus(LATTE, ANCHORED, data, scale=20.0).prototypes.equal(without)
    others = data.image_texts[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    for independent in (True, False):
        worthless = replace(data, image_texts=others, group_texts=others, independent_texts=independent)
        found = tune_plus(LATTE, ANCHORED, worthless, scale=20.0)
        assert found.text_weight == 0 and found.prototypes.equal(without)


def test_texts_read_off_the_features_have_no_say_but_in_the_targets() -> None:
    data, _ = domain()
    first = transduce(ANCHORED, data.image_features, data.class_features, 20.0)
    tuned = tune(LATTE, replace(data, pseudo_labels=first.labels), scale=20.0)
    last = transduce(ANCHORED, unit(data.image_features @ tuned.image_map), tuned.prototypes, 20.0)
    found = tune_plus(LATTE, ANCHORED, replace(data, independent_texts=False), scale=20.0)
    assert found.text_weight == 0 and found.prototypes.equal(last.prototypes)
