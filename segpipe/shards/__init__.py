"""Inputs: what kind of input a URI is, which shards or images it holds, and how a shard is read.

A streamed kind (webdataset, parquet) has shards, read from end to end. A listed kind (folder, manifest) has images
that stand in a listing and are fetched one by one. To add a streamed kind: one module with a reader, one entry in
`READERS`, one line in `_kind_of`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from segpipe.config import InputConfig
from segpipe.errors import InputError, StoreError
from segpipe.listing import StoredFile, glob_root, is_glob, list_files
from segpipe.records import ListedImage, Location, Shard
from segpipe.shards.keys import UniqueKeys, printable
from segpipe.shards.manifest import read_manifest
from segpipe.shards.names import is_image_name, is_manifest_name, is_parquet_name, is_tar_name
from segpipe.shards.parquet import check_columns, has_image_column, read_parquet, sample_row_bytes
from segpipe.shards.webdataset import read_webdataset, sample_member_bytes
from segpipe.storage import filesystem, locate

InputKind = Literal["folder", "webdataset", "parquet", "manifest"]
# Name and encoded bytes of each image: None for those that are not wanted, a number for those that have too many.
Reader = Callable[[Shard, Callable[[int], bool]], Iterator[tuple[str, bytes | int | None]]]

FOLDER_SHARD = "."
_USUAL_IMAGE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class InputListing:
    """What an input holds, from listings alone.

    Attributes:
        kind: resolved kind.
        root: place that shard names and keys are relative to.
        shards: shards of a streamed kind, by name.
        images: images of a listed kind, in the order of the listing.
        shard_name: the one shard that `images` belong to: `.` for a folder, the manifest's name.
        num_ignored: files that are no input of this kind.
    """

    kind: InputKind
    root: Location
    shards: tuple[Shard, ...] = ()
    images: tuple[ListedImage, ...] = ()
    shard_name: str = FOLDER_SHARD
    num_ignored: int = 0

    @property
    def is_streamed(self) -> bool:
        """Tell whether images are read from shards, and so counted only while reading."""
        return self.kind in ("webdataset", "parquet")


def list_input(config: InputConfig) -> InputListing:
    """Find out what an input is and list it. Reads listings, a manifest, or one Parquet footer; no image.

    Raises:
        InputError: if there is nothing, nothing of a known kind, more than one kind, or it may not be read.
    """
    place = locate(config.uri, config.storage_options)
    try:
        files = list_files(place)
        listing = _list_kind(config, place, files)
    except FileNotFoundError:
        raise InputError(f"input.uri: there is nothing at {place.uri}; check the path") from None
    except StoreError as error:
        raise InputError(f"input.uri: cannot be read: {error}") from None
    if not listing.shards and not listing.images:
        raise InputError(f"input.uri: {place.uri} holds no {_WHAT[listing.kind]}{_examples(files)}")
    return listing


def reader_for(kind: InputKind, config: InputConfig) -> Reader:
    """Return the function that reads one shard of a streamed kind."""
    readers: dict[str, Reader] = {
        "webdataset": partial(read_webdataset, max_bytes=config.max_bytes),
        "parquet": partial(
            read_parquet, image_column=config.image_column, key_column=config.key_column, max_bytes=config.max_bytes
        ),
    }
    return readers[kind]


def sample_image_bytes(listing: InputListing, config: InputConfig) -> int:
    """Return the stored bytes of a typical image, at least 1.

    Of a listed input from the listing, of shards from the member headers or the footer of the first one; no image is
    read. Where neither says anything (a compressed tar, a manifest), 256 kB.
    """
    sizes = [image.version.size_bytes for image in listing.images if image.version.size_bytes is not None]
    if listing.is_streamed:
        first = listing.shards[0]
        with suppress(InputError, StoreError, FileNotFoundError):
            is_tar = listing.kind == "webdataset"
            sizes = sample_member_bytes(first) if is_tar else sample_row_bytes(first, config.image_column)
    return max(1, sum(sizes) // len(sizes)) if sizes else _USUAL_IMAGE_BYTES


_WHAT = {
    "folder": "image",
    "webdataset": "tar shard",
    "parquet": "Parquet shard",
    "manifest": "image URI",
}


def _list_kind(config: InputConfig, place: Location, files: list[StoredFile]) -> InputListing:
    kind = config.format if config.format != "auto" else _kind_of(place, files)
    if kind == "manifest":
        if len(files) != 1 or not is_manifest_name(files[0].name):
            raise InputError(f"input.uri: a manifest is one .txt, .csv, .jsonl or .parquet file, got {place.uri}")
        images = read_manifest(files[0].location, column=config.image_column, allowed_schemes=config.allowed_schemes)
        for image in {image.location.scheme: image for image in images}.values():
            filesystem(image.location)  # an unknown scheme is the manifest's mistake, not the image's
        return InputListing(kind, place.parent, images=tuple(images), shard_name=place.name)
    root = _root(place, files)
    belongs = {"folder": is_image_name, "webdataset": is_tar_name, "parquet": is_parquet_name}[kind]
    # A glob or a single file says by itself what is meant, whatever the names look like.
    exact = config.format != "auto" and (is_glob(place) or root != place)
    chosen = [file for file in files if exact or belongs(file.name)]
    keys = UniqueKeys()
    named = [(keys.add(printable(file.name)), file) for file in chosen]
    ignored = len(files) - len(chosen)
    if kind == "folder":
        images = [ListedImage(name, file.location, file.version) for name, file in named]
        return InputListing(kind, root, images=tuple(images), num_ignored=ignored)
    shards = tuple(Shard(name, file.location, file.version) for name, file in named)
    if kind == "parquet" and shards:
        check_columns(shards[0], config.image_column, config.key_column)
    return InputListing(kind, root, shards=shards, num_ignored=ignored)


def _root(place: Location, files: list[StoredFile]) -> Location:
    if is_glob(place):
        return glob_root(place)
    is_single_file = len(files) == 1 and files[0].location.uri == place.uri
    return place.parent if is_single_file else place


def _kind_of(place: Location, files: list[StoredFile]) -> InputKind:
    """Tell the kind of an input by the names in it.

    Raises:
        InputError: if they speak for none, or for more than one.
    """
    single = files[0] if len(files) == 1 and files[0].location.uri == place.uri else None
    if single is not None and is_parquet_name(single.name):
        return "parquet" if has_image_column(single.location) else "manifest"
    if single is not None and is_manifest_name(single.name):
        return "manifest"
    counts: Counter[InputKind] = Counter()
    for file in files:
        if is_image_name(file.name):
            counts["folder"] += 1
        elif is_tar_name(file.name):
            counts["webdataset"] += 1
        elif is_parquet_name(file.name):
            counts["parquet"] += 1
    if not counts:
        raise InputError(f"input.uri: {place.uri} holds no image, tar or Parquet file{_examples(files)}")
    if len(counts) > 1:
        found = ", ".join(f"{count} {_WHAT[kind]}s" for kind, count in counts.items())
        choices = " or ".join(f"--set input.format={kind}" for kind in counts)
        raise InputError(f"input.uri: {place.uri} holds more than one kind of input ({found}); choose with {choices}")
    return next(iter(counts))


def _examples(files: list[StoredFile]) -> str:
    if not files:
        return " (it is empty)"
    names = ", ".join(printable(file.name) for file in files[:3])
    return f" ({len(files)} other files, such as {names}; a glob with --set input.format takes any name)"
