"""Whether this machine can do the job: what is installed, what can be reached, what is short; each with the fix."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from segpipe.engines import local_cpus
from segpipe.errors import PlaceError, StoreError
from segpipe.records import Location
from segpipe.runs import versions
from segpipe.storage import delete, filesystem, locate, path_of, read_bytes, write_bytes

_LEAST_DISK_BYTES = 2 << 30
_LEAST_SHARED_BYTES = 1 << 30
_MOST_SKEW_S = 30.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        is_good: False if it stands in the way of a run.
        text: what was found.
        fix: what to do about it; empty where there is nothing to do.
    """

    name: str
    is_good: bool
    text: str
    fix: str = ""


def examine(output: str | None = None, *, ray_address: str | None = None) -> list[Finding]:
    """Look at this machine, and at an output place and a Ray cluster if they are named.

    Args:
        output: folder of a lake that is to be written, path or URI; None looks at none.
        ray_address: of a cluster; None takes RAY_ADDRESS, and looks at none where that is not set.
    """
    findings = [
        _packages(),
        _devices(),
        _memory(),
        _shared_memory(),
        _disk(Location(tempfile.gettempdir()), "temp disk"),
    ]
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        findings.append(_ray(address))
    if output is not None:
        findings += _output(output)
    return findings


def _packages() -> Finding:
    found = versions()
    required = importlib.metadata.requires("segpipe") or []
    broken = [line.split(";")[0].strip() for line in required if "extra ==" not in line and not _is_met(line)]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    fix = f"install what is missing or of another version: {', '.join(broken)}" if broken else ""
    return Finding("versions", not broken, text, fix)


def _is_met(requirement: str) -> bool:
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    try:
        return parsed.specifier.contains(importlib.metadata.version(parsed.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def _devices() -> Finding:
    from segpipe.models.maskrcnn import describe_devices

    text, is_fast = describe_devices()
    fix = "" if is_fast else "a CPU takes seconds an image with the ResNet-50 models; for an archive, take a GPU"
    return Finding("devices", is_good=True, text=f"{text}; {local_cpus()} CPUs, {platform.machine()}", fix=fix)


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    text = f"{free / 1e9:.1f} GB free"
    return Finding("memory", free > _LEAST_DISK_BYTES, text, "" if free > _LEAST_DISK_BYTES else "close other programs")


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):  # noqa: S108  # looked at, not written
        return Finding("shared memory", is_good=True, text="none on this system; Ray takes files")
    size = shutil.disk_usage("/dev/shm").total  # noqa: S108
    is_good = size >= _LEAST_SHARED_BYTES
    fix = "" if is_good else "give a container more of it, such as docker run --shm-size=2g; Ray is slow without"
    return Finding("shared memory", is_good, f"{size / 1e9:.1f} GB", fix)


def _disk(place: Location, name: str) -> Finding:
    folder = place.uri
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    is_good = free >= _LEAST_DISK_BYTES
    return Finding(name, is_good, f"{free / 1e9:.1f} GB free at {folder}", "" if is_good else "make room there")


def _ray(address: str) -> Finding:
    from segpipe.engines.ray import describe_cluster

    try:
        return Finding("ray", is_good=True, text=f"{address}: {describe_cluster(address)}")
    except ConnectionError as error:
        fix = "check address, network and, since Ray 2.59, the token (RAY_AUTH_TOKEN)"
        return Finding("ray", is_good=False, text=f"{address}: {error}", fix=fix)


def _output(output: str) -> Iterator[Finding]:
    """Look at an output place: who is asked, whether it can be written and read back, and what time it has."""
    try:
        place = locate(output)
        filesystem(place)
    except PlaceError as error:
        yield Finding("output", is_good=False, text=str(error), fix="write it as s3://bucket/folder, or a path")
        return
    if place.is_local:
        yield _disk(place, "output disk")
    elif place.scheme == "s3":
        yield _identity()
    probe = place / f"segpipe-doctor-{uuid.uuid4().hex}"
    content = os.urandom(1024)
    try:
        before = time.time()
        write_bytes(probe, content)
        is_same = read_bytes(probe) == content
        skew = _skew(probe, before)
        delete([probe])
    except (StoreError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        yield Finding("output", is_good=False, text=text, fix="check that it exists, and the rights or the credentials")
        return
    yield Finding("output", is_same, f"{place.uri}: written, read back and removed", "" if is_same else "another store")
    if skew is not None:
        is_good = abs(skew) <= _MOST_SKEW_S
        fix = "" if is_good else "set the clock (NTP): requests with a wrong time are refused by stores"
        yield Finding("clock", is_good, f"{skew:+.1f} s between the store and this machine", fix)


def _skew(probe: Location, before: float) -> float | None:
    """Return by how many seconds the store's clock is ahead; None where it does not say."""
    modified: Callable[[str], object] = filesystem(probe).modified
    try:
        moment = modified(path_of(probe))
    except (NotImplementedError, FileNotFoundError):
        return None
    stamp = getattr(moment, "timestamp", None)
    return None if stamp is None else float(stamp()) - before


def _identity() -> Finding:
    """Say whose credentials are used: the key's id and where it was found, never the secret."""
    import botocore.session

    credentials = botocore.session.Session().get_credentials()
    if credentials is None:
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; public buckets want the option anon"
        return Finding("credentials", is_good=False, text="none found", fix=fix)
    return Finding("credentials", is_good=True, text=f"{credentials.access_key}, from {credentials.method}")
