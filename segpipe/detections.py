"""What a model says about an image: plain arrays on the host, and which of it a run keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grids:
    """N low-resolution masks and where they lie in the image.

    A pixel (x, y) looks at grid position ((x - origin) + 0.5) * scale + offset - 0.5, bilinearly, edges clamped.

    Attributes:
        values: (N, h, w) float32, probabilities or logits.
        threshold: a pixel belongs to the mask where the enlarged value is above it.
        scale_xy: (N, 2) float32, grid cells per image px.
        offset_xy: (N, 2) float32, grid cells.
        origin_xy: (N, 2) int64, px.
        clip_xyxy: (N, 4) int64, px, ends exclusive; may reach outside the image.
    """

    values: FloatArray
    threshold: float
    scale_xy: FloatArray
    offset_xy: FloatArray
    origin_xy: IntArray
    clip_xyxy: IntArray


@dataclass(frozen=True, slots=True)
class Frame:
    """How one image lies in the tensor that the model sees: resized, then padded right and below.

    Attributes:
        image_hw: upright image, px.
        resized_hw: the same image in the model's input, px.
        padded_hw: the model's input, px; images are batched only with images of the same padded shape.
    """

    image_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    padded_hw: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Prediction:
    """All instances of one image, by falling score, on the host.

    Attributes:
        boxes_xyxy: (N, 4) float32 px of the upright image.
        scores: (N,) float32 in [0, 1].
        category_ids: (N,) int64, the model's own ids.
        masks: N grids, or None for a model that gives boxes alone.
        num_candidates: detections over the score floor, after NMS and filters, before max_instances.
    """

    boxes_xyxy: FloatArray
    scores: FloatArray
    category_ids: IntArray
    masks: Grids | None
    num_candidates: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which detections a run keeps. The model applies it before it computes or gathers any mask.

    Attributes:
        score_threshold: a detection must score above it.
        category_thresholds: category_id to its own threshold.
        category_ids: the only categories to keep; None keeps all.
        max_instances: of what remains, the best this many of each image.
        mask_threshold: a pixel belongs to a mask where its probability is above it.
    """

    score_threshold: float = 0.05
    category_thresholds: Mapping[int, float] = field(default_factory=dict)
    category_ids: frozenset[int] | None = None
    max_instances: int = 100
    mask_threshold: float = 0.5

    def floors(self, num_ids: int) -> FloatArray:
        """Return the threshold of each category id 0 to num_ids - 1 as (num_ids,) float32; unwanted ones are inf."""
        floors = np.full(num_ids, self.score_threshold, dtype=np.float32)
        for category_id, threshold in self.category_thresholds.items():
            floors[category_id] = threshold
        if self.category_ids is not None:
            unwanted = [index for index in range(num_ids) if index not in self.category_ids]
            floors[unwanted] = np.inf
        return floors


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model is and what its category ids mean.

    Attributes:
        name: key of the model registry.
        categories: every id that the model can emit, with its name.
        category_space: `coco91` for torchvision's COCO models, else `own`.
        contiguous_ids: category_id to 0-based dense id; ids that the training data never used have none.
        weights: name or URI of the weights, empty without weights.
        weights_sha256: of the weights file, empty without weights.
        licence: SPDX id or short note for code and weights.
    """

    name: str
    categories: Mapping[int, str]
    category_space: str
    contiguous_ids: Mapping[int, int]
    weights: str
    weights_sha256: str
    licence: str
