"""Images as a model sees them that has not learnt from them, nor from their texts.

An adapted model knows the images it was adapted to by heart. So the images are halved, and a model that was adapted to
one half, in the same way, is asked about the other: what scores new images have, and whether their texts, which it has
not read, vouch for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from latteflow.models.methods.adaptation import Adapted, TuneData
from latteflow.models.vectors import unit

ENOUGH = 500
"""Scores from which on one half says how low those of new images are: to a share of 1 %, give or take half a point."""


class Half(NamedTuple):
    """Images, and a model that was adapted to the others.

    Attributes:
        rows: of the images, `(m,)` int64.
        features: their unit features by the model, `(m, dim)`.
        prototypes: its classifier, `(classes, dim)`.
    """

    rows: Tensor
    features: Tensor
    prototypes: Tensor


def halves(data: TuneData, adapt: Callable[[TuneData], Adapted]) -> Iterator[Half]:
    """Every second image; where that is fewer than :data:`ENOUGH`, then the others, as adapting takes its time.

    Args:
        data: with cached images.
        adapt: to images. Texts about groups are read by both halves.
    """
    embeds = data.image_embeds
    assert embeds is not None
    for first in (0, 1) if len(data) < 2 * ENOUGH else (0,):
        held, rest = (torch.arange(start, len(data), 2) for start in (first, 1 - first))
        model = adapt(data.take(rest))
        moved = embeds[held] if data.centre is None else embeds[held] - data.centre
        yield Half(
            rows=held,
            features=unit(moved if model.image_map is None else moved @ model.image_map.cpu()),
            prototypes=model.prototypes.cpu(),
        )
