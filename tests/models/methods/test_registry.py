"""Methods by name: each adapts, has its own answer, and some have none to a seed."""

from __future__ import annotations

import pytest
import torch

from latteflow.models.methods.adaptation import PairData, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.latteclip.tuning import classify
from latteflow.models.methods.pc_clip import PcClipSettings
from latteflow.models.methods.registry import METHODS, adapt
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce
from latteflow.models.vectors import unit

ON_FEATURES = [method for method in METHODS if method != "clamp"]
CFG, ANCHORED = LatteClipSettings(epochs=3, batch_size=8, lr=1e-3), TransductionSettings(anchor=5)
COMPARED = PcClipSettings(epochs=2, batch_size=8, lr=1e-3)


@pytest.fixture(scope="module")
def data() -> TuneData:
    generator = torch.Generator().manual_seed(0)
    classes = unit(torch.randn(3, 8, generator=generator))
    truth = torch.arange(48) % 3
    texts = unit(classes + 0.35 * torch.randn(3, 8, generator=generator))
    embeds = classes[truth] + 0.35 * torch.randn(48, 8, generator=generator)
    described = unit(classes[truth] + 0.2 * torch.randn(48, 8, generator=generator))
    z = classify(unit(embeds - embeds.mean(0)), texts).argmax(1)
    first = torch.arange(48)
    pairs = PairData(first=first, second=(first + 1) % 48, texts=torch.randn(48, 8, generator=generator))
    return TuneData(
        pairs=pairs,
        pseudo_labels=z,
        class_texts=texts,
        image_texts=described,
        image_embeds=embeds,
        centre=embeds.mean(0),
    )


@pytest.mark.parametrize("method", ON_FEATURES)
def test_a_seed_decides_unless_there_is_nothing_random(data: TuneData, method: str) -> None:
    first, again, other = (adapt(method, data, CFG, ANCHORED, COMPARED, seed=seed, scale=20.0) for seed in (0, 0, 1))
    for name in ("prototypes", "image_map"):
        a, b = getattr(first, name), getattr(again, name)
        assert (a is None and b is None) or a.equal(b)
    same = first.prototypes.equal(other.prototypes) and (
        first.image_map is None or first.image_map.equal(other.image_map)
    )
    assert same == (not METHODS[method].is_seeded)


def test_no_two_methods_are_the_same(data: TuneData) -> None:
    scores = []
    for method in ON_FEATURES:
        found = adapt(method, data, CFG, ANCHORED, COMPARED, scale=20.0)
        moved = data.image_embeds - data.centre
        scores.append(unit(moved if found.image_map is None else moved @ found.image_map) @ found.prototypes.T)
    assert not any(a.allclose(b) for i, a in enumerate(scores) for b in scores[:i])


def test_transduction_is_of_the_centred_features(data: TuneData) -> None:
    found = adapt("transduction", data, CFG, ANCHORED, scale=20.0)
    expected = transduce(ANCHORED, unit(data.image_embeds - data.centre), data.class_texts, 20.0)
    assert found.prototypes.equal(expected.prototypes) and found.assignments.equal(expected.assignments)
    with pytest.raises(ValueError, match="image_embeds are needed"):
        adapt("transduction", TuneData(pseudo_labels=data.pseudo_labels, class_texts=data.class_texts), CFG, ANCHORED)
