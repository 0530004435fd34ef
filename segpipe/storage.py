"""Files in object stores and on disks, through fsspec: one code for `s3://`, `gs://`, `memory://` and local paths.

Knows atomic writes, listings, versions of objects, and which errors are faults of the store (retried, then
`StoreError`) rather than answers (`FileNotFoundError`). Knows nothing of runs, images or tables.
"""

import asyncio
import io
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import fsspec.core
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from segpipe.errors import PlaceError, StoreError
from segpipe.records import Location

Result = TypeVar("Result")

TEMPORARY_SUFFIX = ".tmp"

# Answers, not faults: asking again gives the same.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# Store clients raise their own errors too; they are told by the package that they come from.
_STORE_PACKAGES = frozenset({"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "google", "azure"})


def locate(uri: str, options: Mapping[str, Any] | None = None) -> Location:
    """Return the place that a user's text names; a local path becomes absolute.

    Raises:
        PlaceError: if a URI has nothing but a scheme, as an empty variable in `s3://$BUCKET` leaves it.
    """
    text = uri.removeprefix("file://")
    if "://" in text:
        if not text.split("://", 1)[1].strip("/"):
            raise PlaceError(f"{uri}: names no bucket or folder; write it out, such as s3://bucket/lake")
        return Location(text.rstrip("/"), options or {})
    return Location(os.path.abspath(os.path.expanduser(text)), options or {})


def list_names(place: Location) -> list[str]:
    """Return the sorted names directly below a place, hidden ones included; empty if it does not exist."""
    try:
        entries = attempt(place, lambda: filesystem(place).ls(path_of(place), detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
    return sorted(names - {place.name} if not place.is_local else names)


def read_bytes(place: Location) -> bytes:
    """Return the whole content.

    Raises:
        FileNotFoundError: if it does not exist.
        StoreError: if the store does not answer.
    """
    content: bytes = attempt(place, lambda: filesystem(place).cat_file(path_of(place)))
    return content


def write_bytes(place: Location, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    On a local disk: written beside, synced, renamed. In an object store: one put.

    Raises:
        StoreError: if the store does not take it.
    """
    if place.is_local:
        attempt(place, partial(_write_local, place, content))
    else:
        attempt(place, lambda: filesystem(place).pipe_file(path_of(place), content))


def create_bytes(place: Location, content: bytes) -> bool:
    """Write a file only if it does not exist; return whether this call created it. Of two callers one wins.

    Raises:
        StoreError: if the store does not answer.
    """
    try:
        if place.is_local:
            attempt(place, partial(_create_local, place, content))
        else:
            attempt(place, lambda: filesystem(place).pipe_file(path_of(place), content, mode="create"))
    except FileExistsError:
        return False
    return True


def delete(places: Sequence[Location]) -> None:
    """Delete files; those that are gone already are no error."""
    for place in places:
        try:
            attempt(place, partial(filesystem(place).rm_file, path_of(place)))
        except FileNotFoundError:
            continue


@contextmanager
def open_stream(place: Location, *, listed_bytes: int | None = None) -> Iterator["StoreStream"]:
    """Open a file for reading from its beginning.

    Args:
        place: of the file.
        listed_bytes: size that a listing gave, None if unknown.

    Raises:
        FileNotFoundError: if it does not exist.
        StoreError: if it has another size now, or the store does not answer, now or in a later read.
    """
    raw = attempt(place, lambda: filesystem(place).open(path_of(place), "rb"))
    try:
        if listed_bytes is not None and raw.size not in (None, listed_bytes):
            raise StoreError(f"{place.uri}: has {raw.size:,} bytes, the listing said {listed_bytes:,}; it was replaced")
        yield StoreStream(raw, place)
    finally:
        raw.close()


class StoreStream(io.RawIOBase):
    """A readable, seekable file whose faults are `StoreError`, so that no format library takes them for bad bytes.

    That includes a store which gives less than was asked for before the end of the file.
    """

    def __init__(self, raw: IO[bytes], place: Location) -> None:
        super().__init__()
        self._raw = raw
        self._place = place

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, or all that is left if there are fewer, or if it is negative."""
        asked = -1 if size is None else size
        with _faults(self._place):
            content: bytes = self._raw.read(asked)
            position, end = self._raw.tell(), getattr(self._raw, "size", None)
        if len(content) < asked and end is not None and position < end:
            raise StoreError(f"{self._place.uri}: gave {len(content):,} of {asked:,} bytes before its end at {end:,}")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it."""
        with _faults(self._place):
            return int(self._raw.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return int(self._raw.tell())

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def filesystem(place: Location) -> Any:  # noqa: ANN401  # fsspec has no types
    """Return the fsspec file system of a place; one instance a process and set of options.

    Raises:
        PlaceError: if the scheme is unknown, or its client is not installed.
    """
    return _resolve(place)[0]


def path_of(place: Location) -> str:
    """Return the path of a place within its file system."""
    return _resolve(place)[1]


def _resolve(place: Location) -> tuple[Any, str]:
    if place.is_local:
        return LocalFileSystem(), place.uri
    try:
        # A cached listing would hide what another process has written since.
        store, path = fsspec.core.url_to_fs(place.uri, use_listings_cache=False, **place.options)
    except (ValueError, ImportError, TypeError) as error:  # TypeError: an option that the client does not know
        raise PlaceError(f"{place.uri}: cannot be reached: {' '.join(str(error).split())}") from None
    return store, str(path)


def _write_local(place: Location, content: bytes) -> None:
    """Write beside, sync, rename over the final name, sync the folder."""
    path = Path(place.uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name itself must outlive a power cut
    finally:
        os.close(folder)


def _create_local(place: Location, content: bytes) -> None:
    path = Path(place.uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:  # "x" fails with FileExistsError for all callers but one, on any file system
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)  # half of it would look like somebody else's
            raise


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, (OSError, asyncio.TimeoutError)):
        return True
    return type(error).__module__.split(".")[0] in _STORE_PACKAGES


@contextmanager
def _faults(place: Location) -> Iterator[None]:
    """Turn what a store client raises into `StoreError`; answers such as FileNotFoundError pass."""
    try:
        yield
    except _ANSWERS as error:
        if isinstance(error, PermissionError):
            raise StoreError(f"{place.uri}: permission denied; check the rights or the credentials") from error
        raise
    except Exception as error:
        if not _is_fault(error):
            raise
        raise StoreError(f"{place.uri}: {type(error).__name__}: {error}") from error


def attempt(place: Location, call: Callable[[], Result]) -> Result:
    """Call, and call again with growing pauses while the store has faults: four times within some 10 s."""
    attempts = Retrying(
        retry=retry_if_exception(lambda error: _is_fault(error) and not isinstance(error, _ANSWERS)),
        stop=stop_after_attempt(4),
        wait=wait_random_exponential(multiplier=0.3, max=5),
        reraise=True,
    )
    with _faults(place):
        return attempts(call)
