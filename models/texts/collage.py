"""The picture of look-alikes that an LMM describes in one sentence."""

import math
from collections.abc import Sequence

from PIL import Image

SIDE_PX, GAP_PX = 672, 20

Box = tuple[int, int, int, int]
"""Width, height, left, top in pixels."""


def layout(sizes: Sequence[tuple[int, int]], side_px: int = SIDE_PX, gap_px: int = GAP_PX) -> list[Box]:
    """Where each image goes on the canvas (LatteCLIP 2.2).

    The grid has `max(2, ceil(sqrt(n)))` square cells a side, filled row by row. Each image is scaled to fit its
    cell, aspect kept, and centered; fractions of a pixel are cut.

    Args:
        sizes: width and height of each image, pixels, at least 1.
        side_px: side of the square canvas.
        gap_px: space between two cells; there is none at the border.

    Returns:
        One box per image, in the same order.

    Raises:
        ValueError: there is no image, or the cells would have no room.
    """
    grid = max(2, math.ceil(math.sqrt(len(sizes))))
    cell = (side_px - gap_px * (grid - 1)) // grid
    if not sizes or cell < 1:
        raise ValueError(f"{len(sizes)} images do not fit a {side_px} px canvas with gaps of {gap_px} px")
    boxes = []
    for i, (width, height) in enumerate(sizes):
        longest = max(width, height)
        w, h = max(1, width * cell // longest), max(1, height * cell // longest)
        row, column = divmod(i, grid)
        boxes.append((w, h, column * (cell + gap_px) + (cell - w) // 2, row * (cell + gap_px) + (cell - h) // 2))
    return boxes


def collage(images: Sequence[Image.Image], side_px: int = SIDE_PX, gap_px: int = GAP_PX) -> Image.Image:
    """Images on one black square canvas, 2 x 2 for up to four of them (LatteCLIP 2.2), resized by Lanczos.

    Args:
        images: at least one, any size; converted to RGB, so flatten transparency before.
        side_px, gap_px: see `layout`.

    Returns:
        RGB image, `side_px` square.
    """
    canvas = Image.new("RGB", (side_px, side_px))
    for image, (width, height, left, top) in zip(
        images, layout([i.size for i in images], side_px, gap_px), strict=True
    ):
        canvas.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return canvas
