"""Rows of the two tables, from what was read, decoded and predicted."""

import hashlib
from collections.abc import Mapping, Sequence

import pyarrow as pa

from segpipe.detections import Prediction
from segpipe.masks.grids import encode_grids
from segpipe.records import EncodedImage, ImageFailure, ImageHeader
from segpipe.tables import INSTANCES_SCHEMA


def failed_image_row(
    image: EncodedImage, shard: str, failure: ImageFailure, header: ImageHeader | None
) -> dict[str, object]:
    """Return the `images` row of an image that has no instances because its bytes are bad."""
    return {
        **_image_columns(image, shard, header),
        "status": "failed",
        "num_candidates": 0,
        "num_instances": 0,
        "instances_capped": False,
        "error_stage": failure.stage,
        "error_type": failure.type,
        "error_message": failure.message,
    }


def image_row(image: EncodedImage, shard: str, header: ImageHeader, prediction: Prediction) -> dict[str, object]:
    """Return the `images` row of an image that was segmented, with or without instances."""
    num_instances = len(prediction.scores)
    return {
        **_image_columns(image, shard, header),
        "status": "ok",
        "num_candidates": prediction.num_candidates,
        "num_instances": num_instances,
        "instances_capped": prediction.num_candidates > num_instances,
    }


def _image_columns(image: EncodedImage, shard: str, header: ImageHeader | None) -> dict[str, object]:
    return {
        "image_id": image.image_id,
        "shard": shard,
        "key": image.key,
        "ordinal": image.ordinal,
        # No bytes were read, no hash: the hash of nothing would make such images look like duplicates.
        "sha256": hashlib.sha256(image.data).hexdigest() if image.data else "",
        "byte_size": len(image.data),
        "format": header.format if header else None,
        "width": header.width if header else None,
        "height": header.height if header else None,
        "exif_orientation": header.exif_orientation if header else None,
    }


def instances_table(
    image_id: str, prediction: Prediction, *, image_hw: tuple[int, int], categories: Mapping[int, str]
) -> pa.Table:
    """Return the `instances` rows of one image, by falling score.

    Args:
        image_id: of the image.
        prediction: N instances.
        image_hw: upright image, px; the masks' frame.
        categories: category_id to name.
    """
    count = len(prediction.scores)
    height, width = image_hw
    boxes = prediction.boxes_xyxy
    codes: Sequence[str | None] = [None] * count
    areas: Sequence[int | None] = [None] * count
    if prediction.masks is not None:
        codes, area_array = encode_grids(prediction.masks, height=height, width=width)
        areas = area_array.tolist()
    return pa.table(
        {
            "image_id": pa.array([image_id] * count, pa.string()),
            "instance_id": pa.array(range(count), pa.int32()),
            "category_id": pa.array(prediction.category_ids, pa.int32()),
            "category": pa.array([categories[int(index)] for index in prediction.category_ids], pa.string()),
            "score": pa.array(prediction.scores, pa.float32()),
            "mask_score": pa.nulls(count, pa.float32()),
            "bbox_x": pa.array(boxes[:, 0], pa.float32()),
            "bbox_y": pa.array(boxes[:, 1], pa.float32()),
            "bbox_w": pa.array(boxes[:, 2] - boxes[:, 0], pa.float32()),
            "bbox_h": pa.array(boxes[:, 3] - boxes[:, 1], pa.float32()),
            "area": pa.array(areas, pa.int64()),
            "height": pa.array([height] * count, pa.int32()),
            "width": pa.array([width] * count, pa.int32()),
            "rle_counts": pa.array(codes, pa.string()),
        },
        schema=INSTANCES_SCHEMA,
    )
