"""Which categories are taken for which: instances of a run matched with annotated ones whatever their category."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from segpipe.coco.annotations import Annotations
from segpipe.coco.masks import to_rle

Result = Mapping[str, Any]


def count_confusions(
    annotations: Annotations,
    results: Sequence[Result],
    *,
    score_threshold: float,
    iou_threshold: float = 0.5,
    masks: bool = True,
) -> npt.NDArray[np.int64]:
    """Count annotated instances by what they were taken for.

    In each image the results, by falling score, each take the annotated instance that they overlap most, if the IoU
    reaches the threshold and it is still free; crowds are left out.

    Args:
        annotations: the dataset.
        results: COCO results in its ids.
        score_threshold: of the results, leave out what scores lower.
        iou_threshold: least overlap of a match.
        masks: IoU of masks; else of boxes.

    Returns:
        (K + 1, K + 1), categories by rising id: [annotated, taken for]; the last column counts annotated instances
        that were missed, the last row results where nothing is.
    """
    rank = {category_id: index for index, category_id in enumerate(sorted(annotations.categories))}
    counts = np.zeros((len(rank) + 1, len(rank) + 1), np.int64)
    by_image: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        if result["score"] >= score_threshold:
            by_image[result["image_id"]].append(result)
    for image_id, everything in annotations.by_image().items():
        image = annotations.images[image_id]
        truth = [one for one in everything if not one["iscrowd"]]
        found = sorted(by_image[image_id], key=lambda one: -one["score"])
        taken = _match(_overlaps(truth, found, image, masks=masks), iou_threshold)
        for index, result in enumerate(found):
            row = rank[truth[taken[index]]["category_id"]] if index in taken else len(rank)
            counts[row, rank[result["category_id"]]] += 1
        for index in set(range(len(truth))) - set(taken.values()):
            counts[rank[truth[index]["category_id"]], len(rank)] += 1
    return counts


def _overlaps(
    truth: Sequence[Result], found: Sequence[Result], image: Mapping[str, Any], *, masks: bool
) -> npt.NDArray[np.float64]:
    """Return the (len(found), len(truth)) IoU."""
    if not truth or not found:
        return np.zeros((len(found), len(truth)))
    size = {"height": image["height"], "width": image["width"]}
    sides = [[to_rle(one["segmentation"], **size) if masks else one["bbox"] for one in side] for side in (found, truth)]
    ious: npt.NDArray[np.float64] = np.asarray(coco_mask.iou(*sides, [0] * len(truth)), dtype=np.float64)
    return ious


def _match(ious: npt.NDArray[np.float64], threshold: float) -> dict[int, int]:
    """Return for each result, by falling score, the free annotated instance that it overlaps most."""
    taken: dict[int, int] = {}
    free = np.ones(ious.shape[1], dtype=bool)
    for index, row in enumerate(ious):
        candidates = np.where(free, row, -1.0)
        if candidates.size and candidates.max() >= threshold:
            taken[index] = int(candidates.argmax())
            free[taken[index]] = False
    return taken
