"""What is known of a run: run.json, the receipts of its chunks, and the files that belong to none.

A chunk is committed when its images file exists; that file is its receipt. Nothing else is consulted.
"""

import datetime as dt
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from segpipe.errors import OutputError
from segpipe.layout import RUNS_FOLDER, TABLES, RunLayout
from segpipe.records import Location, Receipt
from segpipe.storage import TEMPORARY_SUFFIX, delete, list_names, open_stream, read_bytes, write_bytes
from segpipe.tables import SCHEMA_VERSION, check_schema_version, parse_receipt

State = Literal["running", "unfinished", "failed", "done"]

# Footers are read one request each; this many at a time keep a store's latency out of the way.
_PARALLEL_READS = 32
_RECORDED_PACKAGES = ("segpipe", "ray", "torch", "torchvision", "pyarrow", "numpy", "numba", "pillow", "pycocotools")

logger = logging.getLogger(__name__)


class Totals(BaseModel):
    """Sums over the receipts of a run."""

    model_config = ConfigDict(frozen=True)

    images: int = 0
    failed: int = 0
    instances: int = 0
    capped: int = 0
    chunks: int = 0

    def plus(self, receipt: Receipt) -> "Totals":
        """Return the sums with one more chunk."""
        return Totals(
            images=self.images + receipt.num_images,
            failed=self.failed + receipt.num_failed,
            instances=self.instances + receipt.num_instances,
            capped=self.capped + receipt.num_capped,
            chunks=self.chunks + 1,
        )


class RunRecord(BaseModel):
    """The content of run.json.

    Attributes:
        settings: every setting that changes rows, as the user asked for it.
        resolved: what `auto` became on the workers, once for each distinct answer.
        seconds: time by stage, summed over workers and starts; `wall` is the driver's.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    run_id: str
    state: State
    fingerprint: str
    settings: dict[str, Any]
    kind: str
    input_root: str
    chunk_images: int
    model: dict[str, Any]
    versions: dict[str, str]
    created_at: str
    updated_at: str
    num_starts: int = 0
    totals: Totals = Totals()
    seconds: dict[str, float] = {}
    resolved: list[dict[str, str | int]] = []


def now() -> str:
    """Return the time of day in UTC, for run.json only."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make rows."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_run(layout: RunLayout) -> RunRecord | None:
    """Return a run's record, None if there is none.

    Raises:
        OutputError: if it is unreadable, or a newer segpipe wrote it.
        StoreError: if the store does not answer.
    """
    file = layout.run_file.uri
    try:
        fields = json.loads(read_bytes(layout.run_file))
    except FileNotFoundError:
        return None
    except ValueError:
        raise OutputError(
            f"{file}: is no JSON; restore it, or start a run of another name with output.run_id"
        ) from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    check_schema_version(
        {b"segpipe.schema_version": str(version).encode()} if isinstance(version, int) else None, file=file
    )
    try:
        return RunRecord.model_validate(fields)
    except ValidationError as error:
        raise OutputError(f"{file}: is no run of segpipe ({error.error_count()} fields are wrong)") from None


def write_run(layout: RunLayout, record: RunRecord) -> None:
    """Write a run's record, so that readers see the old one or the new.

    Raises:
        StoreError: if the store does not take it.
    """
    write_bytes(layout.run_file, (record.model_dump_json(indent=2) + "\n").encode())


def list_runs(output: Location) -> list[str]:
    """Return the ids of the runs in a lake, sorted."""
    return [name for name in list_names(output / RUNS_FOLDER) if not name.startswith(".")]


def check_output(output: Location) -> None:
    """Make sure that a lake may be written here.

    Raises:
        OutputError: if the place holds something that segpipe did not write.
        StoreError: if the store does not answer.
    """
    names = [name for name in list_names(output) if not name.startswith(".")]
    foreign = sorted(set(names) - {*TABLES, RUNS_FOLDER})
    if foreign or (names and RUNS_FOLDER not in names):
        shown = ", ".join((foreign or names)[:3])
        raise OutputError(
            f"output.uri: {output.uri} holds files that segpipe did not write ({shown}); choose an empty or new folder"
        )


def read_receipts(layout: RunLayout) -> dict[str, Receipt]:
    """Return the receipts of all committed chunks, by chunk name. Reads file footers, in parallel.

    Raises:
        OutputError: if a file is damaged, or a newer segpipe wrote it.
        StoreError: if the store does not answer.
    """
    names = [name for name in list_names(layout.table("images")) if name.endswith(".parquet") and name[0] != "."]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        receipts = list(pool.map(lambda name: read_receipt(layout.table("images") / name), names))
    return {receipt.chunk.name: receipt for receipt in receipts}


def read_receipt(place: Location) -> Receipt:
    """Return the receipt in one images file.

    Raises:
        OutputError: if the file is damaged, or a newer segpipe wrote it.
        StoreError: if the store does not answer.
    """
    with open_stream(place) as stream:
        try:
            metadata = pq.read_metadata(pa.PythonFile(stream, mode="r")).metadata
        except (pa.ArrowException, OSError, EOFError) as error:
            raise OutputError(
                f"{place.uri}: is damaged ({' '.join(str(error).split())[:120]}); "
                f"remove it and run the same command again: its images are then segmented anew"
            ) from None
    return parse_receipt(metadata, file=place.uri)


def sum_receipts(receipts: Iterable[Receipt]) -> Totals:
    """Return the sums over receipts."""
    return reduce(Totals.plus, receipts, Totals())


def distinct_resolved(receipts: Iterable[Receipt]) -> list[dict[str, str | int]]:
    """Return what `auto` became on the workers, each distinct answer once."""
    found = {json.dumps(dict(receipt.resolved), sort_keys=True) for receipt in receipts}
    return [json.loads(text) for text in sorted(found)]


def find_orphans(layout: RunLayout, receipts: Mapping[str, Receipt]) -> list[Location]:
    """Return instances files that no receipt names, and files whose writing was cut short."""
    named = {receipt.instances_file for receipt in receipts.values()}
    instances = layout.table("instances")
    mine = (".parquet", TEMPORARY_SUFFIX)  # anything else is somebody's, and reported
    orphans = [instances / name for name in list_names(instances) if name not in named and name.endswith(mine)]
    for folder in (layout.table("images"), layout.table("categories"), layout.keys_folder, layout.folder):
        orphans += [folder / name for name in list_names(folder) if name.endswith(TEMPORARY_SUFFIX)]
    return orphans


def sweep(layout: RunLayout, receipts: Mapping[str, Receipt]) -> int:
    """Remove orphans and return how many there were. Only the holder of the lease may do this.

    Safe at a start, because work is planned from the very receipts that decide what is an orphan.
    """
    orphans = find_orphans(layout, receipts)
    delete(orphans)
    if orphans:
        logger.info("swept_files=%d first=%s", len(orphans), orphans[0].name)
    return len(orphans)
