"""The written list of keys of a folder or manifest: which image is in which chunk, decided once.

Parts `keys/000000.parquet`, `000001.parquet`, ... are only ever added. Later starts put new images into new chunks; an
image that was replaced gets a further row with its new version and keeps its chunk.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import OutputError
from segpipe.layout import RunLayout
from segpipe.records import ListedImage, Location, Version
from segpipe.storage import list_names, read_bytes, write_bytes
from segpipe.tables import parse_table

_SCHEMA = pa.schema(
    [
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.binary(), nullable=False),  # file names need not be UTF-8
        pa.field("size_bytes", pa.int64()),
        pa.field("etag", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class KeyList:
    """Every listed image of a run and the chunk it is in.

    Attributes:
        images: by key, in the order in which they were first listed, with the latest version.
        chunk_of: key to chunk index.
        num_chunks: chunks so far; new ones are numbered from here.
        num_parts: parts written so far.
    """

    images: dict[str, ListedImage] = field(default_factory=dict)
    chunk_of: dict[str, int] = field(default_factory=dict)
    num_chunks: int = 0
    num_parts: int = 0

    def chunks(self) -> list[tuple[ListedImage, ...]]:
        """Return the images of each chunk, by chunk index."""
        grouped: list[list[ListedImage]] = [[] for _ in range(self.num_chunks)]
        for key, image in self.images.items():
            grouped[self.chunk_of[key]].append(image)
        return [tuple(images) for images in grouped]

    def extended(self, new: Sequence[ListedImage], replaced: Iterable[ListedImage], *, chunk_images: int) -> "KeyList":
        """Return the list with new images in new chunks and with replaced images at their new versions."""
        images, chunk_of = dict(self.images), dict(self.chunk_of)
        images.update({image.key: image for image in replaced})
        for position, image in enumerate(new):
            images[image.key] = image
            chunk_of[image.key] = self.num_chunks + position // chunk_images
        num_chunks = self.num_chunks + -(-len(new) // chunk_images)
        return KeyList(images, chunk_of, num_chunks, self.num_parts)


def read_keys(layout: RunLayout, options: Location) -> KeyList:
    """Read the list from its parts; empty for a run that has none yet.

    Args:
        layout: places of the run.
        options: the input's root, whose store options hold for images of the same scheme.

    Raises:
        OutputError: if a part is damaged.
        StoreError: if the store does not answer.
    """
    keys = KeyList()
    num_chunks = 0
    names = [name for name in list_names(layout.keys_folder) if name.endswith(".parquet") and name[0] != "."]
    for name in names:
        try:
            table = parse_table(read_bytes(layout.keys_folder / name)).cast(_SCHEMA)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise OutputError(
                f"{(layout.keys_folder / name).uri}: is damaged ({' '.join(str(error).split())[:120]}); restore it, or "
                f"start a run of another name with output.run_id"
            ) from None
        for row in table.to_pylist():
            uri = row["uri"].decode("utf-8", "surrogateescape")
            place = Location(uri)
            if place.scheme == options.scheme:
                place = Location(uri, options.options)
            keys.images[row["key"]] = ListedImage(row["key"], place, Version(row["size_bytes"], row["etag"]))
            keys.chunk_of.setdefault(row["key"], row["chunk"])
            num_chunks = max(num_chunks, row["chunk"] + 1)
    return KeyList(keys.images, keys.chunk_of, num_chunks, len(names))


def write_keys(layout: RunLayout, keys: KeyList, changed: Iterable[ListedImage]) -> None:
    """Write one more part with the given images of the list.

    Raises:
        StoreError: if the store does not take it.
    """
    rows = [
        {
            "chunk": keys.chunk_of[image.key],
            "key": image.key,
            "uri": image.location.uri.encode("utf-8", "surrogateescape"),
            "size_bytes": image.version.size_bytes,
            "etag": image.version.etag,
        }
        for image in changed
    ]
    if not rows:
        return
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    write_bytes(layout.keys_folder / f"{keys.num_parts:06d}.parquet", buffer.getvalue())
