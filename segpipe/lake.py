"""Reading the tables back: exactly the files that receipts name, also while a run is unfinished."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa

from segpipe.errors import OutputError
from segpipe.layout import RunLayout
from segpipe.records import Location
from segpipe.runs import list_runs, read_receipts
from segpipe.storage import locate, read_bytes
from segpipe.tables import IMAGES_SCHEMA, INSTANCES_SCHEMA, parse_receipt, parse_table

_PARALLEL_READS = 16


def read_table(
    output: str,
    name: Literal["images", "instances"],
    *,
    run_id: str | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Return the committed rows of one run.

    Args:
        output: folder of the lake, path or URI.
        name: which table.
        run_id: of the run; None where there is only one.
        columns: names to read; None reads all.

    Returns:
        Rows ordered by chunk; within it by image, and instances by falling score.

    Raises:
        OutputError: if there is no such lake or run.
        StoreError: if the store does not answer.
    """
    layout = RunLayout(locate(output), choose_run(locate(output), run_id))
    schema = IMAGES_SCHEMA if name == "images" else INSTANCES_SCHEMA
    receipts = sorted(read_receipts(layout).values(), key=lambda receipt: (receipt.chunk.shard, receipt.chunk.index))
    places = [
        layout.images_file(receipt.chunk.name) if name == "images" else layout.table(name) / receipt.instances_file
        for receipt in receipts
    ]
    wanted = schema if columns is None else pa.schema([schema.field(column) for column in columns])

    def read(place: Location) -> pa.Table:
        table = parse_table(read_bytes(place), wanted.names)
        return table.replace_schema_metadata(None).cast(wanted)

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return pa.concat_tables([wanted.empty_table(), *pool.map(read, places)])


def iterate_chunks(layout: RunLayout) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the images and the instances of each chunk, in the order of `read_table`, one chunk in memory at a time.

    Raises:
        OutputError: if a file is damaged.
        StoreError: if the store does not answer.
    """
    receipts = sorted(read_receipts(layout).values(), key=lambda receipt: (receipt.chunk.shard, receipt.chunk.index))
    for receipt in receipts:
        yield read_chunk(layout, receipt.chunk.name)


def read_chunk(layout: RunLayout, chunk_name: str) -> tuple[pa.Table, pa.Table]:
    """Return the images and the instances of one committed chunk.

    Raises:
        OutputError: if a file is damaged.
        StoreError: if the store does not answer.
    """
    place = layout.images_file(chunk_name)
    images = parse_table(read_bytes(place))
    receipt = parse_receipt(images.schema.metadata, file=place.uri)
    instances = parse_table(read_bytes(layout.table("instances") / receipt.instances_file))
    return images.replace_schema_metadata(None), instances.replace_schema_metadata(None)


def read_categories(layout: RunLayout) -> dict[int, str]:
    """Return a run's categories, id to name."""
    table = parse_table(read_bytes(layout.categories_file))
    return dict(zip(table["category_id"].to_pylist(), table["category"].to_pylist(), strict=True))


def choose_run(output: Location, run_id: str | None) -> str:
    """Return the run that is meant.

    Raises:
        OutputError: if there is none, no such one, or more than one to choose from.
    """
    chosen = list_chosen_runs(output, run_id)
    if len(chosen) > 1:
        raise OutputError(f"{output.uri}: has more than one run; name one of {', '.join(chosen)}")
    return chosen[0]


def list_chosen_runs(output: Location, run_id: str | None) -> list[str]:
    """Return one run, or all of a lake.

    Raises:
        OutputError: if there is none, or no such one.
    """
    known = list_runs(output)
    if not known:
        raise OutputError(f"{output.uri}: holds no run of segpipe; check the path")
    if run_id is not None and run_id not in known:
        raise OutputError(f"{output.uri}: has no run {run_id!r}. Its runs: {', '.join(known)}")
    return known if run_id is None else [run_id]
