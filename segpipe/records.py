"""The values that travel between the stages: plain data, no behaviour beyond what their fields say.

A *shard* is an input object holding many images, or a folder; a *chunk* is a run of consecutive images of one
shard and the unit of work, retry and commit; an *instance* is one detected object with its mask. Boxes are xyxy
inside the code and COCO xywh in tables; masks are (height, width), column-major in RLE.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa


# ---------------------------------------------------------------- inputs
@dataclass(frozen=True, slots=True)
class Location:
    """A place in a store: a URI or an absolute local path, and what its client needs to be told.

    Attributes:
        uri: without a trailing slash.
        options: passed to the fsspec file system (endpoint_url, profile, anon, ...).
    """

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.uri.rstrip('/')}/{name}", self.options)

    @property
    def name(self) -> str:
        """Return the last part of the URI."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        """Return the place one part up."""
        return Location(self.uri.rstrip("/").rsplit("/", 1)[0] or "/", self.options)

    @property
    def is_local(self) -> bool:
        """Tell whether this is a path on this machine."""
        return "://" not in self.uri

    @property
    def scheme(self) -> str:
        """Return the protocol, `file` for a local path."""
        return "file" if self.is_local else self.uri.split("://", 1)[0]


@dataclass(frozen=True, slots=True)
class Version:
    """What a store says about one version of an object; two unequal versions mean that it was replaced.

    Attributes:
        size_bytes: None where the listing does not say.
        etag: the store's entity tag; for a local file its modification time; None where there is neither.
    """

    size_bytes: int | None
    etag: str | None

    def __str__(self) -> str:
        size = "unknown size" if self.size_bytes is None else f"{self.size_bytes:,} bytes"
        return size if self.etag is None else f"{size}, {self.etag}"


@dataclass(frozen=True, slots=True)
class Shard:
    """An input object that holds many images and is read as a stream.

    Attributes:
        name: relative to the input root.
        location: where it is.
        version: as the listing said when the run was planned.
    """

    name: str
    location: Location
    version: Version


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One image that stands in a listing: a file of a folder or a line of a manifest.

    Attributes:
        key: unique in its shard; file name relative to the input root, or the URI as the manifest has it.
        location: where it is.
        version: as the listing said.
    """

    key: str
    location: Location
    version: Version


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """Why one image has no instances: what is wrong with its bytes.

    Attributes:
        stage: `read`, `decode` or `segment`.
        type: short stable name of the problem.
        message: for people; holds no path of the worker, no process id and no address.
    """

    stage: Literal["read", "decode", "segment"]
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header of an encoded image says.

    Attributes:
        format: Pillow's name, for example `JPEG`.
        width: px, upright.
        height: px, upright.
        exif_orientation: as stored, None if absent; only 2 to 8 turn the image.
    """

    format: str
    width: int
    height: int
    exif_orientation: int | None


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One input image as it was stored, or why it could not be read.

    Attributes:
        image_id: unique in the run, relative to the input root.
        key: member or file name.
        ordinal: 0-based position in a streamed shard; None for files and manifest entries.
        data: encoded bytes; empty if `failure` is set.
    """

    image_id: str
    key: str
    ordinal: int | None
    data: bytes
    failure: ImageFailure | None = None


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Which images of which version of a shard a chunk holds. Decided once for a run.

    Attributes:
        name: file name stem, unique in the run.
        shard: shard name, relative to the input root.
        index: 0-based position of the chunk in its shard.
        generation: 1, and one more each time the chunk is redone.
        version: text that changes when the chunk's input was replaced.
    """

    name: str
    shard: str
    index: int
    generation: int
    version: str


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as it was read.

    Attributes:
        shard_num_images: set on the last chunk of a streamed shard: how many images the shard holds.
        read_seconds: time spent reading.
        retry: image_ids to segment again; the rows of the others are those that are committed. None segments all.
    """

    id: ChunkId
    images: tuple[EncodedImage, ...]
    shard_num_images: int | None = None
    read_seconds: float = 0.0
    retry: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A chunk that could not be finished for a reason that lies outside its bytes. It stays pending.

    Attributes:
        where: chunk or shard name.
        stage: stage that gave up.
        message: what happened, for people.
    """

    where: str
    stage: str
    message: str


# ---------------------------------------------------------------- outputs
@dataclass(frozen=True, slots=True)
class Receipt:
    """What a committed chunk says about itself, stored in its images file.

    Attributes:
        chunk: identity of the chunk.
        instances_file: file name beside the other instances files of the run.
        instances_sha256: checksum of that file.
        num_images: rows of the images file.
        num_failed: of them, rows with status `failed`.
        num_instances: rows of the instances file.
        num_capped: images that max_instances cut.
        shard_num_images: set on the last chunk of a streamed shard.
        resolved: what `auto` became on the worker: batch_size, dtype, device, threads, mask_encoder.
    """

    chunk: ChunkId
    instances_file: str
    instances_sha256: str
    num_images: int
    num_failed: int
    num_instances: int
    num_capped: int
    shard_num_images: int | None
    resolved: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class SegmentedChunk:
    """A chunk after inference, ready to be written.

    Attributes:
        images: Arrow table of `images` rows.
        instances: Arrow table of `instances` rows.
        resolved: see `Receipt.resolved`.
        seconds: stage name to seconds.
    """

    id: ChunkId
    images: "pa.Table"
    instances: "pa.Table"
    shard_num_images: int | None
    resolved: Mapping[str, str | int]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Committed:
    """A chunk whose rows are on disk.

    Attributes:
        receipt: as stored.
        seconds: stage name to seconds, for the summary; never stored in rows.
    """

    receipt: Receipt
    seconds: Mapping[str, float]
