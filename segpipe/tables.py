"""The tables: their schemas, and how they are written as Parquet and read back.

Only types that every engine reads: bool, int32, int64, float32, string. A file's metadata says which run made it, so
that one file alone explains itself. Rows hold no time of day and no name of a worker: the same input and settings
give the same bytes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.detections import ModelInfo
from segpipe.errors import OutputError
from segpipe.records import ChunkId, Receipt

# Readers refuse a newer one by name and read older ones.
SCHEMA_VERSION = 1

IMAGES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("ordinal", pa.int64()),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("byte_size", pa.int64(), nullable=False),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("exif_orientation", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_candidates", pa.int32(), nullable=False),
        pa.field("num_instances", pa.int32(), nullable=False),
        pa.field("instances_capped", pa.bool_(), nullable=False),
        pa.field("error_stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)

INSTANCES_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("instance_id", pa.int32(), nullable=False),
        pa.field("category_id", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("mask_score", pa.float32()),
        pa.field("bbox_x", pa.float32(), nullable=False),
        pa.field("bbox_y", pa.float32(), nullable=False),
        pa.field("bbox_w", pa.float32(), nullable=False),
        pa.field("bbox_h", pa.float32(), nullable=False),
        pa.field("area", pa.int64()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("rle_counts", pa.string()),
    ]
)

CATEGORIES_SCHEMA = pa.schema(
    [
        pa.field("category_id", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("contiguous_id", pa.int32()),
        pa.field("is_thing", pa.bool_(), nullable=False),
    ]
)

_RECEIPT_KEY = b"segpipe.receipt"
_RUN_KEY = b"segpipe.run"
_VERSION_KEY = b"segpipe.schema_version"


@dataclass(frozen=True, slots=True)
class RunLabel:
    """What every file of a run says about the run.

    Attributes:
        run_id: name of the run.
        fingerprint: of everything that the user asked for and that changes rows.
        model: what made the rows.
    """

    run_id: str
    fingerprint: str
    model: ModelInfo

    def metadata(self) -> dict[bytes, bytes]:
        """Return the label as Parquet key-value metadata."""
        label = {
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "model": self.model.name,
            "weights": self.model.weights,
            "weights_sha256": self.model.weights_sha256,
            "category_space": self.model.category_space,
            "bbox": "xywh, px, origin at the upper left corner of the upright image",
            "mask": "COCO compressed run lengths, column-major, of the upright image",
        }
        return {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _RUN_KEY: json.dumps(label, sort_keys=True).encode()}


def categories_table(model: ModelInfo) -> pa.Table:
    """Return every category id that the model can emit."""
    rows = [
        {
            "category_id": category_id,
            "category": name,
            "contiguous_id": model.contiguous_ids.get(category_id),
            "is_thing": True,
        }
        for category_id, name in sorted(model.categories.items())
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORIES_SCHEMA)


def write_table(table: pa.Table, label: RunLabel, receipt: Receipt | None = None) -> bytes:
    """Return a table as the bytes of a Parquet file that says where it comes from.

    Args:
        table: rows of one of the schemas above.
        label: of the run.
        receipt: for an images file, what was committed with it.
    """
    metadata = label.metadata()
    if receipt is not None:
        metadata[_RECEIPT_KEY] = json.dumps(asdict(receipt), sort_keys=True).encode()
    names = table.schema.names
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    repeated = [name for name in ("image_id", "shard", "format", "status", "category") if name in names]
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        buffer,
        compression="zstd",
        compression_level=3,
        use_dictionary=repeated,
        use_byte_stream_split=floats,
        # Least and greatest run-length code say nothing and may be long.
        write_statistics=[name for name in names if name != "rle_counts"],
        bloom_filter_options={"image_id": True} if "image_id" in names and table.num_rows else None,
    )
    return buffer.getvalue()


def parse_table(content: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table in the bytes of a Parquet file.

    Not `pyarrow.parquet.read_table`: that imports pandas, which takes a second.

    Raises:
        pyarrow.ArrowException: if the bytes are no Parquet file.
    """
    return pq.ParquetFile(io.BytesIO(content)).read(columns=None if columns is None else list(columns))


def parse_receipt(metadata: Mapping[bytes, bytes] | None, *, file: str) -> Receipt:
    """Return the receipt in the metadata of an images file.

    Args:
        metadata: key-value metadata of the Parquet file.
        file: its name, for messages.

    Raises:
        OutputError: if it has none, or was written by a newer segpipe.
    """
    check_schema_version(metadata, file=file)
    raw = (metadata or {}).get(_RECEIPT_KEY)
    if raw is None:
        raise OutputError(f"{file}: is no images file of segpipe (it has no receipt)")
    fields = json.loads(raw)
    return Receipt(**{**fields, "chunk": ChunkId(**fields["chunk"])})


def parse_label(metadata: Mapping[bytes, bytes] | None, *, file: str) -> Mapping[str, str]:
    """Return what a file says about its run: run_id, fingerprint, model, weights.

    Raises:
        OutputError: if it says nothing, or was written by a newer segpipe.
    """
    check_schema_version(metadata, file=file)
    label: Mapping[str, str] = json.loads((metadata or {})[_RUN_KEY])
    return label


def check_schema_version(metadata: Mapping[bytes, bytes] | None, *, file: str) -> None:
    """Refuse a file of a newer segpipe.

    Raises:
        OutputError: if it is newer, or no file of segpipe.
    """
    raw = (metadata or {}).get(_VERSION_KEY)
    if raw is None:
        raise OutputError(f"{file}: was not written by segpipe")
    if int(raw) > SCHEMA_VERSION:
        raise OutputError(
            f"{file}: has schema version {int(raw)}, this segpipe reads up to {SCHEMA_VERSION}; update segpipe"
        )
