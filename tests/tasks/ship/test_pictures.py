"""Inspection and model share one decode, in a process of its own: the same pictures, and none decoded here."""

import numpy as np
import pytest
from faults import mutants
from PIL import Image

from latteflow.models.towers.images import Reading, to_rgb
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, inspect, open_image
from latteflow.tasks.ship.pictures import Pictures


def taken(info: ImageInfo, picture: Image.Image) -> tuple[ImageInfo, Image.Image]:
    return info, picture


def test_what_comes_back_is_what_decoding_here_gives() -> None:
    sound = mutants.images()
    with Pictures(Reading(224, "crop"), ImageLimits(), 1) as pictures:
        for name, found in zip(sound, pictures([*sound.values()], taken), strict=True):
            assert not isinstance(found, ImageRejected), name
            assert found[0] == inspect(sound[name], ImageLimits()), name
            with open_image(sound[name]) as image:
                np.testing.assert_array_equal(np.asarray(found[1]), np.asarray(to_rgb(image)), name)


def test_a_large_jpeg_comes_small_and_is_decoded_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    large = mutants.encoded(Image.effect_mandelbrot((1600, 1200), (-2, -1, 1, 1), 100).convert("RGB"), "JPEG")
    with Pictures(Reading(224, "crop"), ImageLimits(), 1) as pictures:
        monkeypatch.setattr(Image, "open", None)  # of this process
        cut, found, wide = pictures([large[:-400], large, large], taken)[:3]
        (refused,) = pictures([large], taken, most=1000)
    assert isinstance(cut, ImageRejected) and cut.reason == "corrupt"
    assert isinstance(refused, ImageRejected) and refused.reason == "too_large"
    assert not isinstance(found, ImageRejected) and found[0] == ImageInfo("jpg", 1600, 1200)
    assert found[1].size == (800, 600)  # a half: a quarter would be less than 2.5 times what the model reads
    assert not isinstance(wide, ImageRejected) and wide[1].tobytes() == found[1].tobytes()
