"""Manifests: text, CSV, JSON lines or Parquet with one image URI an entry. Relative URIs start at the manifest."""

import csv
import io
import ipaddress
import json
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import InputError
from segpipe.records import ListedImage, Location, Version
from segpipe.shards.keys import UniqueKeys, printable
from segpipe.storage import locate, read_bytes

# Names under which clouds serve the secrets of a machine to whoever asks from it.
_METADATA_HOSTS = frozenset({"metadata.google.internal", "metadata", "instance-data"})
URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "path", "image", "image_path", "file_name", "filename", "file")


def read_manifest(place: Location, *, column: str = "auto", allowed_schemes: Sequence[str] = ()) -> list[ListedImage]:
    """Return the images that a manifest names, in its order; a URI that stands twice gets `#2`.

    Args:
        place: `.txt` (one URI a line, `#` begins a comment), `.csv` with a header, `.jsonl`, or `.parquet`.
        column: column or JSON key with the URI; `auto` finds it.

        allowed_schemes: that entries may have; empty allows all to a local manifest, all but `file` to a remote one.

    Raises:
        InputError: if it cannot be parsed, has no such column, an entry is empty, or leads where it may not.
        StoreError: if the store does not answer.
    """
    parse = {"txt": _parse_text, "csv": _parse_csv, "jsonl": _parse_jsonl, "parquet": _parse_parquet}
    suffix = place.name.rsplit(".", 1)[-1].lower()
    content = read_bytes(place)
    try:
        uris = parse[suffix](content, column, place.name)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{place.uri}: not a readable .{suffix} manifest ({' '.join(str(error).split())[:200]})"
        ) from None
    empty = next((number for number, uri in enumerate(uris, start=1) if not uri.strip()), None)
    if empty is not None:
        raise InputError(f"{place.uri}: entry {empty} of {len(uris):,} has no image URI; fill it in or remove it")
    keys = UniqueKeys()
    images = [ListedImage(keys.add(printable(uri)), _resolve(uri, place), Version(None, None)) for uri in uris]
    _refuse_forbidden(images, place, allowed_schemes)
    return images


def _refuse_forbidden(images: Sequence[ListedImage], manifest: Location, allowed: Sequence[str]) -> None:
    """Keep a manifest of somebody else's from reading this machine's files or its cloud's secrets.

    Raises:
        InputError: if an entry has a scheme that is not allowed, or a link-local host, where metadata services are.
    """
    for number, image in enumerate(images, start=1):
        place = image.location
        if place.scheme not in allowed and (allowed or (place.is_local and not manifest.is_local)):
            raise InputError(
                f"{manifest.uri}: entry {number}, {image.key}, is a {place.scheme} address, which "
                f"{'a remote manifest may not name' if not allowed else 'input.allowed_schemes does not name'}; "
                f"add {place.scheme!r} to input.allowed_schemes if you trust it"
            )
        if place.scheme in ("http", "https") and _is_link_local(place.uri):
            raise InputError(f"{manifest.uri}: entry {number}, {image.key}, is a link-local address; remove it")


def _is_link_local(uri: str) -> bool:
    host = urlsplit(uri).hostname or ""
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return host.rstrip(".").lower() in _METADATA_HOSTS


def _resolve(uri: str, manifest: Location) -> Location:
    """Locate an entry; the store options of the input hold for entries of the same scheme only."""
    if "://" in uri or uri.startswith("/"):
        place = locate(uri)
        return Location(place.uri, manifest.options) if place.scheme == manifest.scheme else place
    return manifest.parent / uri


def _parse_text(content: bytes, column: str, name: str) -> list[str]:  # noqa: ARG001  # one shape for all formats
    lines = (line.strip() for line in content.decode("utf-8-sig").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _parse_csv(content: bytes, column: str, name: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    chosen = _choose(reader.fieldnames or [], column, name)
    return [row[chosen] or "" for row in reader]


def _parse_jsonl(content: bytes, column: str, name: str) -> list[str]:
    rows = [json.loads(line) for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    if not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{name}: each line must be a JSON object with the image's URI")
    chosen = _choose(rows[0] if rows else [], column, name)
    return [str(row.get(chosen) or "") for row in rows]


def _parse_parquet(content: bytes, column: str, name: str) -> list[str]:
    table = pq.ParquetFile(io.BytesIO(content)).read()
    texts = [
        field.name for field in table.schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    ]
    return [uri or "" for uri in table.column(_choose(texts, column, name)).to_pylist()]


def _choose(names: Iterable[str], column: str, manifest: str) -> str:
    known = list(names)
    candidates = [column] if column != "auto" else [name for name in URI_COLUMNS if name in known]
    if column == "auto" and not candidates and len(known) == 1:
        candidates = known
    if not candidates or candidates[0] not in known:
        asked = f"has no column {column!r}" if column != "auto" else "has no clear column of image URIs"
        raise InputError(
            f"{manifest}: {asked}. Columns: {', '.join(known) or 'none'}. Choose one with --set input.image_column=NAME"
        )
    return candidates[0]
