"""A segmenter without weights: each 16 x 16 px cell of strong colour is an instance.

Made for tests and for measuring what everything around a model costs: rows depend on the image alone, are the same
on any machine, need no torch, and any number of instances can be drawn into a test image. A cell is an instance where
the mean of one colour channel beats both others; the lead is the score, the channel the category, and the mask is
the disc in the cell, handed on as a grid like any model's.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from segpipe.detections import FloatArray, Frame, Prediction, Selection, UInt8Array
from segpipe.masks.roi import roi_grids
from segpipe.models import ModelRequest

CATEGORIES: Mapping[int, str] = {1: "red", 2: "green", 3: "blue"}
CELL_PX = 16
_ROI_SIZE = 28


class BlankSegmenter:
    """Finds cells of strong colour. See `segpipe.models.Segmenter` for the seam."""

    def __init__(self, selection: Selection, *, batch_size: int) -> None:
        self._selection = selection
        self._floors = selection.floors(max(CATEGORIES) + 1)
        self.batch_size = batch_size
        self.resolved: Mapping[str, str] = {"device": "cpu", "dtype": "float32"}

    def prepare(self, image: UInt8Array) -> tuple[UInt8Array, Frame]:
        """Return the image as it is; it is neither resized nor padded."""
        size = (image.shape[0], image.shape[1])
        return image, Frame(size, size, size)

    def forward(self, pixels: Sequence[UInt8Array], frames: Sequence[Frame]) -> list[FloatArray]:  # noqa: ARG002
        """Return each image's mean colour of every cell, (rows, columns, 3) float32."""
        return [_cell_means(image) for image in pixels]

    def decode(self, raw: Sequence[FloatArray], frames: Sequence[Frame]) -> list[Prediction]:
        """Keep the cells whose lead is over the floor of their category, the best first."""
        return [self._decode_one(means, frame) for means, frame in zip(raw, frames, strict=True)]

    def _decode_one(self, means: FloatArray, frame: Frame) -> Prediction:
        rows, columns = means.shape[:2]
        ranked = np.sort(means.reshape(-1, 3), axis=1)
        scores = ((ranked[:, 2] - ranked[:, 1]) / np.float32(255)).astype(np.float32)
        category_ids = means.reshape(-1, 3).argmax(axis=1) + 1
        candidates = np.flatnonzero(scores > self._floors[category_ids])
        kept = candidates[np.argsort(-scores[candidates], kind="stable")][: self._selection.max_instances]
        row, column = np.divmod(kept, columns if rows else 1)
        corners = np.stack([column, row, column + 1, row + 1], axis=1).astype(np.float32) * CELL_PX
        limits = np.array([frame.image_hw[1], frame.image_hw[0]] * 2, dtype=np.float32)
        boxes = np.minimum(corners, limits)
        return Prediction(
            boxes_xyxy=boxes,
            scores=scores[kept],
            category_ids=category_ids[kept].astype(np.int64),
            masks=roi_grids(_discs(len(kept)), boxes, threshold=self._selection.mask_threshold),
            num_candidates=len(candidates),
        )


def load(request: ModelRequest) -> BlankSegmenter:
    """Return the segmenter; there is nothing to load."""
    return BlankSegmenter(request.selection, batch_size=request.batch_size or 1)


def _cell_means(image: UInt8Array) -> FloatArray:
    """Return the mean colour of every cell; cells at the right and lower edge may be smaller."""
    if image.size == 0:
        return np.zeros((0, 0, 3), np.float32)
    rows = np.arange(0, image.shape[0], CELL_PX)
    columns = np.arange(0, image.shape[1], CELL_PX)
    sums = np.add.reduceat(np.add.reduceat(image, rows, axis=0, dtype=np.int64), columns, axis=1)
    heights = np.diff(np.append(rows, image.shape[0]))
    widths = np.diff(np.append(columns, image.shape[1]))
    means: FloatArray = (sums / (heights[:, None] * widths[None, :])[..., None]).astype(np.float32)
    return means


def _discs(count: int) -> FloatArray:
    """Return `count` soft discs, (count, 28, 28) float32 in [0, 1], over 0.5 inside the radius."""
    axis = (np.arange(_ROI_SIZE, dtype=np.float32) + np.float32(0.5)) / np.float32(_ROI_SIZE / 2) - np.float32(1)
    radius = np.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    disc = np.clip(np.float32(1.4) - radius, 0, 1).astype(np.float32)
    return np.broadcast_to(disc, (count, _ROI_SIZE, _ROI_SIZE)).copy()
