"""Which images are harder."""

import numpy as np
from PIL import Image, ImageFilter

from latteflow.tasks.report.slices import _thirds, nearest, sharpness


def test_blur_is_seen_at_any_size() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    for side in (20, 300):
        image = Image.fromarray(noise[:side, :side])
        assert sharpness(image) > 10 * sharpness(image.filter(ImageFilter.GaussianBlur(3)))
    assert sharpness(Image.new("RGB", (9, 5), "red")) == 0


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    grey = np.zeros((5, 5), np.uint8)
    grey[2, 2] = 10
    values = [-40] + 4 * [10] + 20 * [0]
    assert sharpness(Image.fromarray(grey)) == np.var(values)


def test_the_nearest_of_many() -> None:
    generator = np.random.default_rng(1)
    rows, others = generator.normal(size=(5000, 8)).astype(np.float32), generator.normal(size=(7, 8)).astype(np.float32)
    place, cosine = nearest(rows, others)
    assert (place == (rows @ others.T).argmax(1)).all() and np.allclose(cosine, (rows @ others.T).max(1))


def test_thirds_are_named_by_what_is_in_them() -> None:
    rows = np.arange(6) + 10
    found = list(_thirds("size", ("small", "middle", "large"), rows, np.array([1.0, 2, 3, 4, 5, 6]), " px"))
    assert [(each.name, each.rows.tolist()) for each in found] == [
        ("small third (1 to 2 px)", [10, 11]),
        ("middle third (3 to 4 px)", [12, 13]),
        ("large third (5 to 6 px)", [14, 15]),
    ]
    assert len(list(_thirds("size", ("small", "middle", "large"), rows, np.ones(6), ""))) == 1
