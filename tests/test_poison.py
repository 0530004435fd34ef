"""Images that kill their worker: found, quarantined, and everything else is exact."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segpipe.attempts import Attempt, begin_attempt, end_attempt, note_attempt, sweep_attempts
from segpipe.errors import ConfigError, StoreError
from segpipe.lake import read_table
from segpipe.layout import RunLayout
from segpipe.pipeline import run
from segpipe.records import ChunkId, ImageFailure, Location
from segpipe.validation import validate
from tests.conftest import as_bytes, sorted_tables
from tests.factory import config, photo, write_photos, write_tar

ROOT = Path(__file__).parents[1]
LIMITS = ["--set", "resources.max_image_seconds=12", "--set", "resources.max_image_memory_gb=1"]


def poison(folder: Path, number: int, what: str) -> str:
    name = f"photo_{number:03d}.png"
    (folder / name).write_bytes(photo(number) + f"POISON:{what}".encode())
    return name


def start(source: Path, lake: Path, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "segpipe", "run", "--input", str(source), "--output", str(lake), "--model", "blank",
        "--set", "input.chunk_images=4", "--set", "resources.cpus_per_actor=1", "--set", "output.max_failed_share=1",
        *LIMITS, *extra,
    ]  # fmt: skip
    paths = [str(ROOT / "tests" / "poison"), str(ROOT)]
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip


def assert_exact_but_for(lake: Path, source: Path, tmp_path: Path, failed: dict[str, tuple[str, str]]) -> None:
    """Every image is a row; the failed ones are those, all others as in a run that never met them."""
    images, instances = sorted_tables(lake)
    rows = {row["image_id"]: row for row in images.to_pylist()}
    broken = [row for row in rows.values() if row["status"] == "failed"]
    found = {row["image_id"]: (row["error_stage"], row["error_type"]) for row in broken}
    assert found == failed
    assert all(found.is_valid for found in validate(str(lake)))
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    for path in source.iterdir():
        if path.name not in failed:
            (healthy / path.name).write_bytes(path.read_bytes())
    run(config(healthy, tmp_path / "expected"))
    expected_images, expected = sorted_tables(tmp_path / "expected")
    assert as_bytes(instances) == as_bytes(expected)
    kept = [row for name, row in rows.items() if name not in failed]
    assert kept == expected_images.to_pylist()


@pytest.mark.slow
def test_inline_each_death_narrows_it_down_and_the_run_ends(tmp_path):
    source = write_photos(tmp_path / "in", range(10))
    failed = {
        poison(source, 1, "decode:segfault"): ("decode", "Crashed"),
        poison(source, 2, "segment:exit"): ("segment", "Crashed"),
        poison(source, 9, "decode:hang"): ("decode", "TimedOut"),
    }
    codes = []
    while len(codes) < 12:
        done = start(source, tmp_path / "lake", "--engine", "inline")
        codes.append(done.returncode)
        if done.returncode == 0:
            break
    # Two deaths for each image: not watched, watched. The second one of a chunk is met while it is watched already.
    assert codes == [-11, -11, 7, 1, 1, 0], done.stderr
    assert_exact_but_for(tmp_path / "lake", source, tmp_path, failed)
    events = sorted((tmp_path / "lake" / "runs").glob("*/events/*.json"))
    stories = [json.loads(path.read_text()) for path in events]
    assert [story["count"] for story in stories] == [4, 3]
    assert stories[0]["verdicts"]["photo_001.png"]["message"] == "ended its process when tried alone: SIGSEGV"
    assert not list((tmp_path / "lake" / "runs").glob("*/attempts/*.json"))


@pytest.mark.slow
def test_memory_without_end_is_stopped_in_a_process_of_its_own(tmp_path):
    source = write_photos(tmp_path / "in", range(3))
    failed = {poison(source, 1, "segment:memory"): ("segment", "OutOfMemory")}
    codes = [start(source, tmp_path / "lake", "--engine", "inline", POISON_OOM_KILL="1").returncode for _ in range(2)]
    assert codes == [-9, -9]
    done = start(source, tmp_path / "lake", "--engine", "inline")  # now it would take all there is, if it could
    assert done.returncode == 0, done.stderr
    assert_exact_but_for(tmp_path / "lake", source, tmp_path, failed)


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_one_start_ends_with_exactly_the_poisoned_images_failed(tmp_path):
    source = write_photos(tmp_path / "in", range(8))
    failed = {
        poison(source, 1, "decode:segfault"): ("decode", "Crashed"),
        poison(source, 6, "segment:hang"): ("segment", "TimedOut"),
    }
    done = start(source, tmp_path / "lake", "--ray-address", "local")
    assert done.returncode == 0, done.stderr
    assert_exact_but_for(tmp_path / "lake", source, tmp_path, failed)


@pytest.mark.slow
def test_native_code_that_never_lets_go_is_ended_too(tmp_path, monkeypatch):
    source = write_photos(tmp_path / "in", range(1))
    poison(source, 0, "decode:stuck")
    code = (
        "import segpipe.stages.guard as guard; guard._BACKSTOP_S = 1.0; from segpipe.pipeline import run; "
        "from segpipe.config import Config; import sys; run(Config.model_validate_json(sys.argv[1]))"
    )
    chosen = config(source, tmp_path / "lake", resources__max_image_seconds=1.0)
    paths = [str(ROOT / "tests" / "poison"), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", code, chosen.model_dump_json()], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_repeated_chunk_in_a_tar_keeps_its_rows(tmp_path):
    """A note of a dead attempt makes the next one careful, and changes no row."""
    tar = write_tar(tmp_path / "in" / "a.tar", [(f"{number}.png", photo(number)) for number in range(4)])
    run(config(tar, tmp_path / "expected"))
    chosen = config(tar, tmp_path / "lake")
    run_id = run(chosen, limit=1).run_id
    layout = RunLayout(Location(str(tmp_path / "lake")), run_id)
    for path in (tmp_path / "lake" / "images").rglob("*.parquet"):
        receipt_name = path.stem
        path.unlink()
    images = read_table(str(tmp_path / "expected"), "images").to_pylist()
    chunk = ChunkId(receipt_name, "a.tar", 0, 1, chunk_version_of(tmp_path / "expected"))
    note_attempt(layout, chunk, Attempt(chunk.version, count=2, in_flight=(images[2]["image_id"],)))
    run(chosen)
    for mine, theirs in zip(sorted_tables(tmp_path / "lake"), sorted_tables(tmp_path / "expected"), strict=True):
        assert as_bytes(mine) == as_bytes(theirs)
    (event,) = (tmp_path / "lake" / "runs" / run_id / "events").iterdir()
    story = json.loads(event.read_text())
    assert (story["count"], story["suspects"], story["verdicts"]) == (3, [images[2]["image_id"]], {})


def chunk_version_of(lake: Path) -> str:
    from segpipe.lake import choose_run
    from segpipe.runs import read_receipts

    place = Location(str(lake))
    (receipt,) = read_receipts(RunLayout(place, choose_run(place, None))).values()
    return receipt.chunk.version


# ---------------------------------------------------------------- notes
@pytest.fixture
def layout(tmp_path) -> RunLayout:
    return RunLayout(Location(str(tmp_path / "lake")), "r")


CHUNK = ChunkId("c-1", "a.tar", 1, 1, "v1")


def test_a_first_attempt_is_not_watched_and_an_orderly_end_leaves_nothing(layout):
    attempt = begin_attempt(layout, CHUNK)
    assert (attempt.count, attempt.suspects) == (1, ())
    end_attempt(layout, CHUNK, attempt)
    assert begin_attempt(layout, CHUNK).count == 1


def test_what_was_in_flight_when_a_process_died_is_suspected(layout):
    begin_attempt(layout, CHUNK)
    second = begin_attempt(layout, CHUNK)
    assert (second.count, second.suspects, second.barren) == (2, (), 0)
    note_attempt(layout, CHUNK, Attempt("v1", 2, in_flight=("a", "b")))
    third = begin_attempt(layout, CHUNK)
    assert (third.count, third.suspects, third.in_flight) == (3, ("a", "b"), ())
    verdict = {"a": ImageFailure("decode", "Crashed", "x")}
    note_attempt(layout, CHUNK, Attempt("v1", 3, ("c",), ("a", "b"), verdict))
    fourth = begin_attempt(layout, CHUNK)
    assert (fourth.suspects, dict(fourth.verdicts)) == (("a", "b", "c"), verdict)


def test_a_note_about_another_version_says_nothing_and_a_torn_one_little(layout, tmp_path):
    note_attempt(layout, CHUNK, Attempt("v0", 5, ("a",)))
    assert begin_attempt(layout, CHUNK) == Attempt("v1")
    file = next((tmp_path / "lake").rglob("attempts/*.json"))
    file.write_bytes(file.read_bytes()[:10])
    assert begin_attempt(layout, CHUNK) == Attempt("v1", 2)


def test_notes_of_committed_chunks_are_swept(layout, tmp_path):
    begin_attempt(layout, CHUNK)
    sweep_attempts(layout, ["another"])
    assert list((tmp_path / "lake").rglob("attempts/*.json"))
    sweep_attempts(layout, ["c-1"])
    assert not list((tmp_path / "lake").rglob("attempts/*.json"))


def test_workers_that_die_before_any_image_leave_the_chunk_pending(tmp_path):
    source = write_photos(tmp_path / "in", range(2))
    chosen = config(source, tmp_path / "lake")
    done = run(chosen)
    layout = RunLayout(Location(str(tmp_path / "lake")), done.run_id)
    (image_file,) = (tmp_path / "lake" / "images").rglob("*.parquet")
    chunk = ChunkId(image_file.stem, ".", 0, 1, chunk_version_of(tmp_path / "lake"))
    image_file.unlink()
    note_attempt(layout, chunk, Attempt(chunk.version, 4, barren=2))
    again = run(chosen)
    assert again.state == "unfinished"
    assert "3 workers died before they had begun an image" in again.faults[0].message
    assert run(chosen).state == "done"  # a new start begins afresh


def test_limits_out_of_range_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="resources.max_image_seconds: 0 is not allowed"):
        config(tmp_path, tmp_path / "lake", resources__max_image_seconds=0)


def test_a_store_that_takes_no_note_leaves_the_chunk_pending(tmp_path, monkeypatch):
    """Also in a careful attempt, which writes a note before every step: a fault of the store ends no run."""
    source = write_photos(tmp_path / "in", range(3))
    chosen = config(source, tmp_path / "lake")
    layout = RunLayout(Location(str(tmp_path / "lake")), run(chosen).run_id)
    (image_file,) = (tmp_path / "lake" / "images").rglob("*.parquet")
    chunk = ChunkId(image_file.stem, ".", 0, 1, chunk_version_of(tmp_path / "lake"))
    image_file.unlink()
    note_attempt(layout, chunk, Attempt(chunk.version))

    def refuse(*_):
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("segpipe.stages.guard.note_attempt", refuse)
        summary = run(chosen)
    assert summary.state == "unfinished"
    assert summary.faults[0].message == "no space left"
    with monkeypatch.context() as patch:
        patch.setattr("segpipe.stages.guard.begin_attempt", refuse)
        assert run(chosen).state == "unfinished"
    assert run(chosen).state == "done"
