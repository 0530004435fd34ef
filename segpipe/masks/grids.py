"""Low-resolution mask grids to COCO RLE without a full-size mask.

RoI masks of Mask R-CNN, prototypes of YOLO, logits of DETR or SAM are all the same thing: a small float32
grid, where it lies in the image, a threshold, and a rectangle that clips it. Enlarged bilinearly, such a
mask can cross its threshold at most once between two neighbouring grid nodes of an image column. So only
grid cells whose four corners disagree can hold an outline, and only those are visited: the cost is the
outline's, not the image's.

The arithmetic is that of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` on a CPU, so the
result equals pasting, thresholding and pycocotools. Where a processor rounds differently, `encode_grids` notices by
itself and takes the slower torch path (`portable.py`).
"""

import logging
import sys
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from segpipe.detections import Grids
from segpipe.masks.compiled import IntArray, encode_all

FloatArray = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


def encode_grids_compiled(grids: Grids, *, height: int, width: int) -> tuple[list[str], IntArray]:
    """Encode grids with the compiled outline tracer. Same contract as `encode_grids`."""
    num_masks = len(grids.values)
    affine = np.empty((num_masks, 6), np.float32)
    affine[:, 0:2] = grids.scale_xy
    affine[:, 2:4] = grids.offset_xy
    affine[:, 4:6] = grids.origin_xy
    clips = np.clip(grids.clip_xyxy, 0, [width, height, width, height]).astype(np.int64)
    values = np.ascontiguousarray(grids.values, dtype=np.float32)
    text, ends, areas = encode_all(values, np.float32(grids.threshold), affine, clips, (height, width))
    raw = text.tobytes().decode("ascii")
    starts = [0, *ends[:-1].tolist()]
    return [raw[start:end] for start, end in zip(starts, ends.tolist(), strict=True)], areas


def encode_grids(grids: Grids, *, height: int, width: int) -> tuple[list[str], IntArray]:
    """Encode N mask grids as COCO RLE without building a full-size mask.

    Args:
        grids: N float32 grids, where each lies in the image, threshold and clip rectangles.
        height: rows of the image, px.
        width: columns of the image, px.

    Returns:
        N compressed counts in input order, and their areas (N,) int64 px; equal to enlarging bilinearly,
        keeping what is over the threshold, and pycocotools encoding.
    """
    if len(grids.values) == 0:
        return [], np.zeros(0, np.int64)
    if choose_encoder() == "compiled":
        return encode_grids_compiled(grids, height=height, width=width)
    from segpipe.masks.portable import encode_grids_portable  # torch loads slowly: only where it is needed

    return encode_grids_portable(grids, height=height, width=width)


def choose_encoder() -> Literal["compiled", "portable"]:
    """Return `portable` where this processor's torch rounds differently from the compiled code, else `compiled`.

    In a process that has not loaded torch there is nothing to differ from.
    """
    return "compiled" if "torch" not in sys.modules or _compiled_equals_torch() else "portable"


@cache
def _compiled_equals_torch() -> bool:
    """Encode some noise masks both ways, once in each process (some 20 ms)."""
    from segpipe.masks.portable import encode_grids_portable
    from segpipe.masks.roi import noise_roi_grids

    for seed, (height, width) in enumerate([(480, 640), (61, 47), (1080, 1920)]):
        grids = noise_roi_grids(seed, height=height, width=width)
        compiled, _ = encode_grids_compiled(grids, height=height, width=width)
        portable, _ = encode_grids_portable(grids, height=height, width=width)
        if compiled != portable:
            logger.warning("mask_encoder=portable reason='this processor rounds differently from the compiled code'")
            return False
    return True
