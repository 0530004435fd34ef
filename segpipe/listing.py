"""Listings of stores and folders: names, places and versions of files; never their content."""

import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segpipe.records import Location, Version
from segpipe.storage import attempt, filesystem, path_of

GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One entry of a listing.

    Attributes:
        name: relative to the place that was listed.
        location: where it is.
        version: what the store says about it.
    """

    name: str
    location: Location
    version: Version


def list_files(place: Location) -> list[StoredFile]:
    """List every file below a place, or the one file that it is, or what a glob matches; sorted by name.

    Reads listings only. Hidden files (names beginning with a dot) are left out.

    Raises:
        FileNotFoundError: if there is nothing at the place.
        StoreError: if the store does not answer.
    """
    if is_glob(place):
        root = glob_root(place)
        found = attempt(place, lambda: filesystem(place).glob(path_of(place), detail=True))
        files = [_stored(root, info) for info in found.values() if info["type"] != "directory"]
    elif place.is_local:
        files = attempt(place, lambda: _list_local(place))
    else:
        found = attempt(place, lambda: filesystem(place).find(path_of(place), detail=True))
        files = [_stored(place, info) for info in found.values()]
        if not files:
            raise FileNotFoundError(place.uri)
    visible = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    return sorted(visible, key=lambda file: file.name)


def is_glob(place: Location) -> bool:
    """Tell whether a place is a pattern; a local path with brackets in it that exists is not."""
    return bool(GLOB_CHARACTERS & set(place.uri)) and not (place.is_local and os.path.lexists(place.uri))


def glob_root(place: Location) -> Location:
    """Return the part of a place before its first glob character, cut at a slash."""
    positions = [place.uri.find(character) for character in GLOB_CHARACTERS if character in place.uri]
    if not positions:
        return place
    return Location(place.uri[: min(positions)].rsplit("/", 1)[0] or "/", place.options)


def _stored(root: Location, info: Mapping[str, Any]) -> StoredFile:
    path, base = str(info["name"]), path_of(root).rstrip("/")
    name = path.rsplit("/", 1)[-1] if path == base else path.removeprefix(f"{base}/")
    if root.is_local:
        return StoredFile(name, Location(path, root.options), _local_version(path))
    place = Location(root.uri, root.options) if path == base else root / name
    etag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified") if info.get(key)), None)
    return StoredFile(name, place, Version(info.get("size"), etag.strip('"') if etag else None))


def _list_local(place: Location) -> list[StoredFile]:
    root = place.uri
    if os.path.isfile(root):
        return [StoredFile(place.name, place, _local_version(root))]
    if not os.path.isdir(root):
        raise FileNotFoundError(root)
    files, seen = [], {os.path.realpath(root)}
    # Linked folders are followed, as people keep data sets that way; a link back up ends at `seen`.
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders if name[0] != "."}
        subfolders[:] = sorted(name for name, target in targets.items() if target not in seen)
        seen.update(targets.values())
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) or not os.path.exists(path):  # a link to nowhere is an input that cannot be read
                files.append(StoredFile(os.path.relpath(path, root), Location(path), _local_version(path)))
    return files


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out a folder that it may not read


def _local_version(path: str) -> Version:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Version(None, None)
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return Version(status.st_size, f"modified {moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z")
