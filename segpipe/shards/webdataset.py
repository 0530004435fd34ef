"""Tar shards, plain or compressed, as a stream of images.

Each member with an image's name is one image and its member name is the key; other members (labels, JSON) are
passed over. The tar is read once, forward, one member in memory at a time.

Python's tarfile ends quietly where a header is cut short, broken or missing: half a shard would be lost without a
word. Here such an end is `ShardCorruptError`. (A store that gives fewer bytes than it should is `StoreError` before
tarfile sees it.) Format: POSIX.1-2017 pax and ustar; two zero blocks end an archive.
"""

import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from zlib import error as ZlibError  # noqa: N812  # the name zlib gives its exception says nothing

from segpipe.errors import ShardCorruptError
from segpipe.records import Shard
from segpipe.shards.keys import printable
from segpipe.shards.names import is_image_name
from segpipe.storage import open_stream

_BUFFER_BYTES = 1 << 20
_BAD_BYTES = (tarfile.TarError, EOFError, ZlibError)


class _BadHeaderError(Exception):
    """Escapes tarfile, which swallows its own header errors."""


class _StrictTarInfo(tarfile.TarInfo):
    """A member header that reports every end of the archive but the proper one."""

    @classmethod
    def fromtarfile(cls, tarfile_object: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_object)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in typeshed; a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise _BadHeaderError(str(error) or type(error).__name__) from error


def read_webdataset(
    shard: Shard, wanted: Callable[[int], bool], *, max_bytes: int
) -> Iterator[tuple[str, bytes | int | None]]:
    """Yield (member name, encoded bytes) for each image of a tar, in its order.

    Args:
        shard: `.tar`, or compressed with gzip, bzip2 or xz.
        wanted: tells whether the bytes of the image at this position are needed; others come as None.
        max_bytes: of a larger member only the size is given, and its bytes are passed over.

    Raises:
        ShardCorruptError: where the bytes cannot be read any further.
        StoreError: if the store does not answer, or gives less than it listed.
    """
    with open_stream(shard.location, listed_bytes=shard.version.size_bytes) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", bufsize=_BUFFER_BYTES, tarinfo=_StrictTarInfo) as tar:
                yield from _read_members(tar, wanted, max_bytes)
                _refuse_more(tar)
        except (_BadHeaderError, *_BAD_BYTES) as error:
            raise ShardCorruptError("TruncatedShard", _describe(error)) from error


def sample_member_bytes(shard: Shard, *, num_images: int = 16) -> list[int]:
    """Return the bytes that the first images of a tar take in it, header included, from the headers alone.

    Empty for a compressed tar, whose headers cannot be had without its images.

    Raises:
        StoreError: if the store does not answer.
    """
    with open_stream(shard.location) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_StrictTarInfo) as tar:
                images = (member for member in tar if member.isreg() and is_image_name(member.name))
                blocks = [1 + -(-member.size // tarfile.BLOCKSIZE) for member in islice(images, num_images)]
                return [count * tarfile.BLOCKSIZE for count in blocks]
        except (_BadHeaderError, *_BAD_BYTES):
            return []


def _read_members(
    tar: tarfile.TarFile, wanted: Callable[[int], bool], max_bytes: int
) -> Iterator[tuple[str, bytes | int | None]]:
    ordinal = 0
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # missing in typeshed; tarfile keeps every header it has seen, 1 kB each
        if not member.isreg() or not is_image_name(member.name):
            continue
        data: bytes | int | None = None
        if wanted(ordinal) and member.size > max_bytes:
            data = member.size
        elif wanted(ordinal):
            file = tar.extractfile(member)
            data = file.read() if file is not None else b""
            if len(data) < member.size:
                raise tarfile.ReadError(
                    f"member {printable(member.name)!r} ends after {len(data)} of {member.size} bytes"
                )
        yield printable(member.name).removeprefix("./"), data
        ordinal += 1


def _refuse_more(tar: tarfile.TarFile) -> None:
    """Make sure that nothing but zeros follows the end of an archive, where tarfile stops without a word.

    Raises:
        tarfile.ReadError: if something does, as when archives were put together with `cat`.
    """
    rest = tar.fileobj
    while rest is not None and (block := rest.read(_BUFFER_BYTES)):
        if block.strip(b"\0"):
            raise tarfile.ReadError("after its end there is more, such as another archive (`tar -A` joins archives)")


def _describe(error: BaseException) -> str:
    text = {
        "empty header": "ends without the two zero blocks of a complete archive",
        "truncated header": "ends in the middle of a member's header",
        "bad checksum": "a member's header is damaged",
    }.get(str(error), str(error) or type(error).__name__)
    return f"the archive cannot be read any further: {text}"
