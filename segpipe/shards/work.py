"""Work to be read: one shard with the chunks that are still missing, or one chunk of listed images."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from segpipe.config import InputConfig
from segpipe.records import ChunkId, ListedImage, Shard
from segpipe.shards import InputKind


@dataclass(frozen=True, slots=True)
class StreamWork:
    """A shard to be read from end to end; chunks that are done are passed over.

    Attributes:
        shard: what to read.
        kind: `webdataset` or `parquet`.
        config: the `input` section.
        chunk_images: images a chunk.
        done: indexes of committed chunks.
        generations: index to generation of chunks that are redone; others are the first.
        max_chunks: stop after this many chunks of the shard; None reads it all.
        retries: index to the image_ids to segment again, of chunks in which only they are.
    """

    shard: Shard
    kind: InputKind
    config: InputConfig
    chunk_images: int
    done: frozenset[int] = frozenset()
    generations: Mapping[int, int] = field(default_factory=dict)
    max_chunks: int | None = None
    retries: Mapping[int, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListedWork:
    """One chunk of images that stand in a listing.

    Attributes:
        chunk: identity of the chunk.
        images: in order.
        max_bytes: a larger image is not read.
        retry: image_ids to segment again; None segments all.
    """

    chunk: ChunkId
    images: tuple[ListedImage, ...]
    max_bytes: int
    retry: frozenset[str] | None = None


Work = StreamWork | ListedWork
