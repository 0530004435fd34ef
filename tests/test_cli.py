"""The command line, in its own process: what a user types, reads and gets as exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segpipe.console.progress import describe, duration
from segpipe.progress import Progress
from segpipe.runs import Totals
from tests.factory import photo_members, write_photos, write_tar

pytestmark = pytest.mark.slow

BLANK = ["--model", "blank", "--engine", "inline"]


def segpipe(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "segpipe", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env={**os.environ, **environment}
    )


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "in", range(8))


def test_help_names_every_command_and_each_has_an_example():
    listed = segpipe("--help").stdout
    for name in ("run", "plan", "status", "validate", "predict", "demo", "models"):
        assert name in listed
        assert f"segpipe {name}" in segpipe(name, "--help").stdout
    assert segpipe("--version").stdout.strip() == "0.1.0"


def test_run_prints_progress_to_stderr_and_a_summary_with_paths_to_stdout(tmp_path, photos):
    done = segpipe("run", "--input", photos, "--output", tmp_path / "lake", *BLANK)
    assert done.returncode == 0
    assert "8/8 images" in done.stderr
    assert "images/s" in done.stderr
    assert "listing the input" in done.stderr.splitlines()[0]
    assert "state" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith(("images  ", "instances  ", "categories  ")) and "/" in line:
            assert Path(line.split()[-1]).is_dir()
    again = segpipe("run", "--input", photos, "--output", tmp_path / "lake", *BLANK)
    assert "skipped     8 images that earlier starts had committed" in again.stdout
    assert "nothing to do, everything is committed" in again.stdout


def test_a_relative_path_and_the_absolute_one_are_the_same_run(tmp_path, photos):
    segpipe("run", "-i", "in", "-o", "lake", *BLANK, cwd=tmp_path)
    done = segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK)
    assert "skipped     8 images" in done.stdout


def test_verbose_logs_a_line_for_every_chunk(tmp_path, photos):
    done = segpipe("-v", "run", "-i", photos, "-o", tmp_path / "lake", *BLANK)
    lines = [line for line in done.stderr.splitlines() if "chunk=" in line]
    assert len(lines) == 2
    assert "images=4 failed=0 instances=" in lines[0]


def test_a_limit_says_how_to_go_on(tmp_path, photos):
    done = segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK, "--limit", 3)
    assert done.returncode == 0
    assert "limit reached: run the same command without --limit to go on" in done.stdout
    assert "3 (3 ok, 0 failed)" in done.stdout


def test_too_many_failed_images_are_exit_code_1_with_the_reason(tmp_path, photos):
    for number in range(4):
        (photos / f"bad{number}.png").write_bytes(b"x")
    done = segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK)
    assert done.returncode == 1
    assert "failed: 4 of 12 images failed, more than output.max_failed_share allows" in done.stdout


def test_plan_status_and_validate(tmp_path, photos):
    planned = segpipe("plan", "-i", photos, "-o", tmp_path / "lake", "-m", "blank")
    assert planned.returncode == 0
    assert "8 in chunks of 4" in planned.stdout
    assert "unknown before a start" in planned.stdout
    segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK, "--limit", 4)
    assert (
        "at the speed of earlier starts" in segpipe("plan", "-i", photos, "-o", tmp_path / "lake", "-m", "blank").stdout
    )
    told = segpipe("status", tmp_path / "lake")
    assert (told.returncode, "unfinished" in told.stdout, "4/4" in told.stdout) == (0, True, True)
    checked = segpipe("validate", tmp_path / "lake")
    assert checked.returncode == 1
    assert "BROKEN  nothing is pending" in checked.stdout
    segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK)
    checked = segpipe("validate", tmp_path / "lake")
    assert checked.returncode == 0
    assert checked.stdout.count("kept") == 7


def test_plan_of_shards_says_what_is_a_guess_and_what_was_replaced(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(8)))
    planned = segpipe("plan", "-i", tmp_path / "in", "-o", tmp_path / "lake", "-m", "blank").stdout
    assert "1 shards" in planned
    assert "about" in planned
    segpipe("run", "-i", tmp_path / "in", "-o", tmp_path / "lake", *BLANK)
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(30)))
    planned = segpipe("plan", "-i", tmp_path / "in", "-o", tmp_path / "lake", "-m", "blank").stdout
    assert "replaced: a.tar was" in planned


def test_predict_draws_and_prints_without_ray(tmp_path, package_photos):
    photo = package_photos / "astronaut.png"
    (tmp_path / "bad.jpg").write_bytes(b"x")
    done = segpipe("predict", photo, tmp_path / "bad.jpg", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert re.search(r"astronaut.png: \d+ instances -> ", done.stdout)
    assert "bad.jpg: decode failed: NotAnImage" in done.stdout
    assert (tmp_path / "out" / "astronaut.overlay.png").stat().st_size > 10_000
    assert segpipe("predict", photo, "-o", tmp_path / "out", "--score", 0.99).returncode == 0


def test_models_lists_the_registry():
    listed = segpipe("models").stdout
    assert "maskrcnn_resnet50_fpn_v2" in listed
    assert "COCO_V1" in listed


@pytest.mark.ray
def test_the_demo_runs_on_local_ray_and_is_quiet(tmp_path):
    done = segpipe("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    overlays = sorted(file.name for file in (tmp_path / "demo" / "overlays").iterdir())
    assert len(overlays) == 6
    assert "astronaut.overlay.png" in done.stdout
    assert "first rows of instances:" in done.stdout
    assert "segpipe demo --model maskrcnn_resnet50_fpn_v2" in done.stdout
    noise = [line for line in done.stderr.splitlines() if not line[:1].islower() and "images" not in line]
    assert noise == []


WRONG = {
    "nothing given": (["run"], "input: is missing; give it in the file or with --input."),
    "missing path": (["run", "-i", "nope", "-o", "lake", *BLANK], "input.uri: there is nothing at "),
    "empty input": (["run", "-i", "empty", "-o", "lake", *BLANK], "holds no image, tar or Parquet file (it is empty)"),
    "unknown model": (["run", "-i", "in", "-o", "lake", "-m", "blnk"], "unknown model 'blnk'. Did you mean 'blank'?"),
    "unknown key": (
        ["run", "-i", "in", "-o", "lake", "--set", "model.nam=x"],
        "model.nam: unknown key. Did you mean 'name'?",
    ),
    "bad type": (
        ["run", "-i", "in", "-o", "lake", "--set", "model.max_instances=x"],
        "model.max_instances: 'x' is not",
    ),
    "bad engine": (["run", "-i", "in", "-o", "lake", "--engine", "spark"], "resources.engine: 'spark' is not allowed"),
    "unreadable weights": (
        ["run", "-i", "in", "-o", "lake", "-m", "demo", "-w", "junk.pth"],
        "cannot be read as weights",
    ),
    "missing weights": (["run", "-i", "in", "-o", "lake", "-m", "demo", "-w", "no.pth"], "there is no file at "),
    "unknown category": (
        ["run", "-i", "in", "-o", "lake", *BLANK, "--set", "model.categories=[rd]"],
        "model.categories: the model has no category 'rd'. Did you mean 'red'?",
    ),
    "foreign output": (
        ["run", "-i", "in", "-o", "foreign", *BLANK],
        "holds files that segpipe did not write (thesis.doc)",
    ),
    "unknown scheme": (["run", "-i", "nope://x", "-o", "lake", *BLANK], "nope://x: cannot be reached"),
    "unreachable ray": (
        ["run", "-i", "in", "-o", "lake", "-m", "blank", "--ray-address", "nonsense"],
        "resources.ray_address: no Ray cluster at nonsense",
    ),
    "no such image": (["predict", "nope.jpg"], "there is no image file at nope.jpg; for a folder use `segpipe run`"),
    "no lake": (["status", "in"], "holds no run of segpipe; check the path"),
    "no lake to validate": (["validate", "nope"], "holds no run of segpipe; check the path"),
    "missing config": (["plan", "-c", "nope.yaml"], "--config nope.yaml: no such file"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_users_mistake_is_one_line_with_the_fix_and_exit_code_2(tmp_path, photos, mistake):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("x")
    arguments, message = WRONG[mistake]
    done = segpipe(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors), done.stderr
    assert len(errors) == (2 if mistake == "nothing given" else 1)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "lake" / "images").exists()


def test_a_mistake_is_found_before_torch_or_ray_is_loaded(tmp_path, photos):
    """Nothing heavy is imported to say that a name is wrong."""
    code = (
        "import sys, segpipe.cli\n"
        "try: segpipe.cli.main()\n"
        "finally: print('loaded:', sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    for arguments in (
        ["run", "-i", "in", "-o", "lake", "-m", "blnk"],
        ["run", "-i", "nope", "-o", "lake", "-m", "demo"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == 2
        assert "loaded: []" in done.stdout


def test_typing_errors_are_exit_code_2():
    assert segpipe("frobnicate").returncode == 2
    assert segpipe("run", "--limit", "0").returncode == 2


def test_a_bug_keeps_its_traceback(tmp_path, photos):
    code = "import segpipe.pipeline as p\np.make_plan = lambda *a, **k: 1 / 0\nfrom segpipe.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "-i", str(photos), "-o", str(tmp_path / "lake"), *BLANK],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_secrets_in_store_options_reach_no_file(tmp_path, photos):
    options = ["--set", "input.storage_options={auto_mkdir: false}", "--set", "output.storage_options={key: HIDDEN123}"]
    assert segpipe("run", "-i", photos, "-o", tmp_path / "lake", *BLANK, *options).returncode == 0
    for file in (tmp_path / "lake").rglob("*"):
        assert file.is_dir() or b"HIDDEN123" not in file.read_bytes()
    assert "HIDDEN123" not in json.dumps(segpipe("status", tmp_path / "lake").stdout)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (42.4, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (-3, "0 s")]
)
def test_time_spans_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_the_progress_line_says_what_is_known():
    assert describe(Progress("loading demo")) == "loading demo"
    totals = Totals(images=100, failed=2, instances=1500, chunks=10)
    line = describe(Progress("segmenting", totals, 20, 1000, images_per_s=4.0, is_estimate=True, num_faults=1))
    assert (
        line == "120/about 1,000 images, 4 images/s, 1,500 instances, 2 failed, 1 chunks pending, about 3 min 40 s left"
    )
    assert describe(Progress("segmenting", totals)) == "100 images, 1,500 instances, 2 failed"
