"""A tower of which only the rows of its token table are trained that are used, against one that trains all."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.methods.latteclip import LatteClipSettings, tuning
from latteflow.models.methods.latteclip.vocabulary import vocabulary
from latteflow.models.settings import TrainingSettings

TEXT = {"context_length": 9, "vocab_size": 500, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}


def tower(**text: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT | text).double().eval()


def tuned(settings: TrainingSettings) -> Adapted:
    draws = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 40, (11, 9), generator=draws)
    texts[:, 6], texts[:, 7:] = 499, 0  # an end and padding, as open_clip's tokenizer has them
    pixels = torch.randn(8, 3, 16, 16, generator=draws, dtype=torch.float64)
    data = TuneData(
        pseudo_labels=torch.arange(8) % 3, class_texts=texts[:3], image_texts=texts[3:],
        pixels=lambda rows, seeds: pixels[rows],
    )  # fmt: skip
    cfg = LatteClipSettings(
        train="all", batch_size=4, epochs=3, lr=1e-2, warmup=1, weight_decay=0.2, scale=None, augment=False
    )
    return tuning.tune(cfg, data, settings, clip=tower())


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"micro_batch": 3}], ids=str)
def test_the_model_is_the_one_whose_whole_table_was_trained(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    some = tuned(TrainingSettings(**settings))
    monkeypatch.setattr(tuning, "vocabulary", lambda clip, tokens: None)
    whole = tuned(TrainingSettings(**settings))
    assert some.clip is not None and whole.clip is not None
    assert some.clip.state_dict().keys() == whole.clip.state_dict().keys()
    for one, other in zip(some.clip.state_dict().values(), whole.clip.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    before, after = (clip.state_dict()["token_embedding.weight"] for clip in (tower(), some.clip))
    assert (1 - after[100:499] / before[100:499]).min() > 1e-4  # rows that are not used have decayed all the same


def test_a_tower_that_looks_for_a_token_of_its_own_keeps_the_table() -> None:
    tokens = torch.tensor([[5, 499, 0]])
    assert vocabulary(tower(), tokens) is not None
    assert vocabulary(tower(pool_type="eos", eos_id=499), tokens) is None
    assert vocabulary(tower().requires_grad_(False), tokens) is None
