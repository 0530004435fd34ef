"""Kill anything at any moment, run the same command again, get the same tables.

The real command in its own process, SIGKILL to it and all its children at random moments, until it is done: 24 kills
over this file, three of them under Ray. In between photographs are added and another chunk size is asked for.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from segpipe.lake import read_table
from segpipe.pipeline import run
from segpipe.validation import validate
from tests.conftest import assert_same_rows
from tests.factory import cells, config, encode, photo_members, write_tar

pytestmark = pytest.mark.slow


def start(source: Path, lake: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "segpipe", "run", "--input", str(source), "--output", str(lake), *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
        preexec_fn=hear_ctrl_c,  # noqa: PLW1509  # no threads here
    )


def hear_ctrl_c() -> None:
    """Undo what a shell does to commands in the background, to which the tests may belong: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the whole process group, and what has left it (Ray's daemons)."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.communicate()


def receipts(lake: Path) -> dict[str, int]:
    """Return the committed images files and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in lake.glob("images/*/*.parquet") if file.name[0] != "."}


def wait_for_progress(process: subprocess.Popen[str], lake: Path, before: int, patience_s: float) -> None:
    """Return when the command has committed something new, has ended, or patience is over."""
    deadline = time.monotonic() + patience_s
    while process.poll() is None and time.monotonic() < deadline and len(receipts(lake)) <= before:
        time.sleep(0.01)


def interrupt_until_done(
    source: Path, lake: Path, options: Callable[[int], list[str]], *, kills: int, rng: random.Random, spread_s: float
) -> None:
    """Start the command, kill it at a random moment, `kills` times; then let it finish; check every start's word."""
    done = 0
    for attempt in range(kills):
        before = receipts(lake)
        process = start(source, lake, *options(attempt))
        if rng.random() < 0.8:  # most kills while it works, the others at any moment from the first on
            wait_for_progress(process, lake, len(before), 120)
            time.sleep(rng.uniform(0, spread_s))
        else:
            time.sleep(rng.uniform(0, 4))
        assert process.poll() is None, f"nothing left to kill: {process.communicate()[0]}"
        kill(process)
        done += 1
        after = receipts(lake)
        assert before.items() <= after.items(), "a committed chunk was written again"
    assert done == kills
    before = receipts(lake)
    committed = read_table(str(lake), "images").num_rows
    process = start(source, lake, *options(kills))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    skipped = re.search(r"skipped\s+([\d,]+) images that earlier starts had committed", output)
    assert int(skipped[1].replace(",", "")) == committed, output
    assert before.items() <= receipts(lake).items(), "a committed chunk was written again"


def assert_equal_to_an_undisturbed_run(source: Path, lake: Path, fresh: Path, **settings: object) -> None:
    (found,) = validate(str(lake))
    assert found.is_valid, found
    run(config(source, fresh, **settings))
    assert_same_rows(lake, fresh)


def large_photo(number: int) -> bytes:
    """Return an image that takes some 30 ms to segment and encode, so that there is a moment to be killed in."""
    rng = random.Random(number)
    return encode(cells([rng.choice(["red", "green", "blue", None]) for _ in range(1600)], columns=40), "BMP")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    add_photos(tmp_path / "in", range(40))
    return tmp_path / "in"


def add_photos(folder: Path, numbers: Iterator[int] | range) -> None:
    """Add photographs as a camera would: each whole under its name at once."""
    for number in numbers:
        beside = folder / f".{number}.part"
        beside.write_bytes(large_photo(number))
        beside.rename(folder / f"photo_{number:03d}.bmp")


BLANK = [
    "--model",
    "blank",
    "--engine",
    "inline",
    "--set",
    "resources.cpus_per_actor=1",
    "--set",
    "model.max_instances=2000",
]


def test_a_folder_that_grows_is_killed_nine_times(tmp_path, folder):
    def options(attempt: int) -> list[str]:
        if attempt in (2, 5):
            add_photos(folder, range(40 + attempt * 10, 50 + attempt * 10))
        return [*BLANK, "--set", f"input.chunk_images={[2, 3, 5][attempt % 3]}"]

    interrupt_until_done(folder, tmp_path / "lake", options, kills=9, rng=random.Random(1), spread_s=0.3)
    assert_equal_to_an_undisturbed_run(folder, tmp_path / "lake", tmp_path / "fresh", model__max_instances=2000)


def test_tar_shards_are_killed_nine_times(tmp_path):
    for name in ("a", "b", "c"):
        members = [(f"{number}.bmp", large_photo(number)) for number in range(16)]
        write_tar(tmp_path / "in" / f"{name}.tar", members)

    def options(attempt: int) -> list[str]:
        return [*BLANK, "--set", f"input.chunk_images={[2, 3, 4][attempt % 3]}"]

    interrupt_until_done(tmp_path / "in", tmp_path / "lake", options, kills=9, rng=random.Random(2), spread_s=0.15)
    settings = {"model__max_instances": 2000, "input__chunk_images": 2}
    assert_equal_to_an_undisturbed_run(tmp_path / "in", tmp_path / "lake", tmp_path / "fresh", **settings)


def test_a_real_network_is_killed_three_times(tmp_path, package_photos):
    members = [
        (f"{index}-{file.name}", file.read_bytes()) for index in range(3) for file in sorted(package_photos.iterdir())
    ]
    write_tar(tmp_path / "in" / "a.tar", members)
    options = [
        "--model",
        "demo",
        "--engine",
        "inline",
        "--set",
        "resources.cpus_per_actor=2",
        "--set",
        "input.chunk_images=2",
    ]
    interrupt_until_done(
        tmp_path / "in", tmp_path / "lake", lambda _: options, kills=3, rng=random.Random(3), spread_s=0.6
    )
    settings = {"model__name": "demo", "resources__cpus_per_actor": 2, "input__chunk_images": 2}
    assert_equal_to_an_undisturbed_run(tmp_path / "in", tmp_path / "lake", tmp_path / "fresh", **settings)


@pytest.mark.ray
def test_a_run_on_ray_is_killed_three_times(tmp_path):
    members = photo_members(range(60))
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    options = ["--model", "blank", "--ray-address", "local", "--set", "resources.cpus_per_actor=1"]
    options += ["--set", "input.chunk_images=2"]
    interrupt_until_done(
        tmp_path / "in", tmp_path / "lake", lambda _: options, kills=3, rng=random.Random(4), spread_s=0.5
    )
    assert_equal_to_an_undisturbed_run(tmp_path / "in", tmp_path / "lake", tmp_path / "fresh", input__chunk_images=2)


@pytest.mark.parametrize(
    ("engine", "stop"),
    [
        ("inline", signal.SIGINT),
        ("inline", signal.SIGTERM),
        pytest.param("ray", signal.SIGINT, marks=pytest.mark.ray),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.ray),
    ],
)
def test_ctrl_c_and_a_polite_kill_stop_cleanly_and_say_how_to_resume(tmp_path, folder, engine, stop):
    options = [*BLANK, "--engine", engine, "--ray-address", "local", "--set", "input.chunk_images=1"]
    process = start(folder, tmp_path / "lake", *options)
    wait_for_progress(process, tmp_path / "lake", 0, 120)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # a terminal sends it to the whole group
    else:
        process.send_signal(stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted: what was committed stays; run the same command again to resume" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "lake" / "runs").rglob("lease.json"))
    assert '"state": "unfinished"' in next((tmp_path / "lake" / "runs").rglob("run.json")).read_text()
    assert 0 < len(receipts(tmp_path / "lake")) < 40
