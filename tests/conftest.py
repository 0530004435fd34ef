"""What tests share: the data beside the checkout where it is there, one Ray for the whole session, sorted tables."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from segpipe.lake import read_table

DATA = Path(os.environ.get("SEGPIPE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def coco_free() -> Path:
    """The 125 photographs of COCO under free licences, or those that packages ship where that folder is absent."""
    return _data("coco_free")


def _data(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set SEGPIPE_TEST_DATA to the folder that holds {name}/")
    return folder


@pytest.fixture(scope="session")
def odd_images() -> Path:
    return _data("odd_images")


@pytest.fixture(scope="session")
def rle_eval() -> Path:
    return _data("rle_eval")


@pytest.fixture(scope="session")
def exif_orientation() -> Path:
    return _data("exif_orientation")


@pytest.fixture(scope="session")
def package_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from segpipe.quicklook import copy_demo_photos

    folder = tmp_path_factory.mktemp("photos")
    copy_demo_photos(folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests: starting one takes 10 to 30 s."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 << 20,
    )
    yield
    ray.shutdown()


def sorted_tables(lake: object, run_id: str | None = None) -> tuple[pa.Table, pa.Table]:
    """Return both tables of a run in an order that does not depend on who wrote them when."""
    images = read_table(str(lake), "images", run_id=run_id)
    instances = read_table(str(lake), "instances", run_id=run_id)
    return (
        images.sort_by([("image_id", "ascending")]).combine_chunks(),
        instances.sort_by([("image_id", "ascending"), ("instance_id", "ascending")]).combine_chunks(),
    )


def as_bytes(table: pa.Table) -> bytes:
    """Return a table as Arrow IPC bytes, so that equal means equal to the last bit."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def assert_same_rows(lake: object, other: object) -> None:
    """Two lakes hold byte-identical tables after sorting."""
    for mine, theirs in zip(sorted_tables(lake), sorted_tables(other), strict=True):
        assert mine.num_rows == theirs.num_rows
        assert as_bytes(mine) == as_bytes(theirs)
