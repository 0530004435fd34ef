"""RoI masks of Mask R-CNN as grids: where torchvision would paste them.

torchvision pads a (28, 28) mask by one zero cell on each side, grows the box by the same share, cuts its corners to
whole pixels and enlarges the mask to exactly that rectangle, clipped to the image
(`torchvision.models.detection.roi_heads`: expand_boxes, paste_mask_in_image).
"""

import numpy as np
import numpy.typing as npt

from segpipe.detections import Grids

FloatArray = npt.NDArray[np.float32]


def roi_grids(probs: FloatArray, boxes_xyxy: FloatArray, *, threshold: float = 0.5) -> Grids:
    """Place RoI masks in the image.

    Args:
        probs: (N, M, M) float32 in [0, 1], the mask head's output for the predicted category.
        boxes_xyxy: (N, 4) float32 px, may reach outside the image.
        threshold: a pixel belongs to the mask where the enlarged probability is above it.

    Returns:
        N grids of (M + 2, M + 2).

    Raises:
        ValueError: if the two arrays disagree on N.
    """
    if len(probs) != len(boxes_xyxy):
        raise ValueError(f"{len(probs)} masks but {len(boxes_xyxy)} boxes")
    size = probs.shape[-1]
    scale = np.float32((size + 2) / size)
    # float32 arithmetic in torchvision's own order: the corners decide which pixels the mask covers.
    x0, y0, x1, y1 = (boxes_xyxy[:, column].astype(np.float32) for column in range(4))
    half = np.float32(0.5)
    half_width, half_height = (x1 - x0) * half * scale, (y1 - y0) * half * scale
    center_x, center_y = (x1 + x0) * half, (y1 + y0) * half
    corners = np.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height], axis=1
    ).astype(np.int64)
    extent = np.maximum(corners[:, 2:] - corners[:, :2] + 1, 1)
    return Grids(
        values=np.pad(probs.astype(np.float32, copy=False), ((0, 0), (1, 1), (1, 1))),
        threshold=threshold,
        scale_xy=np.float32(size + 2) / extent.astype(np.float32),
        offset_xy=np.zeros((len(probs), 2), np.float32),
        origin_xy=corners[:, :2],
        clip_xyxy=np.concatenate([corners[:, :2], corners[:, :2] + extent], axis=1),
    )


def noise_roi_grids(seed: int, *, height: int, width: int, num_masks: int = 16) -> Grids:
    """Return RoI grids of white noise at random boxes, some outside the image: the hardest masks to encode.

    Every second one is saturated to 0 and 1, so that it meets the threshold exactly; every third is small.

    Args:
        seed: the same seed gives the same grids.
        height: rows of the image, px.
        width: columns of the image, px.
        num_masks: how many grids.
    """
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-0.2, 1.2, (num_masks, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    boxes[::3, 2:] = boxes[::3, :2] + rng.uniform(1, 50, boxes[::3, 2:].shape)
    probs = rng.random((num_masks, 28, 28), dtype=np.float32)
    probs[::2] = probs[::2].round()
    return roi_grids(probs, boxes)
