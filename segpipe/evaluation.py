"""How good a run's masks and boxes are, by COCO annotations; pycocotools computes, this module matches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segpipe.coco.annotations import Annotations, GroupBy, describe_problems, read_annotations, regroup
from segpipe.coco.confusion import count_confusions
from segpipe.coco.exporting import CocoView
from segpipe.coco.figures import Figures, IouType, compute_figures
from segpipe.coco.matching import match_categories
from segpipe.coco.notes import EvaluationOptions, Found, match_notes, run_notes
from segpipe.coco.plots import draw_confusion, draw_precision
from segpipe.errors import OutputError
from segpipe.lake import choose_run, read_categories
from segpipe.layout import RunLayout
from segpipe.runs import read_run
from segpipe.storage import locate

_CONFUSION_SCORE = 0.5
_WORST_CATEGORIES = 12


@dataclass(frozen=True, slots=True)
class CategoryFigures:
    """How good one category is.

    Attributes:
        category: name.
        num_instances: annotated, without crowds.
        values: `segm AP`, `segm AP50`, `bbox AP`, `bbox AP50`; -1 where nothing is annotated.
    """

    category: str
    num_instances: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    Attributes:
        run_id: of the run.
        figures: `segm` and `bbox`, or `bbox` alone for a run without masks; each the twelve COCO figures by name.
        categories: worst first.
        num_images: annotated images that were looked at.
        num_found: of them, those that the run has.
        warnings: why the figures may not be comparable, each with the fix.
        files: what was written.
    """

    run_id: str
    figures: Mapping[str, Mapping[str, float]]
    categories: tuple[CategoryFigures, ...]
    num_images: int
    num_found: int
    warnings: tuple[str, ...]
    files: tuple[str, ...]


def evaluate(
    output: str,
    *,
    annotations: str,
    run_id: str | None = None,
    options: EvaluationOptions | None = None,
    folder: str | Path | None = None,
) -> Evaluation:
    """Compute the COCO figures of a run, and write them as JSON with two pictures.

    Images are matched by file name, categories by name. Annotated images that the run has not count as images in which
    nothing was found, as COCO counts them.

    Args:
        output: folder of the lake, path or URI.
        annotations: path or URI of a COCO dataset.
        run_id: of the run; None where there is only one.
        options: what is measured; the usual if left out.
        folder: for `figures.json`, `precision_recall.png`, `confusion.png`; None writes nothing.

    Raises:
        InputError: if the annotations are no COCO dataset, or have nothing in common with the run.
        OutputError: if there is no such run, or it has no image, or the folder cannot be written.
        StoreError: if a store does not answer.
    """
    options = options or EvaluationOptions()
    layout = RunLayout(locate(output), choose_run(locate(output), run_id))
    given = read_annotations(locate(annotations))
    names = read_categories(layout)
    truth = _in_run_terms(given, names, options.by)
    found = _collect(CocoView(layout, truth))
    image_ids = sorted(found.image_ids) if options.matched_only else sorted(truth.images)
    figures = _figures(truth, found, image_ids, options)
    warnings = (
        *run_notes(read_run(layout), found, options.max_dets),
        *match_notes(given, names, found, options),
        *describe_problems(given.problems),
    )
    looked_at = _reduced(truth, image_ids)
    evaluation = Evaluation(
        run_id=layout.run_id,
        figures={kind: dict(found_figures.values) for kind, found_figures in figures.items()},
        categories=_by_category(looked_at, figures),
        num_images=len(image_ids),
        num_found=len(found.image_ids),
        warnings=warnings,
        files=(),
    )
    if folder is None:
        return evaluation
    return _written(evaluation, Path(folder), figures, looked_at, found, options)


def _figures(
    truth: Annotations, found: Found, image_ids: Sequence[int], options: EvaluationOptions
) -> dict[str, Figures]:
    """Return the figures of masks and boxes, or of boxes alone where the run has no mask."""
    dataset, limits = truth.as_dataset(), _max_dets(options.max_dets)
    masked = [result for result in found.results if "segmentation" in result]
    kinds: dict[IouType, list[dict[str, Any]]] = {"segm": masked} if found.has_masks else {}
    kinds["bbox"] = found.results
    return {
        kind: compute_figures(dataset, results, iou_type=kind, max_dets=limits, image_ids=image_ids)
        for kind, results in kinds.items()
    }


def _in_run_terms(given: Annotations, names: Mapping[int, str], by: GroupBy) -> Annotations:
    """Return the annotations of the categories that the run knows; by supercategory, in the run's ids."""
    ids = match_categories(names, given, by=by)
    if by == "supercategory":
        return regroup(given, {names[index]: index for index in ids}, by=by)
    return given


def _collect(view: CocoView) -> Found:
    found = Found()
    for ids, images, instances in view.chunks():
        found.image_ids |= set(ids.values())
        found.num_foreign += images.num_rows - len(ids)
        for row in images.select(["image_id", "status", "instances_capped"]).to_pylist():
            if row["image_id"] in ids:
                found.num_failed += row["status"] == "failed"
                found.num_capped += row["instances_capped"]
        found.results += view.results(ids, instances)
    found.num_boxes_alone = sum("segmentation" not in result for result in found.results)
    found.has_masks = found.num_boxes_alone < max(1, len(found.results))
    return found


def _max_dets(largest: int) -> tuple[int, int, int]:
    return (min(1, largest), min(10, largest), largest)


def _reduced(truth: Annotations, image_ids: Sequence[int]) -> Annotations:
    wanted = set(image_ids)
    images = {index: image for index, image in truth.images.items() if index in wanted}
    kept = [one for one in truth.annotations if one["image_id"] in wanted]
    return Annotations(truth.uri, images, truth.categories, kept, truth.problems, truth.info)


def _by_category(truth: Annotations, figures: Mapping[str, Figures]) -> tuple[CategoryFigures, ...]:
    """Return the categories that are annotated, worst first."""
    counts = dict.fromkeys(truth.categories, 0)
    for annotation in truth.annotations:
        counts[annotation["category_id"]] += not annotation["iscrowd"]
    first = next(iter(figures))
    found = []
    for index, count in counts.items():
        if count:
            values = {}
            for kind, one in figures.items():
                values[f"{kind} AP"], values[f"{kind} AP50"] = one.ap_by_category[index]
            found.append(CategoryFigures(str(truth.categories[index]["name"]), count, values))
    return tuple(sorted(found, key=lambda one: (one.values[f"{first} AP"], one.category)))


def _written(
    evaluation: Evaluation, folder: Path, figures: Mapping[str, Figures], truth: Annotations, found: Found,
    options: EvaluationOptions,
) -> Evaluation:  # fmt: skip
    names = [str(truth.categories[index]["name"]) for index in sorted(truth.categories)]
    worst = {one.category for one in evaluation.categories[:_WORST_CATEGORIES]}
    shown = [one for one in found.results if "segmentation" in one] if found.has_masks else found.results
    counts = count_confusions(truth, shown, score_threshold=_CONFUSION_SCORE, masks=found.has_masks)
    content = {
        "run": evaluation.run_id,
        "annotations": truth.uri,
        "options": asdict(options),
        "images": evaluation.num_images,
        "images_found": evaluation.num_found,
        "figures": evaluation.figures,
        "categories": [
            {"category": one.category, "instances": one.num_instances, **one.values} for one in evaluation.categories
        ],
        "warnings": evaluation.warnings,
    }
    pictures = {
        "figures.json": (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(),
        "precision_recall.png": draw_precision(figures, title=evaluation.run_id),
        "confusion.png": draw_confusion(
            counts,
            names,
            shown=[rank for rank, name in enumerate(names) if name in worst],
            title=f"worst categories; scores from {_CONFUSION_SCORE}, IoU from 0.5; colour: share of the row",
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from None
    return Evaluation(
        evaluation.run_id, evaluation.figures, evaluation.categories, evaluation.num_images, evaluation.num_found,
        evaluation.warnings, tuple(str(folder / name) for name in pictures),
    )  # fmt: skip
