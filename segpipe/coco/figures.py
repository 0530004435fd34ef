"""The twelve COCO figures, and what they are made of, by pycocotools, which is the reference.

Mask figures take an instance's size from its mask: pycocotools takes it from the box where a result has one (loadRes),
which moves the figures for small, medium and large; detectron2 leaves the box out for the same reason.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IouType = Literal["segm", "bbox"]

FIGURE_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, slots=True)
class Figures:
    """How good some results are.

    Attributes:
        values: the twelve figures by name, in [0, 1]; -1 where there is no such object in the annotations.
        ap_by_category: category id to AP and AP50; -1 as above.
        precision: (T, R, K, A, M) as COCOeval has it: IoU threshold, recall step, category, size, max_dets.
        category_ids: of K.
    """

    values: Mapping[str, float]
    ap_by_category: Mapping[int, tuple[float, float]]
    precision: npt.NDArray[np.float64]
    category_ids: tuple[int, ...]


def compute_figures(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    iou_type: IouType,
    max_dets: tuple[int, int, int] = (1, 10, 100),
    image_ids: Sequence[int] | None = None,
) -> Figures:
    """Compare results with annotations.

    Args:
        dataset: COCO dataset.
        results: COCO results; `segmentation` is needed for `segm`, `bbox` for `bbox`.
        iou_type: of masks or of boxes.
        max_dets: instances of each image and category that count, for AR1, AR10 and for all other figures.
        image_ids: images to look at; None for all of the dataset.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every step
        truth = COCO()
        # Entries are copied: pycocotools writes into them.
        # Their ids count from 1: to pycocotools a match with id 0 is none.
        numbered = [{**one, "id": number} for number, one in enumerate(dataset["annotations"], start=1)]
        truth.dataset = {"info": {}, **dataset, "annotations": numbered}
        truth.createIndex()
        other = "bbox" if iou_type == "segm" else "segmentation"
        found = [{key: value for key, value in result.items() if key != other} for result in results]
        predicted = truth.loadRes(found) if found else _no_results(truth)
        evaluation = COCOeval(truth, predicted, iou_type)
        evaluation.params.maxDets = list(max_dets)
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    category_ids = tuple(int(index) for index in evaluation.params.catIds)
    return Figures(
        values=dict(zip(FIGURE_NAMES, _twelve(precision, recall), strict=True)),
        ap_by_category={
            index: (_mean(precision[:, :, rank, 0, -1]), _mean(precision[0, :, rank, 0, -1]))
            for rank, index in enumerate(category_ids)
        },
        precision=precision,
        category_ids=category_ids,
    )


def _no_results(truth: COCO) -> COCO:
    empty = COCO()
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _twelve(precision: npt.NDArray[np.float64], recall: npt.NDArray[np.float64]) -> list[float]:
    """Return the figures as COCOeval.summarize prints them, for any max_dets: summarize itself knows only 100."""
    sizes = [_mean(precision[:, :, :, size, -1]) for size in (1, 2, 3)]
    at_iou = [_mean(precision[step, :, :, 0, -1]) for step in (0, 5)]
    recalls = [_mean(recall[:, :, 0, rank]) for rank in (0, 1, 2)]
    recalls_by_size = [_mean(recall[:, :, size, -1]) for size in (1, 2, 3)]
    return [_mean(precision[:, :, :, 0, -1]), *at_iou, *sizes, *recalls, *recalls_by_size]


def _mean(values: npt.NDArray[np.float64]) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
