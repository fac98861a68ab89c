"""latteclip_plus: what it hands on from step to step, that it helps, that texts are read and weighed, its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.latteclip import TuneData, classify, latte_step, tune, unit
from models.plus import tune_plus
from models.settings import LatteClipPlusSettings, LatteClipSettings, TransductionSettings
from models.transduction import transduce

PLUS = LatteClipPlusSettings(transduction=TransductionSettings(anchor=5))
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
    first = transduce(PLUS.transduction, x, data.class_texts, 20.0)
    tuned = tune(LATTE, replace(data, pseudo_labels=first.labels), seed=3, scale=20.0)
    last = transduce(PLUS.transduction, unit(data.image_embeds @ tuned.image_map), tuned.prototypes, 20.0)
    found = tune_plus(PLUS, LATTE, data, seed=3, scale=20.0)
    assert found.first_labels.equal(first.labels)
    assert found.image_map.equal(tuned.image_map)
    assert found.prototypes.equal(last.prototypes)
    assert found.assignments.equal(last.assignments)
    # Zero-shot's own labels are not looked at.
    other = tune_plus(
        PLUS, LATTE, replace(data, pseudo_labels=torch.zeros_like(data.pseudo_labels)), seed=3, scale=20.0
    )
    assert other.prototypes.equal(found.prototypes)


def test_better_than_zero_shot_and_rounds_are_told_apart() -> None:
    data, truth = domain()
    found = tune_plus(PLUS.model_copy(update={"rounds": 2}), LATTE, data, scale=20.0)
    before = float((data.pseudo_labels == truth).float().mean())
    after = classify(unit(data.image_embeds @ found.image_map), found.prototypes).argmax(1)
    assert float((after == truth).float().mean()) > before + 0.05
    assert [entry["round"] for entry in found.history] == [0, 0, 0, 1, 1, 1]


def test_prototypes_only_has_no_map() -> None:
    data, _ = domain()
    found = tune_plus(PLUS, LATTE.model_copy(update={"train": "prototypes"}), data, scale=20.0)
    assert found.image_map is None
    torch.testing.assert_close(found.prototypes.norm(dim=1), torch.ones(5))


def test_text_weights_multiply_the_mixers() -> None:
    data, _ = domain()
    n = len(data)
    nothing = replace(data, image_weights=torch.zeros(n), group_weights=torch.zeros(n))
    without = replace(data, image_texts=None, group_texts=None, group_classes=None)
    torch.testing.assert_close(tune(LATTE, nothing).image_map, tune(LATTE, without).image_map)
    whole = replace(data, image_weights=torch.ones(n), group_weights=torch.ones(n))
    assert tune(LATTE, whole).image_map.equal(tune(LATTE, data).image_map)
    x, z, texts = unit(data.image_embeds), data.pseudo_labels, data.image_texts
    args = (LATTE, x, data.class_texts, texts, texts, z, data.class_texts, 10.0)
    full, half = (latte_step(*args, has_image_text=w, has_group_text=w) for w in (torch.ones(n), torch.full((n,), 0.5)))
    raw_class, raw_image = full.weights[0] / half.weights[0], full.weights[1] / half.weights[1]
    torch.testing.assert_close(raw_image, 2 * raw_class)
    with pytest.raises(ValueError, match="image_weights must have 150 rows"):
        replace(data, image_weights=torch.ones(3))


def test_errors_say_what_it_needs() -> None:
    data, _ = domain()
    for cfg, given in (
        (LATTE.model_copy(update={"train": "all"}), data),
        (LATTE, replace(data, image_embeds=None)),
        (LATTE, replace(data, class_texts=torch.ones(5, 4, dtype=torch.int64))),
    ):
        with pytest.raises(ValueError, match="latteclip_plus works on cached features"):
            tune_plus(PLUS, cfg, given)
