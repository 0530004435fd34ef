"""Validate: a sound lake passes, and each planted damage is found and named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from segpipe.errors import OutputError, RunLockedError
from segpipe.lake import read_table
from segpipe.layout import RunLayout
from segpipe.lease import hold_lease
from segpipe.pipeline import run
from segpipe.records import Location
from segpipe.validation import PROMISES, validate
from segpipe.validation.repair import repair
from tests.factory import config, photo_members, write_photos, write_tar


@pytest.fixture
def lake(tmp_path) -> Path:
    write_photos(tmp_path / "in", range(9))
    run(config(tmp_path / "in", tmp_path / "lake"))
    return tmp_path / "lake"


def broken(lake: Path) -> dict[str, tuple[str, ...]]:
    """Return the broken promises by their short names."""
    (found,) = validate(str(lake))
    names = {text: name for name, text in PROMISES.items()}
    return {names[text]: problems for text, problems in found.problems.items() if problems}


def first(lake: Path, table: str) -> Path:
    return sorted((lake / table).rglob("*.parquet"))[0]


def rewrite(file: Path, change) -> None:
    """Change the rows of a file and keep what it says of itself."""
    table = pq.ParquetFile(file).read()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), file)


def replaced(column: str, value: object):
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[0] = value
        index = table.schema.get_field_index(column)
        return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))

    return change


def test_a_sound_lake_keeps_every_promise(lake):
    (found,) = validate(str(lake))
    assert found.is_valid
    assert (found.num_images, found.state) == (9, "done")
    assert list(found.problems) == list(PROMISES.values())


def test_a_missing_instances_file_is_found(lake):
    victim = first(lake, "instances")
    victim.unlink()
    assert any(f"its instances file {victim.name} is missing" in text for text in broken(lake)["receipts"])


def test_a_missing_images_file_is_found_as_pending_and_its_instances_as_a_stray(lake):
    first(lake, "images").unlink()
    found = broken(lake)
    assert found.keys() == {"images", "strays", "complete"}
    assert "chunk 0 with 4 images, 'photo_000.png' first, is pending" in found["complete"][0]
    assert "run.json says 9 images, the receipts say 5" in found["images"][0]


@pytest.mark.parametrize("table", ["images", "instances", "categories"])
def test_a_truncated_file_is_found(lake, table):
    victim = first(lake, table)
    victim.write_bytes(victim.read_bytes()[:-50])
    assert any(victim.name in text for text in broken(lake)["files"])


def test_a_changed_instances_file_is_found(lake):
    victim = first(lake, "instances")
    rewrite(victim, lambda table: table)
    assert broken(lake).keys() == {"receipts"}
    assert "its sha256 is not the one in the receipt" in broken(lake)["receipts"][0]


def test_an_instance_that_stands_twice_or_not_at_all_is_found(lake):
    victim = first(lake, "instances")
    rewrite(victim, lambda table: pa.concat_tables([table.slice(0, 1), table]))
    found = broken(lake)
    assert any("rows for" in text for text in found["instances"])
    assert any("rows, receipt says" in text for text in found["receipts"])
    rewrite(victim, lambda table: table.slice(2))
    assert "instances" in broken(lake)


def test_an_image_that_stands_twice_is_found(lake):
    rewrite(first(lake, "images"), lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    found = broken(lake)
    assert any("stands twice in the run" in text for text in found["images"])
    assert any("receipt says" in text for text in found["receipts"])


def test_an_image_in_two_chunks_is_found(lake):
    one, other = sorted((lake / "images").rglob("*.parquet"))[:2]
    name = pq.ParquetFile(one).read()["image_id"][0].as_py()
    rewrite(other, replaced("image_id", name))
    assert any(f"{name!r} stands twice" in text for text in broken(lake)["images"])


@pytest.mark.parametrize(
    ("column", "value", "promise", "text"),
    [
        ("rle_counts", "1", "masks", "runs cover"),
        ("rle_counts", "\x01", "masks", "not a COCO run-length code"),
        ("area", 3, "masks", "area says 3"),
        ("height", 9999, "masks", "another frame"),
        ("score", 7.0, "instances", "leave 0 to 1"),
        ("instance_id", 5, "instances", "misnumbered"),
        ("category", "purple", "instances", "is not 'purple'"),
        ("image_id", "ghost.png", "instances", "'ghost.png' has instances but is no image of this chunk"),
    ],
)
def test_a_changed_instance_is_found(lake, column, value, promise, text):
    rewrite(first(lake, "instances"), replaced(column, value))
    assert any(text in problem for problem in broken(lake)[promise])


def test_scores_that_rise_are_found(lake):
    def reverse(table: pa.Table) -> pa.Table:
        most = max(table["image_id"].to_pylist(), key=table["image_id"].to_pylist().count)
        mine = pc.equal(table["image_id"], most)
        rows = table.filter(mine)
        scores = pa.chunked_array([rows["score"].to_pylist()[::-1]], pa.float32())
        rows = rows.set_column(rows.schema.get_field_index("score"), rows.schema.field("score"), scores)
        return pa.concat_tables([rows, table.filter(pc.invert(mine))])

    victim = max((lake / "instances").rglob("*.parquet"), key=lambda file: pq.read_metadata(file).num_rows)
    rewrite(victim, reverse)
    assert any("scores do not fall" in text for text in broken(lake)["instances"])


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("status", "failed", "has status 'failed', error [None, None, None]"),
        ("status", "maybe", "has status 'maybe'"),
        ("error_stage", "decode", "has status 'ok', error ['decode', None, None]"),
        ("num_candidates", 0, "instances of 0 candidates"),
        ("num_candidates", 99, "of 99 candidates, capped False"),
        ("shard", "other.tar", "is of shard 'other.tar', its chunk of '.'"),
        ("key", "other.png", "is called otherwise than its shard '.' and key 'other.png'"),
        ("sha256", "xyz", "has sha256 'xyz'"),
        ("byte_size", -1, "and -1 bytes"),
    ],
)
def test_a_changed_status_is_found(lake, column, value, text):
    rewrite(first(lake, "images"), replaced(column, value))
    assert any(text in problem for problem in broken(lake)["images"])


def test_a_file_of_another_run_is_found(lake, tmp_path):
    run(config(tmp_path / "in", tmp_path / "other", output__run_id="other"))
    victim = first(lake, "instances")
    victim.write_bytes(first(tmp_path / "other", "instances").read_bytes())
    assert any("belongs to run other" in text for text in broken(lake)["files"])


def test_a_receipt_under_another_name_is_found(lake):
    victim = first(lake, "images")
    victim.rename(victim.with_name("renamed.parquet"))
    assert any("renamed.parquet: its receipt is of chunk" in text for text in broken(lake)["receipts"])


def test_other_columns_are_found(lake):
    rewrite(first(lake, "images"), lambda table: table.drop_columns(["key"]))
    assert any("has other columns" in text for text in broken(lake)["files"])


def test_strays_are_found(lake):
    (lake / "instances" / first(lake, "instances").parent.name / "x.g1.parquet").write_bytes(b"x")
    (first(lake, "images").parent / ".y.parquet.123.tmp").write_bytes(b"x")
    (first(lake, "images").parent / "notes.txt").write_text("x")
    found = broken(lake)["strays"]
    assert any("x.g1.parquet: no receipt names it; the next start of the run removes it" in text for text in found)
    assert any("notes.txt: is no images file; remove it" in text for text in found)
    assert any(".tmp" in text for text in found)


def test_a_newer_file_and_a_file_of_another_tool_are_named(lake):
    victim = first(lake, "images")
    table = pq.ParquetFile(victim).read()
    metadata = {**table.schema.metadata, b"segpipe.schema_version": b"9"}
    pq.write_table(table.replace_schema_metadata(metadata), victim)
    assert any("schema version 9, this segpipe reads up to 1" in text for text in broken(lake)["files"])
    pq.write_table(table.replace_schema_metadata(None), victim)
    assert any("was not written by segpipe" in text for text in broken(lake)["files"])
    without = {key: value for key, value in table.schema.metadata.items() if key != b"segpipe.receipt"}
    pq.write_table(table.replace_schema_metadata(without), victim)
    assert any("it has no receipt" in text for text in broken(lake)["files"])


def test_a_run_without_its_record_is_found(lake):
    (record,) = (lake / "runs").rglob("run.json")
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "totals": {**fields["totals"], "images": 7}}))
    assert any("run.json says 7 images" in text for text in broken(lake)["images"])
    record.unlink()
    assert any("run.json: is missing" in text for text in broken(lake)["files"])


def test_an_unfinished_run_is_said_to_be_so(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(10)))
    run(config(tmp_path / "in", tmp_path / "lake"), limit=8)
    found = broken(tmp_path / "lake")
    assert found.keys() == {"complete"}
    assert any("the run is unfinished" in text for text in found["complete"])
    assert any("shard a.tar: its 2 chunks do not reach its end" in text for text in found["complete"])


def test_a_shard_with_a_hole_in_it_is_found(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(10)))
    run(config(tmp_path / "in", tmp_path / "lake"))
    sorted((tmp_path / "lake" / "images").rglob("*.parquet"))[1].unlink()
    assert any("do not reach its end" in text for text in broken(tmp_path / "lake")["complete"])


def test_what_is_no_lake_is_refused(tmp_path):
    with pytest.raises(OutputError, match="holds no run of segpipe"):
        validate(str(tmp_path))


def test_a_failed_image_with_instances_is_found(lake):
    def fail(table):
        for column, value in (
            ("status", "failed"), ("error_stage", "decode"), ("error_type", "x"), ("error_message", "y"),
        ):  # fmt: skip
            table = replaced(column, value)(table)
        return table

    rewrite(first(lake, "images"), fail)
    assert any("failed and has" in problem for problem in broken(lake)["images"])


def test_a_chunk_with_fewer_rows_than_its_keys_is_found(lake):
    def cut(table):
        return table.slice(0, table.num_rows - 1)

    victim = first(lake, "images")
    table = pq.ParquetFile(victim).read()
    metadata = dict(table.schema.metadata)
    receipt = json.loads(metadata[b"segpipe.receipt"])
    last = table.slice(table.num_rows - 1).to_pylist()[0]
    receipt["num_images"] -= 1
    receipt["num_instances"] -= last["num_instances"]
    metadata[b"segpipe.receipt"] = json.dumps(receipt).encode()
    pq.write_table(cut(table).replace_schema_metadata(metadata), victim)
    assert "chunk 0 has 3 rows for 4 images" in broken(lake)["images"]


def test_shards_whose_chunks_do_not_add_up_are_found(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(9)))
    run(config(tmp_path / "in", tmp_path / "lake"))
    victim = sorted((tmp_path / "lake" / "images").rglob("*.parquet"))[-1]
    table = pq.ParquetFile(victim).read()
    metadata = dict(table.schema.metadata)
    receipt = json.loads(metadata[b"segpipe.receipt"])
    receipt["shard_num_images"] = 10
    metadata[b"segpipe.receipt"] = json.dumps(receipt).encode()
    pq.write_table(table.replace_schema_metadata(metadata), victim)
    assert any("do not add up to its 10 images" in text for text in broken(tmp_path / "lake")["images"])


@pytest.mark.parametrize(
    ("column", "value"),
    [("score", float("nan")), ("bbox_x", float("nan")), ("bbox_w", -1.0), ("bbox_y", float("inf"))],
)
def test_numbers_that_are_none_are_found(lake, column, value):
    rewrite(first(lake, "instances"), replaced(column, value))
    assert any("scores do not fall" in text or "box is" in text for text in broken(lake)["instances"])


def test_files_made_with_other_settings_are_found(lake):
    victim = first(lake, "images")
    table = pq.ParquetFile(victim).read()
    metadata = dict(table.schema.metadata)
    label = json.loads(metadata[b"segpipe.run"])
    label["fingerprint"] = "0" * 64
    metadata[b"segpipe.run"] = json.dumps(label).encode()
    pq.write_table(table.replace_schema_metadata(metadata), victim)
    assert any("was made with other settings" in text for text in broken(lake)["files"])


def test_tables_of_no_run_are_found(lake):
    ghost = lake / "images" / "run_id=ghost"
    ghost.mkdir()
    (ghost / "x.parquet").write_bytes(first(lake, "images").read_bytes())
    found = validate(str(lake))
    assert [one.run_id for one in found if not one.is_valid] == ["ghost"]
    assert "belongs to no run" in next(iter(found[-1].problems.values()))[0]


def test_a_damaged_list_of_keys_is_found(lake):
    part = next((lake / "runs").rglob("keys/*.parquet"))
    part.write_bytes(b"PAR1")
    assert any("000000.parquet: is damaged" in text for text in broken(lake)["files"])


def test_a_folder_among_instances_is_reported_and_stops_nothing(lake, tmp_path):
    stranger = first(lake, "instances").parent / "backup"
    stranger.mkdir()
    assert any("backup: is no instances file; remove it" in text for text in broken(lake)["strays"])
    write_photos(tmp_path / "in", [50])
    assert run(config(tmp_path / "in", lake)).state == "done"


def test_repair_forgets_what_is_damaged_and_the_next_start_makes_it_anew(lake, tmp_path):
    expected = [read_table(str(lake), name) for name in ("images", "instances")]
    victim = sorted((lake / "instances").rglob("*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-9])
    (victim.parent / "stray.g1.parquet").write_bytes(b"x")
    (found,) = repair(str(lake))
    assert (len(found.requeued), found.num_swept) == (1, 2)
    assert broken(lake).keys() == {"complete"}
    assert run(config(tmp_path / "in", lake)).state == "done"
    assert not broken(lake)
    for before, name in zip(expected, ("images", "instances"), strict=True):
        assert read_table(str(lake), name).equals(before)
    assert repair(str(lake))[0].requeued == ()


def test_repair_leaves_a_run_alone_that_somebody_works_on_or_whose_notes_are_gone(lake):
    (run_file,) = (lake / "runs").glob("*/run.json")
    layout = RunLayout(Location(str(lake)), run_file.parent.name)
    with hold_lease(layout.lease_file), pytest.raises(RunLockedError, match="is being worked on"):
        repair(str(lake))
    run_file.unlink()
    with pytest.raises(OutputError, match="is missing, so nobody knows what the run was"):
        repair(str(lake))
