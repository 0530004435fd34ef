"""One driver per run: of two one wins, the living are left alone, the dead are taken over."""

import json
import multiprocessing
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from segpipe import lease as lease_module
from segpipe.errors import LeaseLostError, RunLockedError, StoreError
from segpipe.lease import hold_lease, is_alive, read_holder
from segpipe.records import Location
from segpipe.storage import create_bytes, write_bytes


@pytest.fixture
def place(tmp_path) -> Location:
    return Location(str(tmp_path / "runs" / "r" / "lease.json"))


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed and go stale in fractions of a second."""
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    monkeypatch.setattr(lease_module, "STALE_S", 0.6)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.05)


def elsewhere(**changes) -> lease_module.Holder:
    return replace(lease_module._this_process(), host="other-machine/pid:[1]", token="theirs", **changes)


def store(place: Location, holder: lease_module.Holder) -> None:
    write_bytes(place, json.dumps(asdict(holder)).encode())


def test_a_lease_is_held_while_the_body_runs_and_gone_afterwards(place):
    with hold_lease(place) as lease:
        assert read_holder(place).pid == os.getpid()
        lease.check()
    assert read_holder(place) is None


def test_a_lease_is_given_back_when_the_body_fails(place):
    with pytest.raises(KeyError), hold_lease(place):
        raise KeyError
    assert read_holder(place) is None


def test_a_second_driver_is_refused_and_told_who_holds_it(place):
    with (
        hold_lease(place),
        pytest.raises(RunLockedError, match=rf"being worked on by process {os.getpid()} of .* on .*; wait for it"),
        hold_lease(place),
    ):
        pass


def test_of_many_drivers_at_once_one_wins(place):
    entered, refused = [], []
    start = threading.Barrier(6)

    def drive() -> None:
        start.wait()
        try:
            with hold_lease(place):
                entered.append(1)
                deadline = time.monotonic() + 30
                while len(refused) < 5 and time.monotonic() < deadline:
                    time.sleep(0.02)
        except RunLockedError:
            refused.append(1)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 5)


def _die_holding(place: Location) -> None:
    with hold_lease(place):
        os._exit(9)


def test_a_dead_process_of_this_machine_is_taken_over_at_once(place):
    process = multiprocessing.get_context("spawn").Process(target=_die_holding, args=(place,))
    process.start()
    process.join()
    dead = read_holder(place)
    assert dead.pid == process.pid
    assert is_alive(dead) is False
    started = time.monotonic()
    with hold_lease(place):
        assert read_holder(place).pid == os.getpid()
    assert time.monotonic() - started < 10 < lease_module.STALE_S


def test_another_process_with_the_same_number_is_not_the_holder(place, quick):
    store(place, replace(lease_module._this_process(), process_started=1.0))
    with hold_lease(place):
        pass


def test_a_silent_holder_elsewhere_is_watched_and_then_taken_over(place, quick):
    store(place, elsewhere())
    told = []
    with hold_lease(place, told.append):
        assert read_holder(place).pid == os.getpid()
    assert "watching for" in told[0]
    assert "other-machine" in told[0]


def test_a_living_holder_elsewhere_is_left_alone(place, quick):
    store(place, elsewhere())
    stop = threading.Event()

    def renew() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            store(place, elsewhere(renewals=count))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="other-machine"), hold_lease(place):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_lease_that_was_cut_short_is_waited_for(place, quick):
    create_bytes(place, b'{"tok')
    with hold_lease(place):
        pass


def test_a_driver_that_lost_its_lease_learns_of_it_and_does_not_remove_the_new_one(place, quick):
    with hold_lease(place) as lease:
        lease.check()
        store(place, elsewhere())
        deadline = time.monotonic() + 5
        with pytest.raises(LeaseLostError, match="another driver took this run over: process .* on other-machine"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.02)
    assert read_holder(place).token == "theirs"  # noqa: S105


def test_a_lease_is_renewed(place, quick):
    with hold_lease(place):
        deadline = time.monotonic() + 5
        while read_holder(place).renewals < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_holder(place).renewals >= 3


def test_a_store_that_fails_while_renewing_is_said_and_survived(place, quick, monkeypatch, caplog):
    with hold_lease(place) as lease:
        honest = lease_module.write_bytes
        monkeypatch.setattr(lease_module, "write_bytes", lambda *_: (_ for _ in ()).throw(StoreError("down")))
        time.sleep(0.3)
        lease.check()
        monkeypatch.setattr(lease_module, "write_bytes", honest)
    assert "lease_renewed=false reason=down" in caplog.text


def test_a_takeover_that_another_driver_overtook_does_not_hold(place, quick, monkeypatch):
    """Two drivers see the same dead lease; the slower removes the faster one's new lease. The faster must notice."""
    store(place, replace(lease_module._this_process(), process_started=1.0))
    slower = replace(lease_module._this_process(), token="slower")
    monkeypatch.setattr(lease_module.time, "sleep", lambda _: store(place, slower))
    with pytest.raises(RunLockedError, match="this run is being worked on by"), hold_lease(place):
        pass
    assert read_holder(place) == slower


def test_a_machine_of_the_same_name_is_another_machine(place, quick):
    mine = lease_module._this_process()
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        pytest.skip("no /proc here")
    assert boot.read_text().strip() in mine.host
    clone = replace(mine, host=mine.host.replace(boot.read_text().strip(), "another-start"), process_started=1.0)
    assert is_alive(clone) is None
