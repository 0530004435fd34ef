"""Disturb runs at random, let them finish, and count what is lost or twice.

    python jobs/chaos.py --schedules 100

Each schedule makes a run of its own, over a folder or tars, and disturbs one to three of its starts: the driver is
killed or asked to stop at a random moment, a worker or the raylet is killed, the disk takes no more than some
kilobytes, the clock jumps by days, a second driver starts on the same run. Then the same command runs undisturbed, and
the tables must equal those of a run that never was. Prints a line for each schedule and a line of JSON; exit code 1 if
anything was lost or twice.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import typer
from PIL import Image

from segpipe import read_table, validate

app = typer.Typer(add_completion=False, rich_markup_mode=None, help=__doc__)

_NUM_IMAGES = 60
_NAMES = [f"photo_{number:03d}.png" for number in range(_NUM_IMAGES)]
_BROKEN = {"photo_007.png", "photo_031.png"}
_RUN = "from segpipe.cli import main; main()"
_JUMPING_CLOCK = f"""
import random, time
real, start = time.time, time.time()
time.time = lambda: real() + (random.choice([-3, 3]) * 86400 if real() - start > 1 else 0)
{_RUN}
"""


@dataclass
class Schedule:
    """One run and what is done to it."""

    folder: Path
    source: Path
    engine: str
    rng: random.Random
    faults: list[str] = field(default_factory=list)

    @property
    def lake(self) -> Path:
        """Return where its tables are."""
        return self.folder / "lake"

    def start(self, *, code: str = _RUN, limit_bytes: int | None = None) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own."""
        options = {
            "input.chunk_images": 4, "resources.cpus_per_actor": 1, "output.max_failed_share": 1, "model.name": "blank",
            "resources.engine": self.engine, "resources.ray_address": "local",
        }  # fmt: skip
        arguments = ["run", "--input", str(self.source), "--output", str(self.lake)]
        settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments, *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=prepare,  # noqa: PLW1509  # this process has no threads
        )

    def pause(self) -> None:
        """Wait for a moment: any, or soon after something was committed."""
        count = len(list(self.lake.glob("images/*/*.parquet")))
        deadline = time.monotonic() + self.rng.uniform(0.5, 40 if self.engine == "ray" else 6)
        if self.rng.random() < 0.7:
            while time.monotonic() < deadline and len(list(self.lake.glob("images/*/*.parquet"))) <= count:
                time.sleep(0.005)
            time.sleep(self.rng.uniform(0, 0.3))
        else:
            time.sleep(self.rng.uniform(0, 4))


def kill_driver(schedule: Schedule) -> None:
    """SIGKILL to the driver and all that it started."""
    process = schedule.start()
    schedule.pause()
    _kill_family(process)


def stop_driver(schedule: Schedule) -> None:
    """SIGTERM or SIGINT to the driver."""
    process = schedule.start()
    schedule.pause()
    process.send_signal(schedule.rng.choice([signal.SIGTERM, signal.SIGINT]))
    _expect(process, {0, 130, -signal.SIGTERM, -signal.SIGINT})


def kill_worker(schedule: Schedule) -> None:
    """SIGKILL to one of the processes that the driver started: a worker, an actor, the raylet, the object store."""
    process = schedule.start()
    schedule.pause()
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    victims = [child for child in family if child.is_running()]
    if victims:
        schedule.rng.choice(victims).kill()
    try:
        process.wait(180)
    except subprocess.TimeoutExpired:
        _kill_family(process)


def fill_disk(schedule: Schedule) -> None:
    """Let no file grow beyond some kilobytes."""
    process = schedule.start(limit_bytes=schedule.rng.choice([1, 200, 4000, 12_000]))
    _expect(process, {0, 1, 2})


def jump_clock(schedule: Schedule) -> None:
    """Move the driver's clock by days while it works."""
    _expect(schedule.start(code=_JUMPING_CLOCK), {0})


def start_twice(schedule: Schedule) -> None:
    """Start a second driver on the same run: of two, one is refused, or comes when the other is done."""
    drivers = [schedule.start(), schedule.start()]
    codes = sorted(driver.wait(400) for driver in drivers)
    if codes not in ([0, 0], [0, 2]):
        raise RuntimeError(f"two drivers ended with {codes}")


FAULTS: dict[str, Callable[[Schedule], None]] = {
    "kill driver": kill_driver,
    "stop driver": stop_driver,
    "kill worker": kill_worker,
    "full disk": fill_disk,
    "clock": jump_clock,
    "second driver": start_twice,
}


@app.command()
def main(
    schedules: Annotated[int, typer.Option(min=1, help="How many runs are disturbed.")] = 10,
    engine: Annotated[str, typer.Option(help="inline, or ray: slower, some 2 minutes a schedule.")] = "inline",
    seed: Annotated[int, typer.Option(help="The same seed makes the same schedules.")] = 0,
) -> None:
    """Disturb, finish, compare."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [_write_folder(folder / "photos"), _write_tars(folder / "photos", folder / "tars")]
        calm = random.Random(0)  # noqa: S311  # not a secret
        expected = [_finish(Schedule(folder / "expected" / source.name, source, "inline", calm)) for source in sources]
        for number in range(schedules):
            rng = random.Random(seed * 1_000_003 + number)  # noqa: S311  # not a secret
            which = rng.randrange(2)
            schedule = Schedule(folder / str(number), sources[which], engine, rng)
            possible = [fault for fault in FAULTS if engine == "ray" or fault != "kill worker"]
            schedule.faults = rng.choices(possible, k=rng.randint(1, 3))
            started = time.monotonic()
            for fault in schedule.faults:
                FAULTS[fault](schedule)
            lost, twice, problems = _compare(_finish(schedule), expected[which], schedule)
            counts.update(
                {"schedules": 1, "lost": lost, "twice": twice, "invalid": problems, **Counter(schedule.faults)}
            )
            print(
                f"{number + 1}/{schedules} {', '.join(schedule.faults)}: {lost} lost, {twice} twice, "
                f"{'valid' if not problems else 'INVALID'}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    print(json.dumps({"engine": engine, "seed": seed, **counts}))
    raise typer.Exit(1 if counts["lost"] or counts["twice"] or counts["invalid"] else 0)


def _finish(schedule: Schedule) -> tuple[pa.Table, pa.Table]:
    _expect(schedule.start(), {0})
    images, instances = (read_table(str(schedule.lake), name) for name in ("images", "instances"))
    return (
        images.sort_by("image_id"),
        instances.sort_by([("image_id", "ascending"), ("instance_id", "ascending")]),
    )


def _compare(found: Sequence[pa.Table], expected: Sequence[pa.Table], schedule: Schedule) -> tuple[int, int, int]:
    """Return how many rows are lost, how many are twice or other than expected, and how many promises are broken."""
    lost = twice = 0
    for mine, theirs in zip(found, expected, strict=True):
        rows, wanted = (Counter(map(repr, table.to_pylist())) for table in (mine, theirs))
        lost += (wanted - rows).total()
        twice += (rows - wanted).total()
    return lost, twice, sum(not run.is_valid for run in validate(str(schedule.lake)))


def _expect(process: subprocess.Popen[bytes], codes: set[int]) -> None:
    code = process.wait(600)
    if code not in codes:
        raise RuntimeError(f"exit code {code}, expected one of {sorted(codes)}")


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        family = []
    for child in family:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait()


def _write_folder(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in _NAMES:
        pixels = rng.choice(np.array([20, 130, 240], np.uint8), (6, 8, 3)).repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(folder / name)
        if name in _BROKEN:
            (folder / name).write_bytes(b"no image")
    return folder


def _write_tars(photos: Path, folder: Path) -> Path:
    folder.mkdir()
    for part in range(3):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for name in _NAMES[part::3]:
                tar.add(photos / name, name)
    return folder


if __name__ == "__main__":
    app()
