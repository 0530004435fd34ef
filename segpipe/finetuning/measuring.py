"""How good a network is while it learns: the validation images through it, and COCO's figures of what it finds."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.models.detection import MaskRCNN

from segpipe.coco.annotations import Annotations
from segpipe.coco.figures import compute_figures
from segpipe.detections import Selection
from segpipe.errors import ImageRejectedError
from segpipe.images import decode_image
from segpipe.masks.grids import encode_grids
from segpipe.models.maskrcnn import MaskRcnnSegmenter
from segpipe.records import Location
from segpipe.storage import read_bytes

_MAX_PIXELS = 200_000_000


def measure(model: MaskRCNN, validation: Sequence[tuple[Annotations, Location]], *, device: str) -> dict[str, float]:
    """Return the COCO figures of a network on labelled images, `segm AP`, `bbox AP50` and so on.

    Images that cannot be read count as images in which nothing was found.

    Args:
        model: put into evaluation mode, and left in it.
        validation: datasets in the network's own categories, and the folders of their images.
        device: that the network is on.
    """
    # What `segpipe run` keeps by default and torchvision measures with: the figures are then those of `segpipe eval`.
    selection = Selection(score_threshold=0.05, max_instances=100)
    segmenter = MaskRcnnSegmenter(model, selection, device=device, dtype=torch.float32, batch_size=1)
    results: list[dict[str, Any]] = []
    merged = _merged([annotations for annotations, _ in validation])
    for image_id, place in enumerate(_places(validation), start=1):
        results += _find(segmenter, place, image_id)
    figures = {kind: compute_figures(merged, results, iou_type=kind) for kind in ("segm", "bbox")}
    return {f"{kind} {name}": value for kind, found in figures.items() for name, value in found.values.items()}


def _places(validation: Sequence[tuple[Annotations, Location]]) -> list[Location]:
    return [
        folder / str(image["file_name"]) for annotations, folder in validation for image in annotations.images.values()
    ]


def _merged(datasets: Sequence[Annotations]) -> dict[str, Any]:
    """Return several datasets of the same categories as one, its images numbered in order from 1."""
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for dataset in datasets:
        numbers = {image_id: len(images) + rank for rank, image_id in enumerate(dataset.images, start=1)}
        images += [{**image, "id": numbers[image_id]} for image_id, image in dataset.images.items()]
        found += [{**one, "image_id": numbers[one["image_id"]]} for one in dataset.annotations]
    numbered = [{**one, "id": number} for number, one in enumerate(found, start=1)]
    categories = [dict(category) for category in datasets[0].categories.values()]
    return {"info": {}, "images": images, "annotations": numbered, "categories": categories}


def _find(segmenter: MaskRcnnSegmenter, place: Location, image_id: int) -> list[dict[str, Any]]:
    try:
        pixels = decode_image(read_bytes(place), max_pixels=_MAX_PIXELS).pixels
    except (ImageRejectedError, FileNotFoundError):
        return []
    tensor, frame = segmenter.prepare(pixels)
    prediction = segmenter.decode(segmenter.forward([tensor], [frame]), [frame])[0]
    if prediction.masks is None:
        return []
    height, width = frame.image_hw
    codes, _ = encode_grids(prediction.masks, height=height, width=width)
    rows = zip(prediction.boxes_xyxy.tolist(), prediction.scores, prediction.category_ids, codes, strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_id),
            "score": float(score),
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": {"size": [height, width], "counts": code},
        }
        for (left, top, right, bottom), score, category_id, code in rows
    ]
