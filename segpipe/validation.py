"""Whether a run's files keep what the tables promise: every image once, every instance once, every mask whole.

Reads every file of a run, one chunk at a time, with pyarrow alone; changes nothing.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from segpipe.errors import OutputError
from segpipe.keylists import read_keys
from segpipe.lake import list_chosen_runs
from segpipe.layout import RunLayout
from segpipe.masks.rle import find_problem
from segpipe.records import Location, Receipt
from segpipe.runs import RunRecord, find_orphans, read_receipt, read_run, sum_receipts
from segpipe.shards.keys import UniqueKeys
from segpipe.storage import list_names, locate, read_bytes
from segpipe.tables import CATEGORIES_SCHEMA, IMAGES_SCHEMA, INSTANCES_SCHEMA, parse_label, parse_table

# What is promised, in the order in which it is reported. Every problem found belongs to one of these.
PROMISES: Mapping[str, str] = {
    "files": "every file can be read and belongs to this run",
    "images": "every input image is exactly one row of images",
    "instances": "every instance is exactly one row of instances, numbered by falling score",
    "masks": "every mask is whole: its runs fill the frame and its area is its own",
    "receipts": "every receipt names its instances file, its checksum and its counts",
    "strays": "no file lies about that no receipt names",
    "complete": "nothing is pending",
}
_PENDING = "run the same command again"


@dataclass(frozen=True, slots=True)
class RunValidation:
    """What was found in one run.

    Attributes:
        run_id: name of the run.
        state: as run.json says, `not started` without one.
        num_images: rows of images.
        num_instances: rows of instances.
        problems: promise in words to what breaks it, naming file and row; empty for a promise that is kept.
    """

    run_id: str
    state: str
    num_images: int
    num_instances: int
    problems: Mapping[str, tuple[str, ...]]

    @property
    def is_valid(self) -> bool:
        """Tell whether every promise is kept."""
        return not any(self.problems.values())


@dataclass
class _Findings:
    """Collects problems while the files of a run are read."""

    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    image_ids: UniqueKeys = field(default_factory=UniqueKeys)
    num_images: int = 0
    num_instances: int = 0

    def add(self, promise: str, text: str) -> None:
        self.problems[promise].append(text)


def validate(
    output: str, *, run_id: str | None = None, on_chunk: Callable[[str], None] = lambda _: None
) -> list[RunValidation]:
    """Check every promise of the tables on every file.

    Args:
        output: folder of the lake, path or URI.
        run_id: one run; None checks all.
        on_chunk: told the name of every chunk before it is read.

    Raises:
        OutputError: if there is no such lake or run.
        StoreError: if the store does not answer.
    """
    place = locate(output)
    chosen = list_chosen_runs(place, run_id)
    return [_validate_run(RunLayout(place, name), on_chunk) for name in chosen]


def _validate_run(layout: RunLayout, on_chunk: Callable[[str], None]) -> RunValidation:
    findings = _Findings()
    record = None
    try:
        record = read_run(layout)
        if record is None:
            findings.add("files", f"{layout.run_file.uri}: is missing")
    except OutputError as error:
        findings.add("files", str(error))
    receipts: dict[str, Receipt] = {}
    categories = _read_categories(layout, findings)
    for name in list_names(layout.table("images")):
        if not name.endswith(".parquet") or name.startswith("."):
            findings.add("strays", f"{(layout.table('images') / name).uri}: is no images file; remove it")
            continue
        on_chunk(name)
        receipt = _check_chunk(layout, name, categories, findings)
        if receipt is not None:
            receipts[receipt.chunk.name] = receipt
    for orphan in find_orphans(layout, receipts):
        findings.add("strays", f"{orphan.uri}: no receipt names it; the next start of the run removes it")
    if record is not None:
        _check_completeness(layout, record, receipts, findings)
    return RunValidation(
        run_id=layout.run_id,
        state=record.state if record else "not started",
        num_images=findings.num_images,
        num_instances=findings.num_instances,
        problems={text: tuple(findings.problems.get(promise, ())) for promise, text in PROMISES.items()},
    )


def _read_categories(layout: RunLayout, findings: _Findings) -> dict[int, str]:
    table = _read_table(layout, layout.categories_file.uri, layout.categories_file, CATEGORIES_SCHEMA, findings)
    if table is None:
        return {}
    return dict(zip(table["category_id"].to_pylist(), table["category"].to_pylist(), strict=True))


def _check_chunk(
    layout: RunLayout, file_name: str, categories: Mapping[int, str], findings: _Findings
) -> Receipt | None:
    """Check one images file and the instances file that its receipt names."""
    place = layout.table("images") / file_name
    try:
        receipt = read_receipt(place)
    except OutputError as error:
        findings.add("files", str(error))
        return None
    images = _read_table(layout, file_name, place, IMAGES_SCHEMA, findings)
    if images is None:
        return receipt
    if f"{receipt.chunk.name}.parquet" != file_name:
        findings.add("receipts", f"{file_name}: its receipt is of chunk {receipt.chunk.name}")
    _check_images(file_name, images, receipt, findings)
    instances_place = layout.table("instances") / receipt.instances_file
    try:
        digest = hashlib.sha256(read_bytes(instances_place)).hexdigest()
    except FileNotFoundError:
        findings.add("receipts", f"{file_name}: its instances file {receipt.instances_file} is missing")
        return receipt
    if digest != receipt.instances_sha256:
        findings.add("receipts", f"{receipt.instances_file}: its sha256 is not the one in the receipt; it was changed")
    instances = _read_table(layout, receipt.instances_file, instances_place, INSTANCES_SCHEMA, findings)
    if instances is not None:
        if instances.num_rows != receipt.num_instances:
            findings.add(
                "receipts",
                f"{receipt.instances_file}: has {instances.num_rows} rows, receipt says {receipt.num_instances}",
            )
        _check_instances(receipt.instances_file, images, instances, categories, findings)
    return receipt


def _read_table(
    layout: RunLayout, name: str, place: Location, schema: pa.Schema, findings: _Findings
) -> pa.Table | None:
    try:
        table = parse_table(read_bytes(place))
        label = parse_label(table.schema.metadata, file=name)
    except FileNotFoundError:
        findings.add("files", f"{name}: is missing")
        return None
    except (pa.ArrowException, OSError, OutputError) as error:
        findings.add("files", f"{name}: cannot be read ({' '.join(str(error).split())[:120]})")
        return None
    if label["run_id"] != layout.run_id:
        findings.add("files", f"{name}: belongs to run {label['run_id']}")
    if not table.schema.equals(schema):
        findings.add("files", f"{name}: has other columns than this version writes")
        return None
    return table


def _check_images(name: str, images: pa.Table, receipt: Receipt, findings: _Findings) -> None:
    findings.num_images += images.num_rows
    for image_id in images["image_id"].to_pylist():
        if findings.image_ids.add(image_id) != image_id:
            findings.add("images", f"{name}: image_id {image_id!r} stands twice in the run")
    counted = (
        images.num_rows,
        images["status"].to_pylist().count("failed"),
        sum(images["num_instances"].to_pylist()),
        sum(images["instances_capped"].to_pylist()),
    )
    written = (receipt.num_images, receipt.num_failed, receipt.num_instances, receipt.num_capped)
    if counted != written:
        findings.add("receipts", f"{name}: images, failed, instances, capped are {counted}, receipt says {written}")
    for row in images.select(["image_id", "status", "num_instances", "error_type"]).to_pylist():
        if (row["status"] == "failed") != (row["error_type"] is not None) or row["status"] not in ("ok", "failed"):
            findings.add(
                "images", f"{name}: {row['image_id']!r} has status {row['status']!r}, error {row['error_type']!r}"
            )
        if row["status"] == "failed" and row["num_instances"]:
            findings.add("images", f"{name}: {row['image_id']!r} failed and has {row['num_instances']} instances")


def _check_instances(
    name: str, images: pa.Table, instances: pa.Table, categories: Mapping[int, str], findings: _Findings
) -> None:
    findings.num_instances += instances.num_rows
    expected = dict(zip(images["image_id"].to_pylist(), images["num_instances"].to_pylist(), strict=True))
    rows_of: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in instances.to_pylist():
        rows_of[row["image_id"]].append(row)
        problem = find_problem(row["rle_counts"], height=row["height"], width=row["width"], area=row["area"])
        if problem is not None:
            findings.add("masks", f"{name}: {row['image_id']!r} instance {row['instance_id']}: {problem}")
        if categories.get(row["category_id"]) != row["category"]:
            findings.add(
                "instances", f"{name}: {row['image_id']!r}: category {row['category_id']} is not {row['category']!r}"
            )
    for image_id in sorted(rows_of.keys() - expected.keys()):
        findings.add("instances", f"{name}: {image_id!r} has instances but is no image of this chunk")
    sizes = {row["image_id"]: (row["height"], row["width"]) for row in images.to_pylist()}
    for image_id, count in expected.items():
        rows = rows_of.get(image_id, [])
        if [row["instance_id"] for row in rows] != list(range(count)):
            findings.add(
                "instances", f"{name}: {image_id!r} has {len(rows)} rows for {count} instances, or misnumbered"
            )
        scores = np.array([row["score"] for row in rows], dtype=np.float32)
        if (np.diff(scores) > 0).any() or ((scores < 0) | (scores > 1)).any():
            findings.add("instances", f"{name}: {image_id!r}: scores do not fall, or leave 0 to 1")
        if any((row["height"], row["width"]) != sizes[image_id] for row in rows):
            findings.add("masks", f"{name}: {image_id!r}: masks have another frame than the image")


def _check_completeness(
    layout: RunLayout, record: RunRecord, receipts: Mapping[str, Receipt], findings: _Findings
) -> None:
    """Compare what is committed with what the input was found to hold."""
    totals = sum_receipts(receipts.values())
    if record.state in ("done", "failed") and totals != record.totals:
        findings.add("images", f"run.json says {record.totals.images} images, the receipts say {totals.images}")
    if record.state not in ("done", "failed"):
        findings.add("complete", f"the run is {record.state}; {_PENDING}")
    chunks_of: dict[str, dict[int, Receipt]] = defaultdict(dict)
    for receipt in receipts.values():
        chunks_of[receipt.chunk.shard][receipt.chunk.index] = receipt
    if record.kind in ("folder", "manifest"):
        _check_listed(layout, record, next(iter(chunks_of.values()), {}), findings)
    else:
        _check_streams(chunks_of, findings)


def _check_listed(layout: RunLayout, record: RunRecord, chunks: Mapping[int, Receipt], findings: _Findings) -> None:
    for index, images in enumerate(read_keys(layout, locate(record.input_root)).chunks()):
        if index not in chunks:
            first = images[0].key
            findings.add(
                "complete", f"chunk {index} with {len(images)} images, {first!r} first, is pending; {_PENDING}"
            )
        elif chunks[index].num_images != len(images):
            findings.add("images", f"chunk {index} has {chunks[index].num_images} rows for {len(images)} images")


def _check_streams(chunks_of: Mapping[str, Mapping[int, Receipt]], findings: _Findings) -> None:
    for shard, chunks in sorted(chunks_of.items()):
        end = next((receipt for receipt in chunks.values() if receipt.shard_num_images is not None), None)
        if end is None or sorted(chunks) != list(range(end.chunk.index + 1)):
            findings.add("complete", f"shard {shard}: its {len(chunks)} chunks do not reach its end; {_PENDING}")
        elif sum(receipt.num_images for receipt in chunks.values()) != end.shard_num_images:
            findings.add("images", f"shard {shard}: its chunks do not add up to its {end.shard_num_images} images")
