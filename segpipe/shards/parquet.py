"""Parquet shards with an image column: plain binary, or the Hugging Face struct of `bytes` and `path`.

One row is one image. The key is the struct's path, or a column with a usual name, or the row's position.
Read row group by row group, a few rows at a time; row groups whose images are not wanted are not read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import InputError, ShardCorruptError
from segpipe.records import Location, Shard
from segpipe.shards.keys import printable
from segpipe.storage import open_stream

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "image_bytes", "bytes", "img", "content", "data")
KEY_COLUMNS = ("key", "__key__", "image_id", "file_name", "filename", "path", "file_path", "name", "id")
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row's bytes and key are: dotted paths; key is None where rows have only their position."""

    image: str
    key: str | None


def read_parquet(
    shard: Shard, wanted: Callable[[int], bool], *, image_column: str = "auto", key_column: str = "auto", max_bytes: int
) -> Iterator[tuple[str, bytes | int | None]]:
    """Yield (key, encoded bytes) for each row, in order; empty bytes for a null image.

    Args:
        shard: a Parquet file.
        wanted: tells whether the bytes of the image at this position are needed; others come as None.
        image_column: column with the bytes; `auto` finds it.
        key_column: column whose text becomes the key; `auto` finds it.
        max_bytes: of a larger cell only the size is given.

    Raises:
        InputError: if a column named by the user is missing, or none can hold images.
        ShardCorruptError: where the bytes cannot be read any further.
        StoreError: if the store does not answer.
    """
    with open_stream(shard.location, listed_bytes=shard.version.size_bytes) as stream:
        try:
            file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ShardCorruptError("UnreadableShard", f"no readable Parquet file: {_short(error)}") from error
        columns = _choose_columns(file.schema_arrow, image_column, key_column, shard.name)
        ordinal = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            needed = any(wanted(index) for index in range(ordinal, ordinal + num_rows))
            for key, data in _read_group(file, group, columns, with_images=needed):
                content = len(data) if len(data) > max_bytes else data
                yield (f"{ordinal:09d}" if key is None else key), (content if wanted(ordinal) else None)
                ordinal += 1


def sample_row_bytes(shard: Shard, image_column: str) -> list[int]:
    """Return the mean stored bytes of an image in each row group, from the footer alone.

    Raises:
        InputError: if it is no Parquet file, or has no image column.
        StoreError: if the store does not answer.
    """
    with open_stream(shard.location) as stream:
        try:
            metadata = pq.read_metadata(pa.PythonFile(stream, mode="r"))
        except (pa.ArrowException, OSError, EOFError) as error:
            raise InputError(f"{shard.location.uri}: no readable Parquet file ({_short(error)})") from None
    columns = _choose_columns(metadata.schema.to_arrow_schema(), image_column, "auto", shard.name)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        column.total_compressed_size // group.num_rows
        for group in groups
        for column in (group.column(index) for index in range(group.num_columns))
        if column.path_in_schema == columns.image and group.num_rows
    ]


def check_columns(shard: Shard, image_column: str, key_column: str) -> None:
    """Look from a shard's footer whether it has the columns; an unreadable shard passes, it becomes a failed row.

    Raises:
        InputError: if a column named by the user is missing, or none can hold images.
        StoreError: if the store does not answer.
    """
    with open_stream(shard.location) as stream:
        try:
            schema = pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False).schema_arrow
        except (pa.ArrowException, OSError, EOFError):
            return
    _choose_columns(schema, image_column, key_column, shard.name)


def has_image_column(place: Location) -> bool:
    """Tell whether a Parquet file has a column that can hold encoded images; reads its footer only.

    Raises:
        InputError: if it is no Parquet file.
        StoreError: if the store does not answer.
    """
    return bool(_binary_paths(read_schema(place)))


def read_schema(place: Location) -> pa.Schema:
    """Return the Arrow schema of a Parquet file from its footer.

    Raises:
        InputError: if it is no Parquet file.
        StoreError: if the store does not answer.
    """
    with open_stream(place) as stream:
        try:
            return pq.ParquetFile(pa.PythonFile(stream, mode="r"), pre_buffer=False).schema_arrow
        except (pa.ArrowException, OSError, EOFError) as error:
            raise InputError(f"{place.uri}: no readable Parquet file ({_short(error)})") from None


def _read_group(
    file: pq.ParquetFile, group: int, columns: _Columns, *, with_images: bool
) -> Iterator[tuple[str | None, bytes]]:
    """Yield (key, bytes) for each row of a row group; keys alone where no image is wanted."""
    paths = [columns.image] if with_images else []
    paths += [columns.key] if columns.key is not None else []
    if not paths:
        yield from ((None, b"") for _ in range(file.metadata.row_group(group).num_rows))
        return
    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=paths, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise ShardCorruptError("UnreadableShard", f"row group {group}: {_short(error)}") from error
        if batch is None:
            return
        images = _values(batch, columns.image) if with_images else [b""] * batch.num_rows
        keys = _values(batch, columns.key) if columns.key is not None else [None] * batch.num_rows
        for key, data in zip(keys, images, strict=True):
            yield (printable(str(key)) if key not in (None, "") else None), bytes(data or b"")


def _values(batch: pa.RecordBatch, path: str) -> list[Any]:
    name, _, field = path.partition(".")
    column = batch.column(name)
    values: list[Any] = (column.field(field) if field else column).to_pylist()
    if field and column.null_count:  # a null struct has null fields, whatever its children hold
        values = [value if valid else None for value, valid in zip(values, column.is_valid().to_pylist(), strict=True)]
    return values


def _binary_paths(schema: pa.Schema) -> list[str]:
    """Return the dotted paths of all columns that can hold encoded images."""
    paths = []
    for field in schema:
        if _is_binary(field.type):
            paths.append(field.name)
        elif pa.types.is_struct(field.type):
            index = field.type.get_field_index("bytes")
            if index >= 0 and _is_binary(field.type.field(index).type):
                paths.append(f"{field.name}.bytes")
    return paths


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _choose_columns(schema: pa.Schema, image_column: str, key_column: str, shard_name: str) -> _Columns:
    paths = _binary_paths(schema)
    by_name = {path.partition(".")[0]: path for path in paths}
    names = [image_column] if image_column != "auto" else [name for name in IMAGE_COLUMNS if name in by_name]
    names = names or (list(by_name) if len(by_name) == 1 else [])
    if not names or names[0] not in by_name:
        asked = f"has no image column {image_column!r}" if image_column != "auto" else "has no clear image column"
        raise InputError(
            f"{shard_name}: {asked}. Columns of bytes: {', '.join(by_name) or 'none'}; all: {', '.join(schema.names)}. "
            f"Choose one with --set input.image_column=NAME"
        )
    image = by_name[names[0]]
    if key_column != "auto":
        if key_column not in schema.names:
            raise InputError(
                f"{shard_name}: has no key column {key_column!r}. Columns: {', '.join(schema.names)}. "
                f"Choose one with --set input.key_column=NAME"
            )
        return _Columns(image, key_column)
    candidates: Sequence[str] = [
        name for name in KEY_COLUMNS if name in schema.names and _is_key(schema.field(name).type)
    ]
    if image.endswith(".bytes") and schema.field(names[0]).type.get_field_index("path") >= 0 and not candidates:
        return _Columns(image, f"{names[0]}.path")
    return _Columns(image, candidates[0] if candidates else None)


def _is_key(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
