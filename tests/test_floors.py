"""The house stands: imports only go down, and heavy libraries are imported only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segpipe

PACKAGE = Path(segpipe.__file__).parent

# From the ground up. A module may import from its own floor and below.
FLOORS = [
    {"records", "errors", "detections"},
    {"masks", "images", "config", "sections", "storage", "listing"},
    {"shards", "models", "tables", "layout", "rows", "lease", "overlay"},
    {"stages", "runs", "attempts", "keylists", "retries", "request", "planning", "lake", "validation", "progress"},
    {"engines", "pipeline"},
    {"overview", "quicklook", "coco", "doctor"},
    {"evaluation", "finetuning"},
    {"console", "cli", "__init__", "__main__"},
]
HOME_OF = {
    "ray": {"engines/ray.py"},
    "fsspec": {"storage.py"},
    "torch": {"models", "masks/portable.py", "finetuning"},
    "torchvision": {"models", "finetuning"},
    "matplotlib": {"coco/plots.py", "finetuning/plots.py"},
    "typer": {"cli"},
    "rich": {"console"},
    "numba": {"masks"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor_of(module: str) -> int:
    return next(index for index, floor in enumerate(FLOORS) if module in floor)


def imports(file: Path, *, everywhere: bool) -> set[str]:
    """Return the dotted names that a file imports, at the top or everywhere; those for type checkers left out."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_module_stands_on_a_floor():
    assert {part_of(file) for file in MODULES} == set.union(*FLOORS)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_go_down(file):
    for name in imports(file, everywhere=True):
        if name.startswith("segpipe."):
            assert floor_of(name.split(".")[1]) <= floor_of(part_of(file)), name


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_libraries_are_imported_where_they_belong(file):
    inside = str(file.relative_to(PACKAGE))
    for name in imports(file, everywhere=True):
        homes = HOME_OF.get(name.split(".")[0])
        assert homes is None or inside in homes or part_of(file) in homes, f"{inside} imports {name}"


def test_importing_segpipe_loads_neither_ray_nor_torch():
    code = (
        "import sys, segpipe; from segpipe import load_config, plan, status, validate, read_table, list_models; "
        "print(sorted({'ray', 'torch', 'torchvision', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there_and_no_others():
    assert sorted(segpipe.__all__) == segpipe.__all__
    assert {*segpipe.__all__, "__version__"} == set(dir(segpipe))
    for name in segpipe.__all__:
        public = getattr(segpipe, name)
        assert public.__doc__, name
        assert public.__module__.startswith("segpipe."), name
    with pytest.raises(AttributeError, match="module 'segpipe' has no attribute 'frobnicate'"):
        _ = segpipe.frobnicate


def test_no_module_has_more_than_300_lines_and_no_function_more_than_50():
    for file in MODULES:
        source = file.read_text()
        assert len(source.splitlines()) <= 300, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and file.parent.name != "cli":
                assert node.end_lineno - node.lineno < 50 + 12, f"{file.name}: {node.name}"
