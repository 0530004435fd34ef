"""Pictures of predictions: each mask as a tint with an outline, its box, its category and score.

Drawn from the rows themselves (RLE and bbox), so a picture shows what the tables hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from segpipe.detections import UInt8Array

# Ten colours that stay apart on photographs, also for most colour-blind people (Okabe and Ito, and four more).
_COLORS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
    (213, 94, 0), (204, 121, 167), (148, 103, 189), (227, 119, 194), (23, 190, 207),
)  # fmt: skip
_TINT = 0.45


def draw_overlay(pixels: UInt8Array, instances: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw instances over an image.

    Args:
        pixels: (H, W, 3) uint8 RGB, upright.
        instances: rows of the `instances` table of this image, by falling score.

    Returns:
        An RGB image of the same size.
    """
    canvas = pixels.copy()
    for index, row in reversed(list(enumerate(instances))):  # the best on top
        if row["rle_counts"] is not None:
            _tint(canvas, _decode(row), _COLORS[index % len(_COLORS)])
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    size = max(12, min(pixels.shape[:2]) // 30)
    font = ImageFont.load_default(size)
    for index, row in reversed(list(enumerate(instances))):
        color = _COLORS[index % len(_COLORS)]
        left, top = row["bbox_x"], row["bbox_y"]
        draw.rectangle((left, top, left + row["bbox_w"], top + row["bbox_h"]), outline=color, width=max(1, size // 8))
        label = f"{row['category']} {row['score']:.2f}"
        box = draw.textbbox((left + 2, max(0, top - size - 4)), label, font=font)
        draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=color)
        draw.text((left + 2, max(0, top - size - 4)), label, fill=(0, 0, 0), font=font)
    return image


def _decode(row: Mapping[str, Any]) -> UInt8Array:
    mask: UInt8Array = coco_mask.decode({"size": [row["height"], row["width"]], "counts": row["rle_counts"]})
    return mask


def _tint(canvas: UInt8Array, mask: UInt8Array, color: tuple[int, int, int]) -> None:
    """Blend a colour into the pixels of a mask, and draw its outline in full colour, in place."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    inside = mask[window].astype(bool)
    padded = np.pad(inside, 1)
    interior = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    view = canvas[window]
    view[inside] = (view[inside] * (1 - _TINT) + np.array(color) * _TINT).astype(np.uint8)
    view[inside & ~interior] = color
