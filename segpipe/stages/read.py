"""The read stage: a shard or a list of images in, chunks of encoded images out. No pixel is decoded here."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from segpipe.errors import InputError, ShardCorruptError, StoreError
from segpipe.images import stable_text
from segpipe.layout import chunk_name
from segpipe.records import ChunkId, EncodedChunk, EncodedImage, Fault, ImageFailure, ListedImage
from segpipe.shards import FOLDER_SHARD, reader_for
from segpipe.shards.keys import UniqueKeys
from segpipe.shards.work import ListedWork, StreamWork, Work
from segpipe.storage import read_bytes


def read_chunks(work: Work) -> Iterator[EncodedChunk | Fault]:
    """Read the missing chunks of one piece of work, in order; at most one chunk and one image are held.

    A store that does not answer ends the work with a `Fault`.
    """
    started = time.perf_counter()
    try:
        for chunk in _read_listed(work) if isinstance(work, ListedWork) else _read_stream(work):
            yield replace(chunk, read_seconds=time.perf_counter() - started)
            started = time.perf_counter()
    except StoreError as error:
        where = work.chunk.name if isinstance(work, ListedWork) else work.shard.name
        yield Fault(where, "read", str(error))


def _read_listed(work: ListedWork) -> Iterator[EncodedChunk]:
    images = tuple(_read_image(image, work.chunk.shard, work.max_bytes) for image in work.images)
    yield EncodedChunk(work.chunk, images, retry=work.retry)


def _read_image(image: ListedImage, shard: str, max_bytes: int) -> EncodedImage:
    image_id = image_id_of(shard, image.key)
    if (image.version.size_bytes or 0) > max_bytes:
        return EncodedImage(image_id, image.key, None, b"", _too_many_bytes(image.version.size_bytes or 0, max_bytes))
    try:
        data = read_bytes(image.location)
        failure = _too_many_bytes(len(data), max_bytes) if len(data) > max_bytes else None
        return EncodedImage(image_id, image.key, None, b"" if failure else data, failure)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        failure = ImageFailure(
            "read", "NotFound", "there is no such file any more; it was listed when the run was planned"
        )
        return EncodedImage(image_id, image.key, None, b"", failure)


def _read_stream(work: StreamWork) -> Iterator[EncodedChunk]:
    """Cut a shard into chunks by position; each is handed on when what follows is known, so the last is marked."""
    images: list[EncodedImage] = []
    num_images = 0
    for image in _number(work):
        index, position = divmod(num_images, work.chunk_images)
        if position == 0 and num_images > 0:
            if _is_wanted(work, index - 1):
                yield EncodedChunk(_stream_chunk(work, index - 1), tuple(images), retry=work.retries.get(index - 1))
            images = []
            if work.max_chunks is not None and index >= work.max_chunks:
                return
        images.append(image)
        num_images += 1
    last = max(0, num_images - 1) // work.chunk_images
    if _is_wanted(work, last):
        chunk = _stream_chunk(work, last)
        yield EncodedChunk(chunk, tuple(images), shard_num_images=num_images, retry=work.retries.get(last))


def _number(work: StreamWork) -> Iterator[EncodedImage]:
    """Yield every image of a shard with its unique name; a shard that breaks off ends with one failed image."""
    keys = UniqueKeys()
    shard = work.shard.name
    ordinal = 0
    try:
        for key, content in reader_for(work.kind, work.config)(
            work.shard, lambda position: _is_wanted(work, position // work.chunk_images)
        ):
            unique = keys.add(key)
            failure = None
            data = b"" if isinstance(content, int) else content
            if isinstance(content, int):
                failure = _too_many_bytes(content, work.config.max_bytes)
            elif data is not None and not data:
                failure = ImageFailure("read", "Empty", "the image has no bytes")
            yield EncodedImage(f"{shard}/{unique}", unique, ordinal, data or b"", failure)
            ordinal += 1
    except (ShardCorruptError, InputError, FileNotFoundError) as error:
        kind = error.error_type if isinstance(error, ShardCorruptError) else "UnreadableShard"
        key = f"{shard}#read"
        yield EncodedImage(key, key, ordinal, b"", ImageFailure("read", kind, stable_text(error)))


def _too_many_bytes(found: int, allowed: int) -> ImageFailure:
    return ImageFailure("read", "TooManyBytes", f"{found:,} bytes, input.max_bytes allows {allowed:,}")


def _is_wanted(work: StreamWork, index: int) -> bool:
    return index not in work.done and (work.max_chunks is None or index < work.max_chunks)


def _stream_chunk(work: StreamWork, index: int) -> ChunkId:
    shard = work.shard
    generation = work.generations.get(index, 1)
    return ChunkId(chunk_name(shard.name, index), shard.name, index, generation, str(shard.version))


def image_id_of(shard: str, key: str) -> str:
    """Return the id of an image: its shard and key, relative to the input root."""
    return key if shard == FOLDER_SHARD else f"{shard}/{key}"


def chunk_version(images: Sequence[ListedImage]) -> str:
    """Return a text that changes when one of the listed images is replaced."""
    lines = "\n".join(f"{image.key}\t{image.version}" for image in images)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:32]
