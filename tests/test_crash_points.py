"""The crash-point table of segpipe/docs/guarantees.md: one test for each row.

At each moment: what is on disk, what readers see, and that the rerun gives the tables of an undisturbed run.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from segpipe.lake import read_table
from segpipe.overview import status
from segpipe.pipeline import run
from segpipe.validation import PROMISES, validate
from tests.conftest import assert_same_rows
from tests.crash_at import MOMENTS
from tests.factory import config, photo, photo_members, write_photos, write_tar

pytestmark = pytest.mark.slow

GUARANTEES = Path(__file__).parents[1] / "segpipe" / "docs" / "guarantees.md"


def crash(moment: str, source: Path, lake: Path, *options: str) -> None:
    command = [sys.executable, "-m", "tests.crash_at", moment, str(source), str(lake), *options]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False, timeout=120
    )
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr


def on_disk(lake: Path) -> tuple[int, int, int]:
    """Return how many images files, instances files and half-written files there are."""
    count = lambda pattern: len([file for file in lake.glob(pattern) if not file.name.startswith(".")])  # noqa: E731
    return count("images/*/*.parquet"), count("instances/*/*.parquet"), len(list(lake.rglob("*.tmp")))


def broken(lake: Path) -> set[str]:
    (found,) = validate(str(lake))
    names = {text: name for name, text in PROMISES.items()}
    return {names[text] for text, problems in found.problems.items() if problems}


def glob_counts(lake: Path) -> tuple[int, int]:
    """Count rows as any other engine would, with a plain glob."""
    return tuple(
        duckdb.sql(f"SELECT count(*) FROM '{lake}/{table}/*/*.parquet'").fetchall()[0][0]
        for table in ("images", "instances")
    )


def finish(source: Path, lake: Path, fresh: Path, **options: bool) -> int:
    """Run the same command again; return the images that it skipped, after comparing with an undisturbed run."""
    summary = run(config(source, lake, input__chunk_images=2), **options)
    assert (summary.state, on_disk(lake)[2]) == ("done", 0)
    run(config(source, fresh, input__chunk_images=2))
    assert_same_rows(lake, fresh)
    assert not broken(lake)
    assert glob_counts(lake) == glob_counts(fresh)
    return summary.skipped


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "in", range(10))


@pytest.mark.parametrize(
    ("moment", "files", "readable", "skipped"),
    [
        ("after listing", (0, 0, 0), 0, 0),
        ("before the keys are written", (0, 0, 0), 0, 0),
        ("after the keys are written", (0, 0, 0), 0, 0),
        ("during read", (3, 3, 0), 6, 6),
        ("during inference", (3, 3, 0), 6, 6),
        ("before the instances file", (2, 2, 0), 4, 4),
        ("between the two files", (2, 3, 0), 4, 4),
        ("after the images file", (3, 3, 0), 6, 6),
        ("during the finish", (5, 5, 0), 10, 10),
        ("after the finish", (5, 5, 0), 10, 10),
    ],
)
def test_killed_at_a_moment_a_folder_is_finished_by_the_same_command(
    tmp_path, folder, moment, files, readable, skipped
):
    lake = tmp_path / "lake"
    crash(moment, folder, lake)
    assert on_disk(lake) == files
    images = read_table(str(lake), "images")
    assert images.num_rows == readable
    assert read_table(str(lake), "instances").num_rows == sum(images["num_instances"].to_pylist())
    expected = {"after listing": "not started", "after the finish": "done"}.get(moment, "interrupted")
    assert status(str(lake))[0].state == expected
    if moment == "between the two files":
        assert broken(lake) == {"strays", "complete"}
    assert finish(folder, lake, tmp_path / "fresh") == skipped


def test_killed_while_a_file_is_written_no_reader_sees_it(tmp_path, folder):
    lake = tmp_path / "lake"
    crash("while a file is written", folder, lake)
    images_files, instances_files, half_written = on_disk(lake)
    assert half_written == 1
    assert images_files <= instances_files <= images_files + 1
    assert glob_counts(lake)[0] == read_table(str(lake), "images").num_rows == 2 * images_files
    assert finish(folder, lake, tmp_path / "fresh") == 2 * images_files


def test_killed_during_a_sweep_the_rest_is_swept_next_time(tmp_path, folder):
    lake = tmp_path / "lake"
    run(config(folder, lake, input__chunk_images=2), limit=4)
    (lake / "instances" / os.listdir(lake / "instances")[0] / "a.g1.parquet").write_bytes(b"x")
    crash("during a sweep", folder, lake)
    assert on_disk(lake) == (2, 2, 0)
    assert finish(folder, lake, tmp_path / "fresh") == 4


def test_killed_between_the_receipt_and_the_removal_of_the_old_generation(tmp_path, folder):
    lake = tmp_path / "lake"
    run(config(folder, lake, input__chunk_images=2))
    (folder / "photo_003.png").write_bytes(photo(77))
    crash("before the old generation is removed", folder, lake, "refresh")
    assert on_disk(lake) == (5, 6, 0)
    assert broken(lake) == {"strays", "complete"}
    images = read_table(str(lake), "images")
    assert read_table(str(lake), "instances").num_rows == sum(images["num_instances"].to_pylist())
    assert finish(folder, lake, tmp_path / "fresh") == 10


def test_killed_between_the_two_files_of_a_new_generation_the_old_one_stands(tmp_path, folder):
    lake = tmp_path / "lake"
    run(config(folder, lake, input__chunk_images=2))
    before = read_table(str(lake), "instances")
    for number in (5, 7, 9):
        (folder / f"photo_{number:03d}.png").write_bytes(photo(number + 70))
    crash("between the two files", folder, lake, "refresh")
    assert read_table(str(lake), "instances").num_rows == sum(
        read_table(str(lake), "images")["num_instances"].to_pylist()
    )
    last = [row for row in before.to_pylist() if row["image_id"] in ("photo_008.png", "photo_009.png")]
    now = read_table(str(lake), "instances").to_pylist()
    assert [row for row in now if row["image_id"] in ("photo_008.png", "photo_009.png")] == last
    assert on_disk(lake) == (5, 6, 0)
    assert finish(folder, lake, tmp_path / "fresh") == 8


def test_killed_before_the_chunks_beyond_the_end_of_a_shorter_shard_are_removed(tmp_path):
    source = tmp_path / "in"
    write_tar(source / "a.tar", photo_members(range(10)))
    run(config(source, tmp_path / "lake", input__chunk_images=2))
    write_tar(source / "a.tar", photo_members(range(50, 54)))
    crash("before chunks beyond the end are removed", source, tmp_path / "lake", "refresh")
    assert on_disk(tmp_path / "lake") == (5, 5, 0)
    assert finish(source, tmp_path / "lake", tmp_path / "fresh") == 4


def test_of_two_drivers_at_once_the_second_is_refused_and_changes_nothing(tmp_path, folder):
    """The first works slowly; the second comes in the middle, is refused, and leaves all as it is."""
    lake = tmp_path / "lake"
    command = [
        sys.executable,
        "-m",
        "segpipe",
        "run",
        "--input",
        str(folder),
        "--output",
        str(lake),
        "--model",
        "blank",
    ]
    command += ["--engine", "inline", "--set", "resources.cpus_per_actor=1", "--set", "input.chunk_images=2"]
    slow = (
        "import time, segpipe.models.blank as b; h = b._cell_means; "
        "b._cell_means = lambda image: (time.sleep(0.4), h(image))[1]; from segpipe.cli import main; main()"
    )
    first = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while on_disk(lake)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 2
    assert f"being worked on by process {first.pid} of" in second.stderr
    assert first.wait(60) == 0
    assert finish(folder, lake, tmp_path / "fresh") == 10


def test_every_moment_has_its_row_in_the_table_and_every_row_its_moment():
    rows = re.findall(r"^\| ([^|]+?) +\|", GUARANTEES.read_text().split("## Killed at any moment")[1], re.MULTILINE)
    named = {row for row in rows if row not in ("moment", "---") and not set(row) <= set("-")}
    assert named == {*MOMENTS, "two drivers at once"}
