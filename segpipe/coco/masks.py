"""COCO's forms of a mask (polygons, uncompressed and compressed run lengths), to compressed codes and to pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]


def to_rle(segmentation: Segmentation, *, height: int, width: int) -> dict[str, Any]:
    """Return a mask in any of COCO's forms as one compressed code.

    Args:
        segmentation: polygons [[x0, y0, x1, y1, ...], ...] in px, or `{"size", "counts"}`, counts as a list or text.
        height: px.
        width: px.

    Returns:
        `{"size": [height, width], "counts": str}`.
    """
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            return {"size": [height, width], "counts": counts}
        code = coco_mask.frPyObjects(dict(segmentation), height, width)
    else:
        code = coco_mask.merge(coco_mask.frPyObjects([list(polygon) for polygon in segmentation], height, width))
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def decode_segmentation(segmentation: Segmentation, *, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a mask in any of COCO's forms as (height, width) uint8 of 0 and 1."""
    pixels: npt.NDArray[np.uint8] = coco_mask.decode(to_rle(segmentation, height=height, width=width))
    return pixels
