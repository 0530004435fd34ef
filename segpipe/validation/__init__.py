"""Whether a run's files keep what the tables promise: every image once, every instance once, every mask whole.

Reads every file of a run, one chunk at a time, with pyarrow alone; changes nothing.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from segpipe.errors import OutputError
from segpipe.keylists import read_keys
from segpipe.lake import list_chosen_runs
from segpipe.layout import TABLES, RunLayout
from segpipe.records import Location, Receipt
from segpipe.runs import RunRecord, find_orphans, read_receipt, read_run, sum_receipts
from segpipe.storage import TEMPORARY_SUFFIX, list_names, locate, read_bytes
from segpipe.tables import CATEGORIES_SCHEMA, IMAGES_SCHEMA, INSTANCES_SCHEMA, parse_label, parse_table
from segpipe.validation.rows import Findings, check_images, check_instances

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
    found = [_validate_run(RunLayout(place, name), on_chunk) for name in chosen]
    return found if run_id is not None else found + _ghosts(place, chosen)


def _ghosts(place: Location, known: Sequence[str]) -> list[RunValidation]:
    """Return what lies in the tables of runs that are none: a plain glob by another engine would read it."""
    found: dict[str, list[str]] = defaultdict(list)
    for table in TABLES:
        for folder in list_names(place / table):
            run_id = folder.removeprefix("run_id=")
            if run_id not in known and list_names(place / table / folder):
                found[run_id].append(f"{(place / table / folder).uri}: belongs to no run; remove it")
    return [
        RunValidation(name, "no run", 0, 0, {PROMISES["strays"]: tuple(problems)}) for name, problems in found.items()
    ]


def _validate_run(layout: RunLayout, on_chunk: Callable[[str], None]) -> RunValidation:
    findings = Findings()
    record = None
    try:
        record = read_run(layout)
        if record is None:
            findings.add("files", f"{layout.run_file.uri}: is missing")
    except OutputError as error:
        findings.add("files", str(error))
    receipts = _check_chunks(layout, findings, on_chunk)
    _check_strays(layout, receipts, findings)
    if record is not None:
        _check_record(layout, record, receipts, findings)
    return RunValidation(
        run_id=layout.run_id,
        state=record.state if record else "not started",
        num_images=findings.num_images,
        num_instances=findings.num_instances,
        problems={text: tuple(findings.problems.get(promise, ())) for promise, text in PROMISES.items()},
    )


def _check_chunks(layout: RunLayout, findings: Findings, on_chunk: Callable[[str], None]) -> dict[str, Receipt]:
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
    return receipts


def find_damaged(layout: RunLayout) -> list[Location]:
    """Return the images files of the chunks that are damaged themselves, or whose instances file is.

    Raises:
        StoreError: if the store does not answer.
    """
    categories = _read_categories(layout, Findings())
    damaged = []
    for name in list_names(layout.table("images")):
        if name.endswith(".parquet") and not name.startswith("."):
            findings = Findings()
            _check_chunk(layout, name, categories, findings)
            if findings.problems:
                damaged.append(layout.table("images") / name)
    return damaged


def _check_strays(layout: RunLayout, receipts: Mapping[str, Receipt], findings: Findings) -> None:
    for orphan in find_orphans(layout, receipts):
        findings.add("strays", f"{orphan.uri}: no receipt names it; the next start of the run removes it")
    for name in list_names(layout.table("instances")):
        if not name.endswith((".parquet", TEMPORARY_SUFFIX)):
            findings.add("strays", f"{(layout.table('instances') / name).uri}: is no instances file; remove it")


def _check_record(layout: RunLayout, record: RunRecord, receipts: Mapping[str, Receipt], findings: Findings) -> None:
    """Compare what was found with run.json."""
    for fingerprint, name in findings.fingerprints.items():
        if fingerprint != record.fingerprint:
            findings.add("files", f"{name}: was made with other settings than run.json says")
    try:
        _check_completeness(layout, record, receipts, findings)
    except OutputError as error:  # the written list of keys is damaged
        findings.add("files", str(error))


def _read_categories(layout: RunLayout, findings: Findings) -> dict[int, str]:
    table = _read_table(layout, layout.categories_file.uri, layout.categories_file, CATEGORIES_SCHEMA, findings)
    if table is None:
        return {}
    return dict(zip(table["category_id"].to_pylist(), table["category"].to_pylist(), strict=True))


def _check_chunk(
    layout: RunLayout, file_name: str, categories: Mapping[int, str], findings: Findings
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
    check_images(file_name, images, receipt, findings)
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
        check_instances(receipt.instances_file, images, instances, categories, findings)
    return receipt


def _read_table(
    layout: RunLayout, name: str, place: Location, schema: pa.Schema, findings: Findings
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
    findings.fingerprints.setdefault(label["fingerprint"], name)
    if not table.schema.equals(schema):
        findings.add("files", f"{name}: has other columns than this version writes")
        return None
    return table


def _check_completeness(
    layout: RunLayout, record: RunRecord, receipts: Mapping[str, Receipt], findings: Findings
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


def _check_listed(layout: RunLayout, record: RunRecord, chunks: Mapping[int, Receipt], findings: Findings) -> None:
    for index, images in enumerate(read_keys(layout, locate(record.input_root)).chunks()):
        if index not in chunks:
            first = images[0].key
            findings.add(
                "complete", f"chunk {index} with {len(images)} images, {first!r} first, is pending; {_PENDING}"
            )
        elif chunks[index].num_images != len(images):
            findings.add("images", f"chunk {index} has {chunks[index].num_images} rows for {len(images)} images")


def _check_streams(chunks_of: Mapping[str, Mapping[int, Receipt]], findings: Findings) -> None:
    for shard, chunks in sorted(chunks_of.items()):
        end = next((receipt for receipt in chunks.values() if receipt.shard_num_images is not None), None)
        if end is None or sorted(chunks) != list(range(end.chunk.index + 1)):
            findings.add("complete", f"shard {shard}: its {len(chunks)} chunks do not reach its end; {_PENDING}")
        elif sum(receipt.num_images for receipt in chunks.values()) != end.shard_num_images:
            findings.add("images", f"shard {shard}: its chunks do not add up to its {end.shard_num_images} images")
