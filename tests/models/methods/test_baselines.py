"""The baselines: that they are what they say, and nothing more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from latteflow.models.methods.adaptation import TuneData
from latteflow.models.methods.baselines.tuning import flyp, self_training, wise_ft
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import classify
from latteflow.models.methods.losses import clip_loss
from latteflow.models.vectors import unit

pytestmark = pytest.mark.slow

CFG = LatteClipSettings(epochs=3, batch_size=8, lr=1e-3)


def domain(seed: int = 0, n: int = 48) -> tuple[TuneData, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = unit(torch.randn(3, 8, generator=generator))
    truth = torch.arange(n) % 3
    texts = unit(classes + 0.35 * torch.randn(3, 8, generator=generator))
    images = unit(classes[truth] + 0.35 * torch.randn(n, 8, generator=generator))
    return TuneData(pseudo_labels=classify(images, texts).argmax(1), class_texts=texts, image_embeds=2 * images), truth


def test_flyp_is_the_contrastive_loss_on_the_class_texts_and_leaves_them() -> None:
    data, _ = domain()
    found = flyp(CFG.model_copy(update={"batch_size": 48, "epochs": 1}), data, seed=0, scale=20.0)
    assert found.prototypes.equal(data.class_texts) or torch.allclose(found.prototypes, data.class_texts)
    expected = clip_loss(unit(data.image_embeds), data.class_texts[data.pseudo_labels], 10.0)
    assert found.history[0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    # Descriptions of the images, were there any, do not enter.
    described = TuneData(
        pseudo_labels=data.pseudo_labels, class_texts=data.class_texts, image_embeds=data.image_embeds,
        image_texts=torch.randn(48, 8),
    )  # fmt: skip
    torch.testing.assert_close(flyp(CFG, data).image_map, flyp(CFG, described).image_map)
    # Nor do LatteCLIP's settings of its texts.
    other = CFG.model_copy(update={"alpha": 0.3, "labels": "tuned", "mixer_axis": "column", "use_class_texts": False})
    assert flyp(CFG, data).image_map.equal(flyp(other, data).image_map)


def test_self_training_starts_with_the_given_labels_and_goes_on_with_its_own() -> None:
    data, _ = domain()
    one = CFG.model_copy(update={"batch_size": 48, "epochs": 1})
    found = self_training(one, data, scale=20.0)
    expected = F.cross_entropy(10 * unit(data.image_embeds) @ data.class_texts.T, data.pseudo_labels)
    assert found.history[0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    longer = self_training(CFG, data, seed=1)
    assert longer.history[-1]["loss"] < longer.history[0]["loss"]
    assert longer.image_map.equal(self_training(CFG, data, seed=1).image_map)
    assert not longer.image_map.equal(self_training(CFG, data, seed=2).image_map)
    with pytest.raises(ValueError, match="image_embeds are needed"):
        self_training(CFG, TuneData(pseudo_labels=data.pseudo_labels, class_texts=data.class_texts))


def test_wise_ft_is_half_way_between_flyp_and_zero_shot() -> None:
    data, _ = domain()
    tuned, found = flyp(CFG, data), wise_ft(CFG, data)
    torch.testing.assert_close(found.image_map, (tuned.image_map + torch.eye(8)) / 2)
    assert found.prototypes.equal(tuned.prototypes) and found.text_map is None
