"""What makes the figures of a run not comparable, in words, each with the fix."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from segpipe.coco.annotations import Annotations, GroupBy
from segpipe.coco.matching import match_categories
from segpipe.runs import RunRecord

# What COCO's figures look at, and torchvision measures with; results above it are missed by a run that keeps less.
_USUAL_SCORE_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is measured.

    Attributes:
        max_dets: instances of each image and category that count.
        by: what the run's categories are in the dataset: its categories, or its supercategories.
        matched_only: look only at the annotated images that the run has.
    """

    max_dets: int = 100
    by: GroupBy = "category"
    matched_only: bool = False


@dataclass
class Found:
    """What the run says about the annotated images."""

    results: list[dict[str, Any]] = field(default_factory=list)
    image_ids: set[int] = field(default_factory=set)
    num_failed: int = 0
    num_capped: int = 0
    num_foreign: int = 0
    has_masks: bool = True
    num_boxes_alone: int = 0


def run_notes(record: RunRecord | None, found: Found, max_dets: int) -> list[str]:
    """Say what of the run's settings makes its figures lower than the model's."""
    settings = record.settings if record else {}
    warnings = []
    if record is not None and record.state != "done":
        warnings.append(f"the run is {record.state}: its missing images count as empty; finish it first")
    floor = settings.get("model.score_threshold", 0)
    if floor > _USUAL_SCORE_FLOOR:
        warnings.append(
            f"the run kept only scores above {floor}, which lowers AP; run with model.score_threshold 0.05 to compare"
        )
    warnings += [
        f"the run was made with {key}, which lowers AP; leave it out to compare"
        for key in ("model.category_thresholds", "model.categories")
        if settings.get(key)
    ]
    kept = settings.get("model.max_instances", max_dets)
    if kept < max_dets:
        capped = f" and cut {found.num_capped:,} of these images" if found.num_capped else ""
        warnings.append(
            f"the run kept {kept} instances an image{capped}, AP looks at {max_dets}; run with model.max_instances "
            f"{max_dets}, or give --max-dets {kept}"
        )
    return warnings


def match_notes(given: Annotations, names: Mapping[int, str], found: Found, options: EvaluationOptions) -> list[str]:
    """Say what of the run and of the annotations has no counterpart."""
    warnings = []
    missing = len(given.images) - len(found.image_ids)
    if missing and not options.matched_only:
        warnings.append(
            f"{missing:,} of the {len(given.images):,} annotated images are not in the run and count as empty; "
            f"run them too, or give --matched-only"
        )
    if found.has_masks and found.num_boxes_alone:
        warnings.append(f"{found.num_boxes_alone:,} instances of the run have no mask and count for boxes alone")
    if found.num_foreign:
        warnings.append(f"{found.num_foreign:,} images of the run are not annotated and are left out")
    if found.num_failed:
        warnings.append(f"{found.num_failed:,} annotated images failed in the run and count as empty; see error_type")
    ids = match_categories(names, given, by=options.by)
    moved = [index for index, target in ids.items() if index != target]
    if moved:
        index = moved[0]
        warnings.append(
            f"category ids differ ({names[index]} is {index} in the run, {ids[index]} in the annotations), so they are "
            f"matched by name; `segpipe export coco --annotations` writes the annotations' ids"
        )
    if options.by == "category":
        unknown = sorted({str(one["name"]) for one in given.categories.values()} - set(names.values()))
        if unknown:
            warnings.append(
                f"{len(unknown)} annotated categories are unknown to the run ({', '.join(unknown[:5])}) and count as "
                f"never found; evaluate with annotations of the model's own categories to compare"
            )
    return warnings
