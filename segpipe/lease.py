"""One driver per run: a lease object that says who is working, renewed while they do.

The lease is created with a conditional write, so of two drivers one wins. A holder on this machine is asked for by its
process; one elsewhere is taken for dead when its lease stays unchanged for STALE_S as this machine's own clock counts,
so that no two clocks are ever compared.
"""

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from segpipe.errors import LeaseLostError, RunLockedError, StoreError
from segpipe.records import Location
from segpipe.storage import create_bytes, delete, read_bytes, write_bytes

RENEW_S = 10.0
STALE_S = 60.0
# After taking over a dead holder's lease: time for another driver that saw the same dead holder to show up.
SETTLE_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease.

    Attributes:
        token: random, one for each start.
        host: machine, and on Linux the process namespace, so that containers do not take each other's processes.
        pid: process.
        process_started: when that process began, to tell it from a later one with the same number.
        user: account name.
        renewals: counts up while the holder lives.
    """

    token: str
    host: str
    pid: int
    process_started: float
    user: str
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host.split('/')[0]}"


class Lease:
    """A held lease. `check` raises as soon as another process has taken it over."""

    def __init__(self, place: Location, holder: Holder) -> None:
        self._place = place
        self._holder = holder
        self._stop = threading.Event()
        self._lost_to: str | None = None
        self._thread = threading.Thread(target=self._renew, name="segpipe-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the lease is still this process's.

        Raises:
            LeaseLostError: if it is not.
        """
        if self._lost_to is not None:
            raise LeaseLostError(f"another driver took this run over: {self._lost_to}; this one stops")

    def release(self) -> None:
        """Stop renewing, and give the lease back if it is still this process's."""
        self._stop.set()
        self._thread.join()
        found = read_holder(self._place)
        if found is not None and found.token == self._holder.token:
            delete([self._place])

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                found = read_holder(self._place)
                if found is None or found.token != self._holder.token:
                    self._lost_to = str(found) if found else "somebody who removed the lease"
                    return
                self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
                write_bytes(self._place, _encode(self._holder))
            except StoreError as error:
                logger.warning("lease_renewed=false reason=%s", error)


@contextmanager
def hold_lease(place: Location, on_wait: Callable[[str], None] = logger.info) -> Iterator[Lease]:
    """Hold the lease of a run while the body runs.

    Args:
        place: of the lease file.
        on_wait: told in words what is being waited for.

    Raises:
        RunLockedError: if a living process holds it; names the holder.
        StoreError: if the store does not answer.
    """
    holder = _this_process()
    while not create_bytes(place, _encode(holder)):
        _remove_if_dead(place, on_wait)
        if create_bytes(place, _encode(holder)):
            time.sleep(SETTLE_S)
            if read_holder(place) == holder:
                break
    lease = Lease(place, holder)
    try:
        yield lease
    finally:
        lease.release()


def read_holder(place: Location) -> Holder | None:
    """Return who holds a lease, None if nobody does. A lease that was cut short names nobody in particular."""
    try:
        content = read_bytes(place)
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return Holder(token=f"unreadable {len(content)}", host="an unknown machine", pid=0, process_started=0, user="?")


def is_alive(holder: Holder) -> bool | None:
    """Tell whether the holder's process lives; None if it is on another machine."""
    if holder.host != _host():
        return None
    try:
        return abs(psutil.Process(holder.pid).create_time() - holder.process_started) < 1
    except psutil.NoSuchProcess:
        return False


def _remove_if_dead(place: Location, on_wait: Callable[[str], None]) -> None:
    """Remove the lease of a dead holder.

    Raises:
        RunLockedError: if the holder lives.
    """
    holder = read_holder(place)
    if holder is None:
        return
    alive = is_alive(holder)
    if alive is None:
        on_wait(f"the run is held by {holder}: watching for {STALE_S:.0f} s whether it is alive")
        alive = _watch(place, holder)
    if alive:
        raise RunLockedError(f"this run is being worked on by {holder}; wait for it, or stop it and start again")
    if read_holder(place) == holder:  # nobody else has taken it over meanwhile
        delete([place])


def _watch(place: Location, holder: Holder) -> bool:
    """Tell whether a lease changes within STALE_S."""
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_S / 10))
        found = read_holder(place)
        if found is None:
            return False
        if found != holder:
            return True
    return False


def _this_process() -> Holder:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        user = str(os.getuid())
    started = psutil.Process().create_time()
    return Holder(uuid.uuid4().hex, _host(), os.getpid(), started, user)


def _host() -> str:
    """Return a name for where process ids mean something: this start of this machine, and the container's own ids.

    Host names alone are shared by machines that were copied from one image.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()
