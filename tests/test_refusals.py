"""What is refused or said in a row, rather than cut anew, guessed, or left out in silence."""

import json
import shutil
from pathlib import Path

import pytest

import segpipe
from segpipe.errors import ConfigError, InputError, OutputError
from segpipe.lake import read_table
from segpipe.overview import plan, status
from segpipe.pipeline import run
from segpipe.validation import validate
from tests.factory import config, photo, photo_members, write_parquet, write_photos, write_tar


def test_the_input_is_looked_at_before_weights_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("segpipe.request.resolve_model", None)
    with pytest.raises(InputError, match="there is nothing at"):
        run(config(tmp_path / "nowhere", tmp_path / "lake"))


@pytest.mark.parametrize("missing", ["record", "keys"])
def test_a_run_whose_own_notes_are_gone_is_refused_and_not_cut_anew(tmp_path, missing):
    write_photos(tmp_path / "in", range(12))
    chosen = config(tmp_path / "in", tmp_path / "lake", input__chunk_images=2)
    folder = tmp_path / "lake" / "runs" / run(chosen).run_id
    if missing == "record":
        (folder / "run.json").unlink()
    else:
        next((folder / "keys").iterdir()).unlink()
    with pytest.raises(OutputError, match="has 6 committed chunks of blank-.* so nobody knows how they were cut"):
        run(config(tmp_path / "in", tmp_path / "lake", input__chunk_images=5))


def test_a_damaged_list_of_keys_is_one_line(tmp_path):
    write_photos(tmp_path / "in", range(3))
    chosen = config(tmp_path / "in", tmp_path / "lake")
    part = next((tmp_path / "lake" / "runs" / run(chosen).run_id / "keys").iterdir())
    part.write_bytes(part.read_bytes()[:-30])
    for command in (lambda: run(chosen), lambda: status(str(tmp_path / "lake"))):
        with pytest.raises(OutputError, match="000000.parquet: is damaged .*restore it"):
            command()


def test_other_names_of_categories_are_another_run(tmp_path):
    write_photos(tmp_path / "in", range(1))
    shutil.copy(Path(segpipe.__file__).parent / "assets" / "demo_maskrcnn.safetensors", tmp_path / "own.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "own.safetensors")
    save_file(tensors, tmp_path / "own.safetensors")  # without metadata
    names = tmp_path / "own.safetensors.categories.json"
    chosen = config(
        tmp_path / "in", tmp_path / "lake", model__name="demo", model__weights=str(tmp_path / "own.safetensors")
    )
    ids = []
    for first in ("person", "human"):
        names.write_text(json.dumps({"1": first, "2": "animal", "3": "vehicle"}))
        ids.append(plan(chosen).run_id)
    assert ids[0] != ids[1]


def test_a_replaced_shard_with_holes_is_refused_then_redone_in_new_generations(tmp_path):
    tar = write_tar(tmp_path / "in" / "a.tar", photo_members(range(10)))
    chosen = config(tmp_path / "in", tmp_path / "lake", input__chunk_images=2)
    run_id = run(chosen).run_id
    images = tmp_path / "lake" / "images" / f"run_id={run_id}"
    for index in (1, 2, 4):
        next(images.glob(f"*{index:06d}.parquet")).unlink()
    write_tar(tar, photo_members(range(20, 30)))
    with pytest.raises(OutputError, match="a.tar was .*, is .*--refresh segments exactly these anew"):
        run(chosen)
    summary = run(chosen, refresh=True)
    assert (summary.state, summary.skipped, summary.totals.images) == ("done", 0, 10)
    names = [path.name for path in (tmp_path / "lake" / "instances" / f"run_id={run_id}").iterdir()]
    assert sorted(name[-17:] for name in names) == [
        "000000.g2.parquet", "000001.g1.parquet", "000002.g1.parquet", "000003.g2.parquet", "000004.g1.parquet"
    ]  # fmt: skip
    assert all(found.is_valid for found in validate(str(tmp_path / "lake")))


def test_parquet_without_the_image_column_is_refused_before_anything_is_written(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", {"image": [photo(0)], "label": [1]})
    with pytest.raises(InputError, match="has no image column 'imgae'. Columns of bytes: image; all: image, label"):
        run(config(tmp_path / "in", tmp_path / "lake", input__image_column="imgae"))
    assert not (tmp_path / "lake").exists()


def test_archives_put_together_with_cat_are_not_cut_short_in_silence(tmp_path):
    parts = [write_tar(tmp_path / name, photo_members(numbers)) for name, numbers in (("a", [1, 2]), ("b", [3]))]
    joined = tmp_path / "in" / "joined.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    summary = run(config(tmp_path / "in", tmp_path / "lake", output__max_failed_share=1))
    assert (summary.totals.images, summary.totals.failed) == (3, 1)
    (failed,) = [row for row in read_table(str(tmp_path / "lake"), "images").to_pylist() if row["status"] == "failed"]
    assert failed["key"] == "#read" or failed["image_id"].endswith("#read")
    assert "after its end there is more" in failed["error_message"]


def test_a_link_to_nowhere_is_a_failed_row(tmp_path):
    write_photos(tmp_path / "in", range(2))
    (tmp_path / "in" / "x.png").symlink_to(tmp_path / "gone.png")
    summary = run(config(tmp_path / "in", tmp_path / "lake", output__max_failed_share=1))
    assert (summary.totals.images, summary.totals.failed) == (3, 1)


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", "uri,label\nx.png,1\n,2\n"), ("a.jsonl", '{"uri": "x.png"}\n{"uri": null}\n'),
])  # fmt: skip
def test_an_entry_of_a_manifest_without_a_uri_is_refused_by_number(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="entry 2 of 2 has no image URI"):
        run(config(tmp_path / name, tmp_path / "lake"))


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    write_photos(tmp_path / "in", range(1))
    with pytest.raises(ConfigError, match="model.device: mps is not available on this machine; use auto, or one of"):
        run(config(tmp_path / "in", tmp_path / "lake", model__name="demo", model__device="mps"))
