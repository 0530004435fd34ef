"""COCO results of any tool as a run of a lake, so that SQL, `eval` and `validate` work on them.

Images become rows as the annotations list them, with instances or without. No image file is looked at: `sha256` is
empty, `byte_size` 0. Instances are ordered by falling score, equal ones as the file has them; scores and boxes are
stored as float32, which is what the tables hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pycocotools import mask as coco_mask

from segpipe.coco.annotations import Annotations, describe_problems, read_annotations
from segpipe.coco.masks import to_rle
from segpipe.coco.results import Results, read_results
from segpipe.config import check_run_id, fingerprint
from segpipe.detections import ModelInfo
from segpipe.errors import OutputError, StoreError
from segpipe.layout import RunLayout, chunk_name
from segpipe.lease import hold_lease
from segpipe.masks.rle import area_from_counts, counts_from_string
from segpipe.models.categories import COCO_NAMES, COCO_SPACE, OWN_SPACE, contiguous_ids
from segpipe.records import ChunkId, Fault, SegmentedChunk
from segpipe.runs import RunRecord, check_output, now, read_receipts, read_run, sum_receipts, sweep, versions, write_run
from segpipe.shards.keys import UniqueKeys
from segpipe.stages.commit import commit_chunk
from segpipe.storage import locate, write_bytes
from segpipe.tables import IMAGES_SCHEMA, INSTANCES_SCHEMA, RunLabel, categories_table, write_table

_CHUNK_IMAGES = 1000
_SHARD = "."


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What was imported.

    Attributes:
        run_id: of the run.
        output: folder of the lake.
        num_images: rows of images.
        num_instances: rows of instances.
        num_without: images without an instance.
        problems: what was wrong, a line each; such results are left out.
    """

    run_id: str
    output: str
    num_images: int
    num_instances: int
    num_without: int
    problems: tuple[str, ...]


def import_coco(
    results: str, *, annotations: str, output: str, run_id: str, partial: bool = False, contiguous: bool = False
) -> ImportSummary:
    """Write COCO results as a run. The same call again changes nothing; one that was killed goes on.

    Args:
        results: path or URI of a JSON list of results: masks (compressed, uncompressed, polygons), boxes, or both.
        annotations: path or URI of the dataset: images, their sizes, categories.
        output: folder of the lake, path or URI.
        run_id: name of the new run.
        partial: take only the images that have results, for a tool that saw a part of the dataset.
        contiguous: category ids of the results count the dataset's categories from 0, as many tools number them.

    Raises:
        InputError: if a file is of another kind, or the results belong to another dataset.
        OutputError: if the lake is another tool's, or its run of this name holds something else.
        ConfigError: if the name is not allowed.
        StoreError: if a store does not answer.
    """
    layout = RunLayout(locate(output), check_run_id(run_id))
    check_output(layout.output)
    truth = read_annotations(locate(annotations))
    found = read_results(locate(results), truth, contiguous=contiguous)
    images = [image_id for image_id in truth.images if not partial or image_id in found.by_image]
    names = {index: str(category["name"]) for index, category in truth.categories.items()}
    unique = UniqueKeys()
    image_ids = {index: unique.add(str(truth.images[index]["file_name"])) for index in images}
    settings = {
        "input.uri": locate(results).uri, "input.sha256": found.sha256,
        "input.annotations": truth.uri, "input.images": images,
    }  # fmt: skip
    label = RunLabel(run_id, fingerprint(settings), _model_info(locate(results).uri, found.sha256, names))
    try:
        with hold_lease(layout.lease_file) as lease:
            _refuse_other(layout, label)
            record = _record(layout, label, {**settings, "input.images": len(images)})
            write_run(layout, record)
            write_bytes(layout.categories_file, write_table(categories_table(label.model), label))
            done = read_receipts(layout)
            for chunk_id, chunk_images, end in _chunks(images):
                if chunk_id.name not in done:
                    lease.check()
                    chunk = _chunk(chunk_id, {index: image_ids[index] for index in chunk_images}, truth, found, end)
                    outcome = commit_chunk(chunk, layout=layout, label=label)
                    if isinstance(outcome, Fault):
                        raise StoreError(outcome.message)
            receipts = read_receipts(layout)
            sweep(layout, receipts)
            totals = sum_receipts(receipts.values())
            write_run(layout, record.model_copy(update={"state": "done", "totals": totals, "updated_at": now()}))
    except OSError as error:
        raise OutputError(f"{layout.output.uri}: cannot be written: {error}") from None
    without = sum(image_id not in found.by_image for image_id in images)
    problems = describe_problems({**truth.problems, **found.problems})
    return ImportSummary(run_id, layout.output.uri, totals.images, totals.instances, without, tuple(problems))


def _model_info(uri: str, sha256: str, names: Mapping[int, str]) -> ModelInfo:
    is_coco = all(COCO_NAMES.get(index) == name for index, name in names.items())
    space = COCO_SPACE if is_coco else OWN_SPACE
    ids = contiguous_ids(COCO_NAMES if is_coco else names)
    return ModelInfo("import", names, space, ids, uri, sha256, "not stated")


def _refuse_other(layout: RunLayout, label: RunLabel) -> None:
    record = read_run(layout)
    if record is not None and record.fingerprint != label.fingerprint:
        raise OutputError(
            f"{layout.output.uri}: its run {layout.run_id!r} holds something else ({record.input_root}); choose "
            f"another name with --run"
        )


def _record(layout: RunLayout, label: RunLabel, settings: Mapping[str, object]) -> RunRecord:
    before = read_run(layout)
    model = label.model
    return RunRecord(
        run_id=layout.run_id,
        state="running",
        fingerprint=label.fingerprint,
        settings=dict(settings),
        kind="import",
        input_root=model.weights,
        chunk_images=_CHUNK_IMAGES,
        model={
            "name": model.name, "weights": model.weights, "weights_sha256": model.weights_sha256,
            "category_space": model.category_space, "licence": model.licence,
        },
        versions=versions(),
        created_at=before.created_at if before else now(),
        updated_at=now(),
        num_starts=(before.num_starts if before else 0) + 1,
    )  # fmt: skip


def _chunks(images: Sequence[int]) -> list[tuple[ChunkId, Sequence[int], int | None]]:
    """Cut the images into chunks; the last one says how many there are."""
    starts = range(0, max(1, len(images)), _CHUNK_IMAGES)
    return [
        (
            ChunkId(chunk_name(_SHARD, index), _SHARD, index, 1, ""),
            images[start : start + _CHUNK_IMAGES],
            len(images) if start + _CHUNK_IMAGES >= len(images) else None,
        )
        for index, start in enumerate(starts)
    ]


def _chunk(
    chunk_id: ChunkId, image_ids: Mapping[int, str], truth: Annotations, found: Results, end: int | None
) -> SegmentedChunk:
    names = {index: str(category["name"]) for index, category in truth.categories.items()}
    images, instances = [], []
    for coco_id, image_id in image_ids.items():
        entry = truth.images[coco_id]
        rows = found.by_image.get(coco_id, ())
        images.append(_image_row(image_id, entry, len(rows)))
        instances += [_instance_row(image_id, rank, row, entry, names) for rank, row in enumerate(rows)]
    return SegmentedChunk(
        id=chunk_id,
        images=pa.Table.from_pylist(images, schema=IMAGES_SCHEMA),
        instances=pa.Table.from_pylist(instances, schema=INSTANCES_SCHEMA),
        shard_num_images=end,
        resolved={},
        seconds={},
    )


def _image_row(image_id: str, entry: Mapping[str, Any], num_instances: int) -> dict[str, object]:
    return {
        "image_id": image_id, "shard": _SHARD, "key": str(entry["file_name"]), "sha256": "", "byte_size": 0,
        "width": entry["width"], "height": entry["height"], "status": "ok",
        "num_candidates": num_instances, "num_instances": num_instances, "instances_capped": False,
    }  # fmt: skip


def _instance_row(
    image_id: str, rank: int, result: Mapping[str, Any], entry: Mapping[str, Any], names: Mapping[int, str]
) -> dict[str, object]:
    height, width = int(entry["height"]), int(entry["width"])
    code, area, box = None, None, result.get("bbox")
    if result.get("segmentation") is not None:
        rle = to_rle(result["segmentation"], height=height, width=width)
        code, area = rle["counts"], area_from_counts(counts_from_string(rle["counts"]))
        if box is None:
            box = coco_mask.toBbox({**rle, "counts": code.encode()}).tolist()
    return {
        "image_id": image_id, "instance_id": rank, "category_id": result["category_id"],
        "category": names[result["category_id"]], "score": float(result["score"]),
        **dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), map(float, box or ()), strict=True)),
        "area": area, "height": height, "width": width, "rle_counts": code,
    }  # fmt: skip
