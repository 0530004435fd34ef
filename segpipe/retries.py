"""Which failed images are tried again: those of all committed chunks that a condition in SQL picks."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from segpipe.errors import ConfigError
from segpipe.layout import RunLayout
from segpipe.records import Receipt
from segpipe.storage import read_bytes
from segpipe.tables import parse_table

_PARALLEL_READS = 16


def find_failed(layout: RunLayout, receipts: Mapping[str, Receipt], where: str) -> dict[str, frozenset[str]]:
    """Return chunk name to the image_ids of its failed images that a condition picks; chunks without any are left out.

    Args:
        layout: places of the run.
        receipts: of its committed chunks.
        where: condition over the columns of `images`, as DuckDB reads it; `TRUE` picks all failed ones.

    Raises:
        ConfigError: if the condition is no SQL, or names a column that is none.
        StoreError: if the store does not answer.
    """
    import duckdb

    names = [name for name, receipt in receipts.items() if receipt.num_failed]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        tables = list(pool.map(lambda name: parse_table(read_bytes(layout.images_file(name))), names))
    picked: dict[str, frozenset[str]] = {}
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        for name, table in zip(names, tables, strict=True):
            connection.register("images", table.replace_schema_metadata(None))
            try:
                query = f"SELECT image_id FROM images WHERE status = 'failed' AND ({where})"  # noqa: S608  # no access
                found = [image_id for (image_id,) in connection.execute(query).fetchall()]
            except duckdb.Error as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"--where {where!r}: is no condition over the columns of images ({reason})") from None
            if found:
                picked[name] = frozenset(found)
    return picked
