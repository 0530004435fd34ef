"""COCO datasets (instances.json): read, checked, repaired where that is safe, and put into other categories.

Format: https://cocodataset.org/#format-data. What is wrong is counted and listed, never passed over in silence; a file
of another kind is refused. Knows JSON and polygons, not what the annotations are for.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from segpipe.errors import InputError
from segpipe.records import Location
from segpipe.storage import read_bytes

GroupBy = Literal["category", "supercategory"]
Problems = Mapping[str, Sequence[str]]

_LISTS = ("images", "annotations", "categories")
# A polygon needs three corners.
_MIN_POLYGON_NUMBERS = 6
# px; no image is larger
_FAR = 1e9


@dataclass(frozen=True, slots=True)
class Annotations:
    """A checked dataset.

    Attributes:
        uri: where it was read.
        images: image id to its entry (`file_name`, `height`, `width`, ...).
        categories: category id to its entry (`name`, `supercategory`).
        annotations: entries with `id`, `image_id`, `category_id`, `bbox`, `area`, `iscrowd`, `segmentation`.
        problems: what was wrong, in words, to the ids that it was found at.
        info: the rest of the file (`info`, `licenses`), as it stands.
    """

    uri: str
    images: Mapping[int, Mapping[str, Any]]
    categories: Mapping[int, Mapping[str, Any]]
    annotations: Sequence[Mapping[str, Any]]
    problems: Problems = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def as_dataset(self) -> dict[str, Any]:
        """Return the dataset as COCO's JSON has it, for pycocotools."""
        return {
            **self.info,
            "images": [dict(image) for image in self.images.values()],
            "categories": [dict(category) for category in self.categories.values()],
            "annotations": [dict(annotation) for annotation in self.annotations],
        }

    def by_image(self) -> dict[int, list[Mapping[str, Any]]]:
        """Return the annotations of each image; images without any have an empty list."""
        found: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in self.images}
        for annotation in self.annotations:
            found[annotation["image_id"]].append(annotation)
        return found


def read_annotations(place: Location, *, clip: bool = False) -> Annotations:
    """Read a COCO dataset and check every entry.

    Args:
        place: of the JSON file.
        clip: cut boxes at the image's border and drop those wholly outside, as training needs it; an evaluation
            leaves them as they are, for they are what figures are computed from.

    Returns:
        The usable entries; `problems` lists the others.

    Raises:
        InputError: if it is no COCO dataset, or its ids are not unique.
        StoreError: if the store does not answer.
    """
    tree = _read_json(place)
    images = _index(tree["images"], ("id", "file_name", "height", "width"), what="image", uri=place.uri)
    categories = _index(tree["categories"], ("id", "name"), what="category", uri=place.uri)
    problems: dict[str, list[str]] = defaultdict(list)
    kept, seen = [], set()
    for annotation in tree["annotations"]:
        checked = _check(annotation, images, categories, problems, clip=clip)
        if checked is None:
            continue
        if checked["id"] in seen:
            raise InputError(f"{place.uri}: annotation id {checked['id']} occurs twice; ids must be unique")
        seen.add(checked["id"])
        kept.append(checked)
    info = {key: value for key, value in tree.items() if key not in _LISTS}
    return Annotations(place.uri, images, categories, kept, dict(problems), info)


def regroup(annotations: Annotations, names: Mapping[str, int], *, by: GroupBy = "category") -> Annotations:
    """Put annotations into other categories by name; what belongs to none of them is left out.

    Args:
        annotations: of a dataset.
        names: name of each wanted category to its id.
        by: what the names are: of the dataset's categories, or of their supercategories.

    Raises:
        InputError: if no category of the dataset has one of the names.
    """
    targets = {}
    for category_id, category in annotations.categories.items():
        name = str(category["name"] if by == "category" else category.get("supercategory"))
        if name in names:
            targets[category_id] = names[name]
    if not targets:
        raise InputError(f"{annotations.uri}: {_no_common_name(annotations, names, by)}")
    return replace(
        annotations,
        categories={index: {"id": index, "name": name} for name, index in names.items()},
        annotations=[
            {**annotation, "category_id": targets[annotation["category_id"]]}
            for annotation in annotations.annotations
            if annotation["category_id"] in targets
        ],
    )


def category_names(annotations: Annotations, *, by: GroupBy = "category") -> list[str]:
    """Return the names of the categories, or of the supercategories, in the order of the file, each once."""
    key = "name" if by == "category" else "supercategory"
    return list(dict.fromkeys(str(category[key]) for category in annotations.categories.values() if category.get(key)))


def describe_problems(problems: Problems) -> list[str]:
    """Return one line for each kind of problem, with how often it was found and the first places."""
    return [
        f"{len(places):,} {what}: {', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"
        for what, places in problems.items()
    ]


def polygon_problem(segmentation: object) -> str | None:
    """Say what is wrong with a list of polygons; None if nothing is."""
    if not isinstance(segmentation, list) or not segmentation:
        return "annotations without a mask skipped"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < _MIN_POLYGON_NUMBERS or len(polygon) % 2:
            return "broken polygons skipped"
        if not all(isinstance(number, (int, float)) and abs(number) < _FAR for number in polygon):
            return "broken polygons skipped"
    return None


def rle_problem(segmentation: Mapping[str, Any], *, height: int, width: int) -> str | None:
    """Say what is wrong with one run-length code in COCO's JSON form; None if nothing is."""
    if segmentation.get("size") not in ([height, width], (height, width)):
        return "run-length codes of another size than their image skipped"
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        fits = all(isinstance(run, int) and run >= 0 for run in counts) and sum(counts) == height * width
        return None if fits else "broken run-length codes skipped"
    if not isinstance(counts, str):
        return "broken run-length codes skipped"
    from segpipe.masks.rle import counts_from_string

    try:
        runs = counts_from_string(counts)
    except ValueError:
        return "broken run-length codes skipped"
    return None if (runs >= 0).all() and runs.sum() == height * width else "broken run-length codes skipped"


def _no_common_name(annotations: Annotations, names: Mapping[str, int], by: GroupBy) -> str:
    mine, known = list(names), category_names(annotations, by=by)
    text = f"has no {by} called {', '.join(mine[:5])}; it has {', '.join(known[:8])}"
    other: GroupBy = "supercategory" if by == "category" else "category"
    if set(mine) & set(category_names(annotations, by=other)):
        text += f". They are names of its {'supercategories' if other == 'supercategory' else 'categories'}"
    return text


def _read_json(place: Location) -> dict[str, Any]:
    try:
        tree = json.loads(read_bytes(place))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no annotations file at {place.uri}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{place.uri}: is no JSON; give a COCO dataset such as instances_val2017.json") from None
    if not isinstance(tree, dict):
        kind = "a list, as COCO results are" if isinstance(tree, list) else "no COCO dataset"
        raise InputError(
            f"{place.uri}: holds {kind}; give the annotations, a JSON object with images, annotations, categories"
        )
    for name in _LISTS:
        if not isinstance(tree.get(name), list):
            raise InputError(f"{place.uri}: is no COCO dataset: it has no list called {name!r}")
    return tree


def _index(entries: Sequence[Any], keys: Sequence[str], *, what: str, uri: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise InputError(f"{uri}: the {what} {str(entry)[:60]} has no {missing[0]!r}")
        if not _is_whole(entry["id"]) or entry["id"] in found:
            problem = "occurs twice" if entry["id"] in found else "is no whole number"
            raise InputError(f"{uri}: {what} id {entry['id']!r} {problem}; ids must be unique whole numbers")
        for side in ("height", "width"):
            if side in keys and (not _is_whole(entry[side]) or entry[side] < 1):
                raise InputError(
                    f"{uri}: {what} {entry['id']} has {side} {entry[side]!r}; it must be a number of pixels"
                )
        found[entry["id"]] = entry
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_box(box: object) -> bool:
    """Tell whether a value is four finite numbers, the last two not negative."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    numbers = [side for side in box if isinstance(side, (int, float)) and abs(side) < _FAR]
    return len(numbers) == 4 and min(numbers[2:]) >= 0


def _check(
    annotation: Any,  # noqa: ANN401  # whatever the JSON holds
    images: Mapping[int, Mapping[str, Any]],
    categories: Mapping[int, object],
    problems: dict[str, list[str]],
    *,
    clip: bool,
) -> dict[str, Any] | None:
    """Return a usable annotation, or None after noting why there is none."""
    if not isinstance(annotation, dict) or not _is_whole(annotation.get("id")):
        problems["annotations without an id skipped"].append(str(annotation)[:40])
        return None
    name = f"annotation {annotation['id']}"
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    image = images.get(image_id) if isinstance(image_id, int) else None
    if image is None:
        problems["annotations of images that are not listed skipped"].append(name)
        return None
    if not _is_whole(category_id) or category_id not in categories:
        problems["annotations of unknown categories skipped"].append(name)
        return None
    problem = _segmentation_problem(annotation.get("segmentation"), image)
    if problem is not None:
        problems[problem].append(name)
        return None
    box = annotation.get("bbox") or []
    if not _is_box(box):
        problems["annotations without a box skipped"].append(name)
        return None
    checked = {**annotation, "iscrowd": int(bool(annotation.get("iscrowd")))}
    if not isinstance(checked.get("area"), (int, float)) or not 0 <= checked["area"] < _FAR**2:
        checked["area"] = float(box[2] * box[3])
    return _clipped(checked, image, lambda what: problems[what].append(name)) if clip else checked


def _segmentation_problem(segmentation: object, image: Mapping[str, Any]) -> str | None:
    if isinstance(segmentation, dict):
        return rle_problem(segmentation, height=image["height"], width=image["width"])
    return polygon_problem(segmentation)


def _clipped(
    annotation: dict[str, Any], image: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Any] | None:
    x, y, width, height = (float(side) for side in annotation["bbox"])
    left, top = max(0.0, x), max(0.0, y)
    right, bottom = min(float(image["width"]), x + width), min(float(image["height"]), y + height)
    if right - left <= 0 or bottom - top <= 0:
        note("boxes without an area inside the image skipped")
        return None
    # Half a pixel over the border is how COCO's own polygons end; more is somebody's mistake.
    if max(left - x, top - y, x + width - right, y + height - bottom) > 1:
        note("boxes that reach outside the image clipped")
    return {**annotation, "bbox": [left, top, right - left, bottom - top]}
