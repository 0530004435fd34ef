"""What is documented is what there is: README commands run, SQL and Python blocks run, every verb and key is named."""

import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import yaml
from typer.main import get_command

import segpipe
from segpipe.cli import app
from segpipe.config import Config
from segpipe.tables import CATEGORIES_SCHEMA, IMAGES_SCHEMA, INSTANCES_SCHEMA

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "segpipe" / "docs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
NEEDS_DOWNLOAD = [line for line in COMMANDS if "maskrcnn_resnet50_fpn_v2" in line or "finetuned/" in line]
NEEDS_RAY = [
    line for line in COMMANDS if line.startswith("segpipe run") and "inline" not in line and line not in NEEDS_DOWNLOAD
]
# Starting Ray takes half a minute: what is the same under every engine is tried inline.
TRIED_INLINE = [line for line in NEEDS_RAY if "--retry-failed" in line]
SCRIPTS = [line for line in COMMANDS if line.startswith("infra/")]


def segpipe_command(line: str, *extra: str) -> list[str]:
    return [sys.executable, "-m", "segpipe", *shlex.split(line)[1:], *extra]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, package_photos) -> Path:
    """A folder as the README's reader has it: photographs, the configurations, and a lake of a first run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(package_photos, folder / "photos")
    shutil.copytree(ROOT / "configs", folder / "configs")
    first = "segpipe run --input photos/ --output lake/ --model demo --engine inline"
    subprocess.run(segpipe_command(first), cwd=folder, check=True, capture_output=True)
    # Annotations and another tool's results, as a reader would have them.
    segpipe.export_coco(str(folder / "lake"), folder / "instances.json", full=True)
    segpipe.export_coco(str(folder / "lake"), folder / "results.json", annotations=str(folder / "instances.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted({*COMMANDS} - {*NEEDS_DOWNLOAD, *NEEDS_RAY, *SCRIPTS}) + TRIED_INLINE)
def test_every_command_of_the_readme_runs(workplace, line):
    extra = ["--engine", "inline"] if line in TRIED_INLINE else []
    done = subprocess.run(
        segpipe_command(line, *extra), cwd=workplace, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("line", sorted({*NEEDS_RAY} - {*TRIED_INLINE}))
def test_every_command_of_the_readme_runs_on_local_ray(workplace, line):
    done = subprocess.run(
        segpipe_command(line, "--ray-address", "local"),
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in NEEDS_DOWNLOAD if line.startswith("segpipe")])
def test_commands_that_need_a_download_or_a_training_have_flags_that_exist(line):
    _, verb, *arguments = shlex.split(line)
    command = get_command(app).commands[verb]
    context = command.make_context(verb, arguments, resilient_parsing=False)
    assert context.params["model"] == "maskrcnn_resnet50_fpn_v2" or "finetuned/" in context.params["weights"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python jobs/")])
def test_every_job_of_the_readme_has_flags_that_exist(line):
    _, script, *arguments = shlex.split(line)
    module = runpy.run_path(str(ROOT / script))
    context = get_command(module["app"]).make_context(script, arguments)
    assert context.params["output"] == "finetuned/"


def test_every_script_of_the_readme_is_there_and_can_be_run():
    assert {"infra/demo", "infra/test"} <= set(SCRIPTS)
    for line in SCRIPTS:
        assert os.stat(ROOT / line.split()[0]).st_mode & stat.S_IXUSR
    assert ".venv/bin/segpipe demo" in (ROOT / "infra" / "demo").read_text()
    assert "infra/test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_of_the_readme_runs(workplace, block):
    done = subprocess.run([sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_sql_block_of_the_readme_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    statements = [part for block in blocks("sql") for part in block.split(";") if part.strip()]
    results = [duckdb.sql(statement).fetchall() for statement in statements]
    assert len(results) == 3
    assert any(category == "person" for category, *_ in results[0])
    assert len(results[2]) == 5


def test_every_file_of_the_package_stands_in_the_tree():
    tree = README.split("## The tree")[1].split("## Limits")[0]
    for file in (ROOT / "segpipe").rglob("*.py"):
        if file.name not in ("__init__.py", "__main__.py"):
            assert re.search(rf"\b{file.stem}\b", tree), file
    for name in re.findall(r"^  (\w+\.py)", tree, re.MULTILINE):
        assert (ROOT / "segpipe" / name).is_file(), name


def test_every_command_and_public_function_is_documented():
    for verb in get_command(app).commands:
        assert re.search(rf"segpipe {verb}\b", README), verb
    for name in segpipe.__all__:
        assert name in README or name.endswith("Error") or name == "Config", name


def test_every_setting_that_the_documents_name_exists():
    keys = {f"{name}.{key}" for name, section in Config.model_fields.items() for key in section.annotation.model_fields}
    for file in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for section, key in re.findall(r"\b(input|model|output|resources)\.([a-z_]+)\b", file.read_text()):
            assert f"{section}.{key}" in keys, (file.name, section, key)


def test_every_column_is_documented():
    text = (DOCS / "formats.md").read_text()
    for schema in (IMAGES_SCHEMA, INSTANCES_SCHEMA, CATEGORIES_SCHEMA):
        for name in schema.names:
            assert re.search(rf"\b{name}\b", text), name


def test_links_lead_somewhere():
    for file in [ROOT / "README.md", *DOCS.glob("*.md"), ROOT / "jobs" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert "://" in target or (file.parent / target).exists(), (file.name, target)


def test_tests_that_the_documents_name_exist():
    for file in DOCS.glob("*.md"):
        for name in re.findall(r"tests/(test_\w+\.py)", file.read_text()):
            assert (ROOT / "tests" / name).is_file(), (file.name, name)


def test_configurations_say_how_they_are_used():
    for file in (ROOT / "configs").glob("*.yaml"):
        assert file.name in ("reference.yaml", "finetune.yaml") or f"--config configs/{file.name}" in file.read_text()
        assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_constraints_name_exact_versions_and_no_host():
    lines = (ROOT / "infra" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in pins)
    pinned = {line.split("==")[0].lower() for line in pins}
    assert {"ray", "torch", "torchvision", "pyarrow", "fsspec", "s3fs", "pycocotools", "duckdb", "ruff"} <= pinned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit_mb"), [(["memory", "--gigabytes", "0.01"], 500), (["export", "--instances", "30000"], 500)]
)
def test_benchmarks_run_and_print_what_they_measured(arguments, limit_mb):
    done = subprocess.run(
        [sys.executable, "jobs/benchmark.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["benchmark"] == arguments[0]
    assert 50 < figures["peak RSS, MB"] < limit_mb
