"""Engines: the same rows from each, and nothing of a run kept in them."""

import os
import subprocess
import sys

import pytest

from segpipe.config import ResourcesConfig
from segpipe.engines import Pool, local_cpus, size_pool, threads_per_actor
from segpipe.errors import ConfigError
from segpipe.pipeline import run
from segpipe.progress import Progress
from segpipe.validation import validate
from tests.conftest import assert_same_rows
from tests.factory import config, photo_members, write_photos, write_tar


# ---------------------------------------------------------------- sizing
@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "device", "pool"),
    [
        ({}, 2, 0, "auto", Pool(1, 2, 0)),
        ({}, 16, 0, "auto", Pool(4, 4, 0)),
        ({"cpus_per_actor": 1}, 2, 0, "auto", Pool(2, 1, 0)),
        ({}, 64, 8, "auto", Pool(8, 4, 1)),
        ({}, 16, 8, "auto", Pool(4, 4, 1)),
        ({"gpus_per_actor": 0.5}, 64, 2, "cuda", Pool(4, 4, 0.5)),
        ({}, 16, 2, "cpu", Pool(4, 4, 0)),
        ({"num_actors": 2}, 16, 0, "auto", Pool(2, 4, 0)),
    ],
)
def test_a_pool_fills_the_cluster(resources, cpus, gpus, device, pool):
    assert size_pool(ResourcesConfig(**resources), num_cpus=cpus, num_gpus=gpus, device=device) == pool


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"num_actors": 3, "cpus_per_actor": 1},
            "3 actors with 1 CPUs and 0 GPUs each do not fit into 2 CPUs and 0 GPUs",
        ),
        ({"cpus_per_actor": 4}, "1 actors with 4 CPUs and 0 GPUs each do not fit"),
        ({"gpus_per_actor": 1.0}, "1 actors with 2 CPUs and 1 GPUs each do not fit"),
    ],
)
def test_a_pool_that_would_be_waited_for_for_ever_is_refused(resources, message):
    with pytest.raises(ConfigError, match=message):
        size_pool(ResourcesConfig(**resources), num_cpus=2, num_gpus=0, device="auto")


def test_both_engines_take_the_same_threads_on_one_machine():
    assert threads_per_actor(ResourcesConfig(), local_cpus()) == min(4, local_cpus())
    assert threads_per_actor(ResourcesConfig(cpus_per_actor=3), 64) == 3


# ---------------------------------------------------------------- ray
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_inline_one_actor_and_two_actors_give_byte_identical_tables(ray_session, tmp_path, package_photos, kind):
    """The demo model on real photographs and the same threads per actor, under each engine."""
    photos = sorted(package_photos.iterdir())
    source = package_photos
    if kind == "tar":
        source = write_tar(tmp_path / "in" / "s.tar", [(photo.name, photo.read_bytes()) for photo in photos])
        write_tar(tmp_path / "in" / "t.tar", [(photo.name, photo.read_bytes()) for photo in reversed(photos)])
        source = tmp_path / "in"
    settings = {"model__name": "demo", "input__chunk_images": 2}
    run(config(source, tmp_path / "inline", **settings))
    for actors in (1, 2):
        summary = run(
            config(source, tmp_path / f"ray{actors}", **settings, resources__engine="ray", resources__num_actors=actors)
        )
        assert (summary.state, summary.totals.images) == ("done", len(photos) * (1 if kind == "folder" else 2))
        assert_same_rows(tmp_path / "inline", tmp_path / f"ray{actors}")
        assert all(found.is_valid for found in validate(str(tmp_path / f"ray{actors}")))


@pytest.mark.ray
@pytest.mark.slow
def test_ray_resumes_what_inline_began_and_each_chunk_is_a_block_of_its_own(ray_session, tmp_path):
    write_tar(tmp_path / "in" / "a.tar", photo_members(range(30)))
    write_photos(tmp_path / "photos", range(9))
    run(config(tmp_path / "in", tmp_path / "lake"), limit=8)
    told: list[Progress] = []
    summary = run(config(tmp_path / "in", tmp_path / "lake", resources__engine="ray"), on_progress=told.append)
    assert (summary.skipped, summary.committed.images, summary.state) == (8, 22, "done")
    counts = [progress.committed.chunks for progress in told if progress.phase == "segmenting"]
    assert counts == list(range(1, 7))
    run(config(tmp_path / "in", tmp_path / "fresh"))
    assert_same_rows(tmp_path / "lake", tmp_path / "fresh")


@pytest.mark.ray
@pytest.mark.slow
def test_faults_and_failed_images_come_through_ray(ray_session, tmp_path):
    """A shard that is listed and then gone is a failed row; a file that may not be read leaves its chunk pending."""
    folder = write_photos(tmp_path / "in", range(6))
    (folder / "bad.png").write_bytes(b"x")
    (folder / "gone.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "list.txt").write_text("".join(f"in/{file.name}\n" for file in sorted(folder.iterdir())))
    summary = run(
        config(tmp_path / "list.txt", tmp_path / "lake", resources__engine="ray", output__max_failed_share=0.5)
    )
    assert (summary.state, summary.totals.images, summary.totals.failed) == ("done", 8, 2)


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_of_a_stage_comes_out_of_ray_as_itself(ray_session, tmp_path):
    """Weights that vanish after the plan: the worker's own error, not Ray's wrapping."""
    import torch

    from segpipe.errors import WeightsError
    from segpipe.models.maskrcnn import BUILDERS

    write_photos(tmp_path / "in", range(2))
    path = tmp_path / "w.pth"
    torch.save(BUILDERS["demo"](2, batch_norm=False).state_dict(), path)
    (tmp_path / "w.pth.categories.json").write_text('{"1": "thing"}')

    def vanish(progress: Progress) -> None:
        if progress.phase.startswith("loading demo"):
            path.unlink()

    settings = {"model__name": "demo", "model__weights": str(path), "resources__engine": "ray"}
    with pytest.raises(WeightsError, match="there is no file at"):
        run(config(tmp_path / "in", tmp_path / "lake", **settings), on_progress=vanish)


@pytest.mark.ray
@pytest.mark.slow
def test_what_ray_cannot_do_is_refused(ray_session, tmp_path):
    write_photos(tmp_path / "in", range(2))
    with pytest.raises(ConfigError, match=r"memory:// is seen by one process only; use --engine inline"):
        run(config(tmp_path / "in", "memory://x/lake", resources__engine="ray"))
    with pytest.raises(ConfigError, match="9 actors with 1 CPUs"):
        run(config(tmp_path / "in", tmp_path / "lake", resources__engine="ray", resources__num_actors=9))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_command_joins_the_ray_that_is_named_and_leaves_it_running(ray_session, tmp_path, way):
    import ray

    address = ray.get_runtime_context().gcs_address
    write_photos(tmp_path / "in", range(6))
    command = [
        sys.executable,
        "-m",
        "segpipe",
        "run",
        "--input",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "lake"),
    ]
    command += ["--model", "blank", "--set", "input.chunk_images=4", "--set", "resources.cpus_per_actor=1"]
    command += ["--ray-address", address] if way == "option" else []
    environment = {**os.environ, **({"RAY_ADDRESS": address} if way == "environment" else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"joining Ray at {address}" in done.stderr
    assert "starting Ray" not in done.stderr
    run(config(tmp_path / "in", tmp_path / "inline"))
    assert_same_rows(tmp_path / "lake", tmp_path / "inline")
    assert ray.cluster_resources()["CPU"] == 2
