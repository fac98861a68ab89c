"""Training views: the LatteCLIP recipe (method description, section 3.3), on PIL images of any model."""

from __future__ import annotations

import math
import random

from PIL.Image import Image
from torchvision.transforms import functional as tf

from latteflow.models.towers.images import to_rgb


def augment(image: Image, seed: int) -> Image:
    """Random crop (area 0.9 to 1, aspect 3/4 to 4/3), colour jitter with probability 0.8, grey with 0.2; no flip.

    Args:
        image: any PIL image.
        seed: fixes every draw.

    Returns:
        RGB image, not resized: the model's own preprocessing follows.
    """
    draw = random.Random(seed)
    image = _crop(to_rgb(image), draw)
    if draw.random() < 0.8:
        changes = [
            (tf.adjust_brightness, draw.uniform(0.5, 1.5)),
            (tf.adjust_contrast, draw.uniform(0.5, 1.5)),
            (tf.adjust_saturation, draw.uniform(0.5, 1.5)),
            (tf.adjust_hue, draw.uniform(-0.1, 0.1)),
        ]
        draw.shuffle(changes)
        for change, amount in changes:
            image = change(image, amount)
    if draw.random() < 0.2:
        image = tf.rgb_to_grayscale(image, num_output_channels=3)
    return image


def _crop(image: Image, draw: random.Random) -> Image:
    for _ in range(10):
        area = image.width * image.height * draw.uniform(0.9, 1.0)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
            return image.crop((left, top, left + width, top + height))
    return image  # too narrow for any crop of that area and aspect
