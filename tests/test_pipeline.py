"""The whole job under the inline engine: resume, limits, replaced inputs, neighbours in one lake."""

import json
import os
import threading
import uuid
from pathlib import Path

import duckdb
import pytest
from pycocotools import mask as coco_mask

from segpipe.errors import InputError, LeaseLostError, OutputError, RunLockedError
from segpipe.lake import choose_run, read_table
from segpipe.layout import RunLayout
from segpipe.overview import plan, status
from segpipe.pipeline import run
from segpipe.progress import Progress
from segpipe.records import Location
from segpipe.runs import list_runs, read_run
from segpipe.storage import locate
from segpipe.validation import validate
from tests.conftest import assert_same_rows, sorted_tables
from tests.factory import cells, config, encode, photo, photo_members, write_parquet, write_photos, write_tar


def ids(lake) -> list[str]:
    return sorted_tables(lake)[0]["image_id"].to_pylist()


def assert_valid(lake) -> None:
    for found in validate(str(lake)):
        assert found.is_valid, found


def files(lake: Path) -> dict[str, int]:
    """Return every committed file and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in Path(lake).rglob("*.g*.parquet")}


# ---------------------------------------------------------------- what comes out
def test_a_folder_becomes_rows_that_other_tools_read(tmp_path):
    """DuckDB reads the tables as they lie; pycocotools decodes each mask; areas are the masks'."""
    write_photos(tmp_path / "in", range(10))
    (tmp_path / "in" / "empty.png").write_bytes(encode(cells([None] * 4)))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    lake = tmp_path / "lake"
    summary = run(config(tmp_path / "in", lake, output__max_failed_share=0.5))
    assert (summary.state, summary.exit_code) == ("done", 0)
    assert (summary.totals.images, summary.totals.failed) == (12, 1)
    images = duckdb.sql(f"SELECT * FROM '{lake}/images/*/*.parquet'")
    assert len(images.fetchall()) == 12
    by_status = duckdb.sql("SELECT status, count(*) FROM images GROUP BY ALL ORDER BY 1").fetchall()
    assert by_status == [("failed", 1), ("ok", 11)]
    joined = duckdb.sql(
        f"SELECT i.num_instances, count(x.instance_id) FROM images i "
        f"LEFT JOIN '{lake}/instances/*/*.parquet' x USING (image_id) GROUP BY i.image_id, 1"
    ).fetchall()
    assert all(said == counted for said, counted in joined)
    assert duckdb.sql(f"SELECT DISTINCT run_id FROM '{lake}/instances/*/*.parquet'").fetchall() == [(summary.run_id,)]
    instances = duckdb.sql(f"SELECT * FROM '{lake}/instances/*/*.parquet'").to_arrow_table().to_pylist()
    assert len(instances) == summary.totals.instances > 20
    for row in instances:
        mask = coco_mask.decode({"size": [row["height"], row["width"]], "counts": row["rle_counts"]})
        assert int(mask.sum()) == row["area"] > 0
    categories = duckdb.sql(f"SELECT category_id, category FROM '{lake}/categories/*/*.parquet' ORDER BY 1").fetchall()
    assert categories == [(1, "red"), (2, "green"), (3, "blue")]
    assert_valid(lake)


def test_images_without_instances_and_with_three_hundred_are_counted_and_kept(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "none.png").write_bytes(encode(cells([None] * 9)))
    (tmp_path / "in" / "many.png").write_bytes(encode(cells(["red"] * 300, columns=20)))
    (tmp_path / "in" / "bad.png").write_bytes(b"x")
    run(config(tmp_path / "in", tmp_path / "lake", model__max_instances=300, output__max_failed_share=0.4))
    images, instances = sorted_tables(tmp_path / "lake")
    assert dict(zip(images["image_id"].to_pylist(), images["num_instances"].to_pylist(), strict=True)) == {
        "bad.png": 0,
        "many.png": 300,
        "none.png": 0,
    }
    assert instances["instance_id"].to_pylist() == list(range(300))
    assert_valid(tmp_path / "lake")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet", "manifest", "memory"])
def test_every_kind_of_input_gives_the_same_instances(tmp_path, kind):
    """Names differ, instances do not."""
    write_photos(tmp_path / "in", range(11))
    run(config(tmp_path / "in", tmp_path / "folder"))
    if kind == "manifest":
        source = tmp_path / "list.txt"
        source.write_text("".join(f"in/photo_{n:03d}.png\n" for n in range(11)))
    elif kind == "parquet":
        names = [f"photo_{n:03d}.png" for n in range(11)]
        columns = {"file_name": names, "image": [photo(n) for n in range(11)]}
        source = write_parquet(tmp_path / "s.parquet", columns, row_group_size=3)
    elif kind == "memory":
        from segpipe.storage import write_bytes

        source = f"memory://{uuid.uuid4().hex}/in"
        for n in range(11):
            write_bytes(Location(f"{source}/photo_{n:03d}.png"), photo(n))
    else:
        source = write_tar(tmp_path / f"s.{kind}", photo_members(range(11)), "w:gz" if kind.endswith("gz") else "w")
    summary = run(config(source, tmp_path / "lake"))
    assert summary.totals.images == 11
    columns = ["instance_id", "category", "score", "bbox_x", "area", "rle_counts"]
    for mine, theirs in zip(sorted_tables(tmp_path / "lake"), sorted_tables(tmp_path / "folder"), strict=True):
        shared = [name for name in columns if name in mine.column_names] or ["sha256", "num_instances"]
        assert mine.select(shared).equals(theirs.select(shared))
    assert_valid(tmp_path / "lake")


def test_all_odd_images_end_as_rows_in_one_run(tmp_path, odd_images, exif_orientation):
    lines = [str(file) for folder in (odd_images, exif_orientation) for file in sorted(folder.iterdir())]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    summary = run(config(tmp_path / "list.txt", tmp_path / "lake", input__chunk_images=32))
    assert (summary.state, summary.totals.images) == ("done", len(lines))
    assert 10 < summary.totals.failed < 30
    assert_valid(tmp_path / "lake")


# ---------------------------------------------------------------- resume
def test_the_same_command_again_does_nothing(tmp_path):
    write_photos(tmp_path / "in", range(10))
    run(config(tmp_path / "in", tmp_path / "lake"))
    before = files(tmp_path / "lake")
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    assert (summary.skipped, summary.committed.images, summary.state) == (10, 0, "done")
    assert files(tmp_path / "lake") == before


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_an_interrupted_run_is_resumed_without_doing_anything_twice(tmp_path, kind):
    write_photos(tmp_path / "in", range(21))
    source = tmp_path / "in" if kind == "folder" else write_tar(tmp_path / "s.tar", photo_members(range(21)))

    def stop(progress: Progress) -> None:
        if progress.committed.chunks == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(source, tmp_path / "lake"), on_progress=stop)
    layout = RunLayout(locate(str(tmp_path / "lake")), choose_run(locate(str(tmp_path / "lake")), None))
    assert read_run(layout).state == "unfinished"
    assert status(str(tmp_path / "lake"))[0].holder is None
    before = files(tmp_path / "lake")
    assert len(before) == 2
    summary = run(config(source, tmp_path / "lake", input__chunk_images=7))
    assert (summary.skipped, summary.committed.images, summary.state) == (8, 13, "done")
    assert before.items() <= files(tmp_path / "lake").items()
    run(config(source, tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")


def test_new_photographs_and_new_shards_are_picked_up_by_the_same_run(tmp_path):
    write_photos(tmp_path / "in", [1, 3, 5])
    run(config(tmp_path / "in", tmp_path / "lake"))
    write_photos(tmp_path / "in", [0, 2, 4])
    summary = run(config(tmp_path / "in", tmp_path / "lake", input__chunk_images=2))
    assert (summary.skipped, summary.committed.images) == (3, 3)
    assert len(ids(tmp_path / "lake")) == 6
    write_tar(tmp_path / "tars" / "a.tar", photo_members(range(5)))
    run(config(tmp_path / "tars", tmp_path / "lake2"))
    write_tar(tmp_path / "tars" / "b.tar", photo_members(range(3)))
    summary = run(config(tmp_path / "tars", tmp_path / "lake2"))
    assert (summary.skipped, summary.committed.images, summary.state) == (5, 3, "done")
    assert_valid(tmp_path / "lake")
    assert_valid(tmp_path / "lake2")


def test_a_photograph_that_was_deleted_keeps_its_row(tmp_path):
    write_photos(tmp_path / "in", range(4))
    run(config(tmp_path / "in", tmp_path / "lake"))
    (tmp_path / "in" / "photo_001.png").unlink()
    assert run(config(tmp_path / "in", tmp_path / "lake")).state == "done"
    assert len(ids(tmp_path / "lake")) == 4


def test_a_shard_that_is_gone_before_it_was_read_leaves_the_run_unfinished(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", photo_members(range(10)))
    run(config(tmp_path / "in", tmp_path / "lake"), limit=14)
    (tmp_path / "in" / "b.tar").unlink()
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    assert (summary.state, summary.lost_shards, summary.exit_code) == ("unfinished", ("b.tar",), 1)


# ---------------------------------------------------------------- limits
def test_a_limit_is_exact_for_a_new_folder_and_the_command_without_it_finishes(tmp_path):
    write_photos(tmp_path / "in", range(11))
    summary = run(config(tmp_path / "in", tmp_path / "lake"), limit=6)
    assert (summary.totals.images, summary.state, summary.exit_code, summary.limited) == (6, "unfinished", 0, True)
    assert run(config(tmp_path / "in", tmp_path / "lake"), limit=6).committed.images == 0
    assert run(config(tmp_path / "in", tmp_path / "lake")).totals.images == 11
    run(config(tmp_path / "in", tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")


@pytest.mark.parametrize(("limit", "expected"), [(1, 4), (4, 4), (5, 8), (10, 10), (11, 14), (17, 18), (31, 30)])
def test_a_limit_on_shards_takes_whole_chunks_from_the_first_on(tmp_path, limit, expected):
    for name in ("a", "b", "c"):
        write_tar(tmp_path / "in" / f"{name}.tar", photo_members(range(10)))
    summary = run(config(tmp_path / "in", tmp_path / "lake"), limit=limit)
    assert summary.totals.images == expected
    assert summary.exit_code == 0
    assert run(config(tmp_path / "in", tmp_path / "lake"), limit=limit).committed.images == 0
    assert run(config(tmp_path / "in", tmp_path / "lake")).totals.images == 30
    assert_valid(tmp_path / "lake")


def test_a_limit_beyond_the_input_is_the_whole_input(tmp_path):
    write_photos(tmp_path / "in", range(3))
    assert run(config(tmp_path / "in", tmp_path / "lake"), limit=99).state == "done"


# ---------------------------------------------------------------- replaced inputs
def test_a_replaced_photograph_is_refused_with_both_versions_and_refresh_redoes_its_chunk(tmp_path):
    folder = write_photos(tmp_path / "in", range(8))
    run(config(folder, tmp_path / "lake"))
    before = files(tmp_path / "lake")
    (folder / "photo_005.png").write_bytes(photo(99))
    with pytest.raises(
        OutputError, match=r"photo_005.png was \d+ bytes, modified .*, is \d+ bytes, modified .*--refresh"
    ):
        run(config(folder, tmp_path / "lake"))
    assert plan(config(folder, tmp_path / "lake")).replaced[0].startswith("photo_005.png was")
    summary = run(config(folder, tmp_path / "lake"), refresh=True)
    assert (summary.skipped, summary.committed.images, summary.state) == (4, 4, "done")
    after = files(tmp_path / "lake")
    assert {Path(file).name.split(".")[1] for file in after} == {"g1", "g2"}
    assert len(before.keys() & after.keys()) == 1
    assert run(config(folder, tmp_path / "lake")).committed.images == 0
    run(config(folder, tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")
    assert_valid(tmp_path / "lake")


def test_a_photograph_that_was_replaced_before_it_was_read_is_read_as_it_is_now(tmp_path):
    folder = write_photos(tmp_path / "in", range(8))
    run(config(folder, tmp_path / "lake"), limit=4)

    def stop(progress: Progress) -> None:
        if progress.phase.startswith("loading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(folder, tmp_path / "lake"), on_progress=stop)
    (folder / "photo_006.png").write_bytes(photo(99))
    assert run(config(folder, tmp_path / "lake")).state == "done"
    assert run(config(folder, tmp_path / "lake")).committed.images == 0


@pytest.mark.parametrize("new_size", [3, 10, 21])
def test_a_replaced_shard_is_refused_and_refresh_redoes_exactly_it(tmp_path, new_size):
    """Shorter, as long, longer: what is left of the old shard is gone, the other shard is not touched."""
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", photo_members(range(10)))
    run(config(tmp_path / "in", tmp_path / "lake"))
    before = {file: time for file, time in files(tmp_path / "lake").items() if "/b-" in file}
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(30, 30 + new_size)))
    with pytest.raises(OutputError, match=r"a.tar was [\d,]+ bytes, modified .*, is [\d,]+ bytes"):
        run(config(tmp_path / "in", tmp_path / "lake"))
    summary = run(config(tmp_path / "in", tmp_path / "lake"), refresh=True)
    assert (summary.state, summary.totals.images) == ("done", 10 + new_size)
    assert before.items() <= files(tmp_path / "lake").items()
    assert run(config(tmp_path / "in", tmp_path / "lake")).committed.images == 0
    run(config(tmp_path / "in", tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")
    assert_valid(tmp_path / "lake")


def test_an_interrupted_refresh_is_resumed(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(10)))
    run(config(tmp_path / "in", tmp_path / "lake"))
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(30, 44)))

    def stop(progress: Progress) -> None:
        if progress.committed.chunks == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "in", tmp_path / "lake"), refresh=True, on_progress=stop)
    with pytest.raises(OutputError, match="were replaced"):
        run(config(tmp_path / "in", tmp_path / "lake"))
    assert run(config(tmp_path / "in", tmp_path / "lake"), refresh=True).skipped == 4
    run(config(tmp_path / "in", tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")
    assert_valid(tmp_path / "lake")


# ---------------------------------------------------------------- runs in one lake
def test_other_settings_make_another_run_beside_the_first(tmp_path):
    write_photos(tmp_path / "in", range(6))
    first = run(config(tmp_path / "in", tmp_path / "lake"))
    before = files(tmp_path / "lake")
    second = run(config(tmp_path / "in", tmp_path / "lake", model__score_threshold=0.9))
    assert first.run_id != second.run_id
    assert first.totals.instances > second.totals.instances
    assert before.items() <= files(tmp_path / "lake").items()
    assert list_runs(locate(str(tmp_path / "lake"))) == sorted([first.run_id, second.run_id])
    with pytest.raises(OutputError, match="has more than one run; name one of"):
        read_table(str(tmp_path / "lake"), "images")
    assert read_table(str(tmp_path / "lake"), "images", run_id=first.run_id, columns=["key"]).column_names == ["key"]
    assert_valid(tmp_path / "lake")


def test_two_ways_to_say_the_same_are_the_same_run(tmp_path):
    write_photos(tmp_path / "in", range(2))
    one = plan(config(tmp_path / "in", tmp_path / "lake", model__categories=["red", 3]))
    other = plan(config(tmp_path / "in", tmp_path / "lake", model__categories=[3, "1"], input__format="folder"))
    assert one.run_id == other.run_id
    assert one.run_id.startswith("blank-")


def test_a_run_id_that_belongs_to_other_settings_is_refused_with_the_difference(tmp_path):
    write_photos(tmp_path / "in", range(2))
    run(config(tmp_path / "in", tmp_path / "lake", output__run_id="mine"))
    with pytest.raises(
        OutputError, match=r"mine was made with other settings \(model.score_threshold is 0.05 there, 0.5"
    ):
        run(config(tmp_path / "in", tmp_path / "lake", output__run_id="mine", model__score_threshold=0.5))


def test_output_that_another_tool_wrote_is_refused(tmp_path):
    write_photos(tmp_path / "in", range(2))
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "thesis.doc").write_text("x")
    with pytest.raises(OutputError, match=r"holds files that segpipe did not write \(thesis.doc\)"):
        run(config(tmp_path / "in", tmp_path / "lake"))
    (tmp_path / "lake2" / "images").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"did not write \(images\)"):
        run(config(tmp_path / "in", tmp_path / "lake2"))


def test_output_inside_the_input_is_refused(tmp_path):
    write_photos(tmp_path / "in", range(2))
    with pytest.raises(OutputError, match="lies inside the input"):
        run(config(tmp_path / "in", tmp_path / "in" / "lake"))


def test_output_that_cannot_be_written_is_refused(tmp_path):
    write_photos(tmp_path / "in", range(2))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"output.uri: .*"):
        run(config(tmp_path / "in", tmp_path / "file" / "lake"))


def test_a_run_of_a_newer_version_is_refused_by_name(tmp_path):
    write_photos(tmp_path / "in", range(2))
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    record = tmp_path / "lake" / "runs" / summary.run_id / "run.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "schema_version": 2}))
    with pytest.raises(
        OutputError, match=r"run.json: has schema version 2, this segpipe reads up to 1; update segpipe"
    ):
        run(config(tmp_path / "in", tmp_path / "lake"))
    record.write_text("{")
    with pytest.raises(OutputError, match="run.json: is no JSON"):
        status(str(tmp_path / "lake"))
    record.write_text("[]")
    with pytest.raises(OutputError, match="was not written by segpipe"):
        status(str(tmp_path / "lake"))
    record.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(OutputError, match=r"is no run of segpipe \(\d+ fields are wrong\)"):
        status(str(tmp_path / "lake"))


def test_a_damaged_receipt_is_named_with_what_to_do(tmp_path):
    write_photos(tmp_path / "in", range(6))
    run(config(tmp_path / "in", tmp_path / "lake"))
    victim = sorted((tmp_path / "lake" / "images").rglob("*.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(OutputError, match=rf"{victim.name}: is damaged .*remove it and run the same command again"):
        run(config(tmp_path / "in", tmp_path / "lake"))
    victim.unlink()
    assert run(config(tmp_path / "in", tmp_path / "lake")).committed.images == 4
    assert_valid(tmp_path / "lake")


# ---------------------------------------------------------------- how a run ends
def test_a_run_with_too_many_failed_images_ends_as_failed_with_all_its_rows(tmp_path):
    write_photos(tmp_path / "in", range(8))
    for n in range(2):
        (tmp_path / "in" / f"bad{n}.png").write_bytes(b"x")
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    assert (summary.state, summary.exit_code, summary.totals.images) == ("failed", 1, 10)
    summary = run(config(tmp_path / "in", tmp_path / "lake", output__max_failed_share=0.2))
    assert (summary.state, summary.exit_code, summary.committed.images) == ("done", 0, 0)


def test_a_fault_leaves_its_chunk_pending_and_the_next_start_finishes(tmp_path, monkeypatch):
    import segpipe.stages.read as module
    from segpipe.errors import StoreError

    write_photos(tmp_path / "in", range(12))
    honest = module.read_bytes

    def flaky(place):
        if place.name == "photo_005.png":
            raise StoreError("the store is down")
        return honest(place)

    monkeypatch.setattr(module, "read_bytes", flaky)
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    assert (summary.state, summary.exit_code, summary.totals.images) == ("unfinished", 1, 8)
    assert [fault.message for fault in summary.faults] == ["the store is down"]
    monkeypatch.undo()
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    assert (summary.state, summary.skipped, summary.committed.images) == ("done", 8, 4)
    assert_valid(tmp_path / "lake")


def test_a_bug_escapes_and_the_run_is_left_unfinished(tmp_path, monkeypatch):
    write_photos(tmp_path / "in", range(2))

    def bug(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr("segpipe.stages.guard.commit_chunk", bug)
    with pytest.raises(KeyError, match="bug"):
        run(config(tmp_path / "in", tmp_path / "lake"))
    assert status(str(tmp_path / "lake"))[0].state == "unfinished"


def test_a_second_driver_is_refused_while_the_first_works(tmp_path):
    write_photos(tmp_path / "in", range(4))
    seen = []

    def try_too(progress: Progress) -> None:
        if progress.committed.chunks:
            with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
                run(config(tmp_path / "in", tmp_path / "lake"))
            seen.append(status(str(tmp_path / "lake"))[0])

    run(config(tmp_path / "in", tmp_path / "lake"), on_progress=try_too)
    assert (seen[0].state, f"process {os.getpid()}" in seen[0].holder) == ("running", True)


def test_a_driver_that_lost_its_lease_stops_and_writes_nothing_more(tmp_path, monkeypatch):
    from segpipe.lease import Lease

    write_photos(tmp_path / "in", range(12))

    def lost(self):
        raise LeaseLostError("taken over")

    monkeypatch.setattr(Lease, "check", lost)
    with pytest.raises(LeaseLostError):
        run(config(tmp_path / "in", tmp_path / "lake"))
    found = status(str(tmp_path / "lake"))[0]
    assert found.state == "interrupted"
    assert found.totals.images == 4


def test_progress_tells_the_phases_and_counts_up(tmp_path):
    write_photos(tmp_path / "in", range(10))
    told: list[Progress] = []
    run(config(tmp_path / "in", tmp_path / "lake"), on_progress=told.append)
    assert [progress.phase for progress in told[:3]] == [
        "listing the input", "looking for the weights", "loading blank"
    ]  # fmt: skip
    counts = [progress.committed.images for progress in told]
    assert counts == sorted(counts)
    assert (told[-1].committed.images, told[-1].expected_images, told[-1].left_s) == (10, 10, 0)


def test_progress_on_shards_is_an_estimate_until_they_are_read(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", photo_members(range(10)))
    told: list[Progress] = []
    run(config(tmp_path / "in", tmp_path / "lake"), on_progress=told.append)
    first, last = told[3], told[-1]
    assert first.is_estimate
    assert first.expected_images > 4
    assert (last.is_estimate, last.expected_images) == (False, 20)


# ---------------------------------------------------------------- plan and status
def test_a_plan_reads_no_image_and_writes_nothing(tmp_path, monkeypatch):
    write_photos(tmp_path / "in", range(10))
    (tmp_path / "in" / "notes.txt").write_text("x")
    monkeypatch.setattr("segpipe.stages.read.read_bytes", None)
    found = plan(config(tmp_path / "in", tmp_path / "lake"))
    assert (found.kind, found.num_images, found.num_pending, found.num_ignored) == ("folder", 10, 10, 1)
    assert (found.is_estimate, found.left_s, found.committed.images) == (False, None, 0)
    assert not (tmp_path / "lake").exists()
    assert plan(config(tmp_path / "in", tmp_path / "lake"), limit=3).num_pending == 3


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_plan_of_shards_reads_headers_and_footers_alone(tmp_path, monkeypatch, kind):
    from segpipe.storage import StoreStream

    images = [os.urandom(100_000) for _ in range(30)]
    if kind == "webdataset":
        write_tar(tmp_path / "in" / "a.tar", [(f"{n}.png", data) for n, data in enumerate(images)])
    else:
        write_parquet(tmp_path / "in" / "a.parquet", {"image": images}, row_group_size=5)
    read = []
    honest = StoreStream.read
    monkeypatch.setattr(StoreStream, "read", lambda self, size=-1: read.append(honest(self, size)) or read[-1])
    found = plan(config(tmp_path / "in", tmp_path / "lake", input__chunk_images="auto"))
    assert 25 <= found.num_images <= 35
    assert sum(map(len, read)) < 150_000  # of 3 MB; pyarrow takes 64 kB for a footer


def test_a_plan_of_a_half_finished_run_knows_what_is_left_and_how_long_it_takes(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(20)))
    run(config(tmp_path / "in", tmp_path / "lake"), limit=8)
    found = plan(config(tmp_path / "in", tmp_path / "lake"))
    assert (found.committed.images, found.is_estimate, found.num_shards) == (8, True, 1)
    assert 8 < found.num_images < 60
    assert found.left_s > 0
    run(config(tmp_path / "in", tmp_path / "lake"))
    found = plan(config(tmp_path / "in", tmp_path / "lake"))
    assert (found.num_images, found.num_pending, found.is_estimate) == (20, 0, False)


def test_status_of_what_is_no_lake_is_refused(tmp_path):
    with pytest.raises(OutputError, match="holds no run of segpipe; check the path"):
        status(str(tmp_path))
    write_photos(tmp_path / "in", range(2))
    summary = run(config(tmp_path / "in", tmp_path / "lake"))
    with pytest.raises(OutputError, match=f"has no run 'x'. Its runs: {summary.run_id}"):
        status(str(tmp_path / "lake"), run_id="x")


def test_an_input_of_no_image_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError):
        run(config(tmp_path / "in", tmp_path / "lake"))
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    ("num_images", "image_bytes", "expected"),
    [(6, 100_000, 4), (125, 100_000, 4), (4096, 100_000, 16), (10**6, 50_000, 1024), (10**6, 5_000_000, 13)],
)
def test_a_chunk_grows_with_the_input_and_stays_light(tmp_path, monkeypatch, num_images, image_bytes, expected):
    """1/256 of the input, 4 to 1024 images, at most 64 MB encoded."""
    from segpipe.planning import choose_chunk_images
    from segpipe.request import check_request

    write_photos(tmp_path / "in", [1])
    request = check_request(config(tmp_path / "in", tmp_path / "lake", input__chunk_images="auto"))
    listing = request.listing
    object.__setattr__(listing, "images", listing.images * num_images)
    assert choose_chunk_images(request, image_bytes) == expected


def test_a_large_plan_is_run_in_waves(tmp_path, monkeypatch):
    import segpipe.pipeline as module

    write_photos(tmp_path / "in", range(12))
    monkeypatch.setattr(module, "_WAVE", 2)
    waves = []
    honest = module._waves

    def spying(*args):
        for wave in honest(*args):
            waves.append(len(wave))
            yield wave

    monkeypatch.setattr(module, "_waves", spying)
    run(config(tmp_path / "in", tmp_path / "lake", input__chunk_images=2))
    assert waves == [2, 2, 2]


def test_names_with_quotes_newlines_and_bytes_that_are_no_unicode_survive(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["it's.png", 'say "hi".png', "a\nb.png", "semi;colon--.png", "<b>x.png", "[x]*?.png", "ü.png", "_DSC1.png"]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(photo(number))
    with open(os.path.join(os.fsencode(tmp_path / "in"), b"caf\xe9.png"), "wb") as file:
        file.write(photo(50))
    assert run(config(tmp_path / "in", tmp_path / "lake")).state == "done"
    assert ids(tmp_path / "lake") == sorted([*names, "caf\\xe9.png"])
    assert all(value == "ok" for value in sorted_tables(tmp_path / "lake")[0]["status"].to_pylist())
    assert run(config(tmp_path / "in", tmp_path / "lake")).committed.images == 0
    assert_valid(tmp_path / "lake")


def test_threads_of_the_library_are_put_back(tmp_path):
    import torch

    write_photos(tmp_path / "in", range(1))
    before = torch.get_num_threads()
    run(config(tmp_path / "in", tmp_path / "lake", model__name="demo"))
    assert torch.get_num_threads() == before
    assert threading.active_count() < 50
