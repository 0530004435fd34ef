"""Failed images tried again: only they, only those that are picked; killed at each step, nothing is lost or twice."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import segpipe.stages.segment as segment_module
from segpipe.errors import ConfigError, ImageRejectedError
from segpipe.lake import read_table
from segpipe.pipeline import run
from segpipe.validation import validate
from tests.conftest import assert_same_rows
from tests.factory import config, photo, photo_members, write_photos, write_tar

ROOT = Path(__file__).parents[1]
SICK = {photo(2): "TimedOut", photo(3): "Crashed", photo(7): "TimedOut"}


@pytest.fixture
def sick_decoder(monkeypatch):
    """A decoder that has a bad day with three of the photographs; it counts what it decodes."""
    decode, seen = segment_module.decode_image, []

    def decode_some(data, **options):
        seen.append(data)
        if data in SICK:
            raise ImageRejectedError(SICK[data], "a bad day")
        return decode(data, **options)

    monkeypatch.setattr(segment_module, "decode_image", decode_some)
    return seen


@pytest.fixture(params=["folder", "tar"])
def source(request, tmp_path) -> Path:
    if request.param == "folder":
        return write_photos(tmp_path / "in", range(9))
    return write_tar(tmp_path / "in" / "a.tar", photo_members(range(9))).parent


def failed(lake) -> list[str]:
    rows = read_table(str(lake), "images").to_pylist()
    return sorted(row["key"] for row in rows if row["status"] == "failed")


def generations(lake) -> list[str]:
    return sorted(path.name[-17:-8] for path in (lake / "instances").rglob("*.parquet"))


def test_failed_images_alone_are_segmented_again(source, tmp_path, sick_decoder, monkeypatch):
    chosen = config(source, tmp_path / "lake", input__chunk_images=2, output__max_failed_share=1)
    run(chosen)
    assert failed(tmp_path / "lake") == ["photo_002.png", "photo_003.png", "photo_007.png"]
    sick_decoder.clear()
    run(chosen)
    assert not sick_decoder  # nobody asked
    sick_now = {data: kind for data, kind in SICK.items() if kind == "Crashed"}
    monkeypatch.setitem(globals(), "SICK", sick_now)
    summary = run(chosen, retry_where="error_type = 'TimedOut'")
    assert sorted(sick_decoder) == sorted([photo(2), photo(7)])
    assert summary.state == "done"
    assert failed(tmp_path / "lake") == ["photo_003.png"]
    assert generations(tmp_path / "lake") == ["000000.g1", "000001.g2", "000002.g1", "000003.g2", "000004.g1"]
    monkeypatch.setitem(globals(), "SICK", {})
    run(chosen, retry_where="TRUE")
    run(config(source, tmp_path / "expected", input__chunk_images=2))
    assert_same_rows(tmp_path / "lake", tmp_path / "expected")
    assert all(found.is_valid for found in validate(str(tmp_path / "lake")))


@pytest.mark.parametrize("where", ["no_such_column = 1", "1 = 1; DROP TABLE images", "(SELECT", "1) OR (1"])
def test_what_is_no_condition_is_refused_in_one_line(tmp_path, sick_decoder, where):
    chosen = config(write_photos(tmp_path / "in", range(3)), tmp_path / "lake", output__max_failed_share=1)
    run(chosen)
    if where == "1) OR (1":  # odd, but a condition: it picks all images, of which only failed ones count
        return
    with pytest.raises(ConfigError, match="--where .* is no condition over the columns of images") as raised:
        run(chosen, retry_where=where)
    assert "\n" not in str(raised.value)


def test_a_condition_reads_no_file(tmp_path, sick_decoder):
    chosen = config(write_photos(tmp_path / "in", range(3)), tmp_path / "lake", output__max_failed_share=1)
    run(chosen)
    with pytest.raises(ConfigError, match="is no condition"):
        run(chosen, retry_where="EXISTS (SELECT * FROM read_csv('/etc/passwd'))")


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "during inference",
        "before the instances file",
        "between the two files",
        "after the images file",
        "before the old generation is removed",
        "during the finish",
    ],
)
def test_killed_at_each_step_nothing_is_lost_or_twice(tmp_path, sick_decoder, monkeypatch, moment):
    source = write_photos(tmp_path / "in", range(9))
    chosen = config(source, tmp_path / "lake", input__chunk_images=2, output__max_failed_share=1)
    run(chosen)
    module = "tests.crash_at"
    command = [sys.executable, "-m", module, moment, str(source), str(tmp_path / "lake"), "retry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (-signal.SIGKILL, 1), done.stderr
    monkeypatch.setitem(globals(), "SICK", {})
    run(chosen, retry_where="TRUE")
    run(config(source, tmp_path / "expected", input__chunk_images=2))
    assert_same_rows(tmp_path / "lake", tmp_path / "expected")
    assert all(found.is_valid for found in validate(str(tmp_path / "lake")))


def test_a_condition_without_its_option_is_refused(tmp_path):
    command = [sys.executable, "-m", "segpipe", "run", "-i", str(tmp_path), "-o", "lake", "--where", "TRUE"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2, "error: --where: says which failed images to try again; give --retry-failed with it\n"
    )  # fmt: skip
