"""COCO results (a JSON list of masks, boxes and scores): read, and checked against the dataset that they are of."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segpipe.coco.annotations import Annotations, polygon_problem, rle_problem
from segpipe.errors import InputError
from segpipe.records import Location
from segpipe.storage import read_bytes


@dataclass(frozen=True, slots=True)
class Results:
    """Checked results.

    Attributes:
        by_image: COCO image id to its results, by falling score.
        sha256: of the file.
        problems: in words, to where.
    """

    by_image: Mapping[int, Sequence[Mapping[str, Any]]]
    sha256: str
    problems: Mapping[str, Sequence[str]]


def read_results(place: Location, truth: Annotations, *, contiguous: bool) -> Results:
    """Read COCO results and check every one of them.

    Args:
        place: of the JSON file.
        truth: the dataset that they are of.
        contiguous: category ids of the results count the dataset's categories from 0.

    Raises:
        InputError: if it is no list of results, or they belong to another dataset.
        StoreError: if the store does not answer.
    """
    try:
        content = read_bytes(place)
        entries = json.loads(content)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no results file at {place.uri}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{place.uri}: is no JSON; give COCO results, a list of objects") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        hint = "; it looks like annotations, which go to --annotations" if isinstance(entries, dict) else ""
        raise InputError(f"{place.uri}: holds no COCO results, which are a JSON list of objects{hint}")
    ids = sorted(truth.categories)
    to_id = dict(enumerate(ids)) if contiguous else {index: index for index in ids}
    _check_belonging(place, entries, truth, to_id, contiguous=contiguous)
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    for position, entry in enumerate(entries):
        image = truth.images.get(entry.get("image_id", -1))
        problem = "results of images that are not listed skipped" if image is None else _problem(entry, image)
        if problem is not None:
            problems[problem].append(f"result {position}")
            continue
        by_image[entry["image_id"]].append({**entry, "category_id": to_id[entry["category_id"]]})
    for found in by_image.values():
        found.sort(key=lambda entry: -float(entry["score"]))  # stable: equal scores stay in the file's order
    return Results(by_image, hashlib.sha256(content).hexdigest(), problems)


def _check_belonging(
    place: Location, entries: Sequence[Mapping[str, Any]], truth: Annotations, to_id: Mapping[int, int], *,
    contiguous: bool,
) -> None:  # fmt: skip
    """Refuse results of another dataset.

    Raises:
        InputError: if no image is the dataset's, or a category is not.
    """
    wrong = next((entry for entry in entries if not _has_ids(entry)), None)
    if wrong is not None:
        raise InputError(f"{place.uri}: the result {str(wrong)[:80]} has no whole numbers as image_id and category_id")
    images = {entry.get("image_id") for entry in entries}
    if images and not images & truth.images.keys():
        raise InputError(
            f"{place.uri}: none of its {len(images):,} images is in {truth.uri} (its ids are such as "
            f"{next(iter(images))!r}, there {next(iter(truth.images), 'none')!r}); give its own annotations"
        )
    unknown = sorted({str(entry.get("category_id")) for entry in entries if entry.get("category_id") not in to_id})
    if unknown:
        ranks = {entry.get("category_id") for entry in entries} <= set(range(len(truth.categories)))
        fix = "give --contiguous if they count the categories from 0" if ranks and not contiguous else (
            "give the annotations that the model was trained with"
        )  # fmt: skip
        raise InputError(
            f"{place.uri}: has categories that {truth.uri} has not ({', '.join(unknown[:8])}; known are "
            f"{min(to_id, default=0)} to {max(to_id, default=0)}, {len(to_id)} of them); {fix}"
        )


def _has_ids(entry: Mapping[str, Any]) -> bool:
    return all(type(entry.get(name)) is int for name in ("image_id", "category_id"))


def _problem(entry: Mapping[str, Any], image: Mapping[str, Any]) -> str | None:
    """Say what is wrong with one result; None if nothing is."""
    score, box, segmentation = entry.get("score"), entry.get("bbox"), entry.get("segmentation")
    if not isinstance(score, (int, float)) or not 0 <= score <= 1:
        return "results without a score from 0 to 1 skipped"
    if box is None and segmentation is None:
        return "results without a mask or a box skipped"
    if box is not None and (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(side, (int, float)) and math.isfinite(side) for side in box)
    ):
        return "broken boxes skipped"
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        return rle_problem(segmentation, height=image["height"], width=image["width"])
    return polygon_problem(segmentation)
