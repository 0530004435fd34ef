"""Benchmarks, each a command: `python jobs/benchmark.py memory`. Prints a table, then one line of JSON.

Nothing here is a test: figures depend on the machine, which is printed with them.
"""

import io
import json
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from PIL import Image
from pycocotools import mask as coco_mask

from segpipe import load_config, read_table, run
from segpipe.detections import ModelInfo
from segpipe.layout import RunLayout
from segpipe.quicklook import copy_demo_photos
from segpipe.records import ChunkId, SegmentedChunk
from segpipe.runs import versions
from segpipe.stages.commit import commit_chunk
from segpipe.storage import locate, write_bytes
from segpipe.tables import (
    IMAGES_SCHEMA,
    INSTANCES_SCHEMA,
    RunLabel,
    categories_table,
    write_table,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)

SMALL_JPEGS = 256
_MODEL = ModelInfo("generated", {1: "thing"}, "own", {1: 0}, "", "", "none")


@app.command()
def memory(
    gigabytes: Annotated[float, typer.Option(help="Size of the generated tar.")] = 2.0,
    chunk_images: Annotated[int, typer.Option(help="Images a chunk.")] = 256,
) -> None:
    """Stream a tar of small JPEGs through `blank` and print the peak memory of the process that reads it."""
    with tempfile.TemporaryDirectory() as folder:
        tar, lake = Path(folder) / "in" / "small.tar", Path(folder) / "lake"
        num_images = _write_small_jpegs(tar, int(gigabytes * 1e9))
        started = time.perf_counter()
        _segpipe(
            ["run", "--input", str(tar), "--output", str(lake), "--model", "blank", "--engine", "inline"],
            ["--set", f"input.chunk_images={chunk_images}"],
        )
        elapsed = time.perf_counter() - started
        # Kilobytes on Linux; of all children, and this process has had only one.
        peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        _report(
            "memory",
            [("tar, GB", tar.stat().st_size / 1e9), ("images", num_images), ("peak RSS, MB", peak_mb)],
            [("images/s", num_images / elapsed)],
        )


@app.command()
def startup(
    rounds: Annotated[int, typer.Option(help="How often each way is run, in turn.")] = 2,
) -> None:
    """Six photographs, the demo model: `predict`, `run --engine inline`, `run` on local Ray, each a new process."""
    seconds: dict[str, list[float]] = {"predict": [], "inline": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        copy_demo_photos(photos)
        for number in range(rounds):
            for way, taken in seconds.items():
                output = str(Path(folder) / f"{way}{number}")
                started = time.perf_counter()
                if way == "predict":
                    _segpipe(["predict", *map(str, sorted(photos.iterdir())), "--output", output])
                else:
                    _segpipe(["run", "--input", str(photos), "--output", output, "--model", "demo", "--engine", way])
                taken.append(time.perf_counter() - started)
    best = {way: min(taken) for way, taken in seconds.items()}
    _report(
        "startup",
        [(f"{way}, s", value) for way, value in best.items()],
        [("ray adds to inline, s", best["ray"] - best["inline"])],
    )


@app.command()
def tolerance(
    photos: Annotated[Path, typer.Argument(help="Folder of photographs.")],
    model: Annotated[str, typer.Option(help="Model name.")] = "demo",
) -> None:
    """Compare the rows of 2 threads with those of 1, and of batches of 4 with those of 1: scores and matched masks."""
    with tempfile.TemporaryDirectory() as folder:
        lakes = {
            name: _run_here(photos, Path(folder) / name, model, threads, batch)
            for name, threads, batch in [("base", 1, 1), ("threads", 2, 1), ("batch", 1, 4)]
        }
        for name in ("threads", "batch"):
            _report(f"tolerance of {name}", _compare(lakes["base"], lakes[name]), [])


@app.command()
def export(
    instances: Annotated[int, typer.Option(help="Instances of the generated run, 100 an image.")] = 1_000_000,
) -> None:
    """Export a generated run as COCO results, and print the peak memory of the process that exports it."""
    with tempfile.TemporaryDirectory() as folder:
        lake, file = Path(folder) / "lake", Path(folder) / "results.json"
        _write_lake(lake, instances)
        started = time.perf_counter()
        _segpipe(["export", "coco", str(lake), str(file)])
        elapsed = time.perf_counter() - started
        peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        _report(
            "export",
            [("instances", instances), ("JSON, MB", file.stat().st_size / 1e6), ("peak RSS, MB", peak_mb)],
            [("instances/s", instances / elapsed)],
        )


def _write_lake(lake: Path, num_instances: int) -> None:
    """Write a run of chunks of 100 images with 100 instances each, all with the same mask."""
    layout, label = RunLayout(locate(str(lake)), "generated"), RunLabel("generated", "0" * 64, _MODEL)
    code = coco_mask.encode(np.asfortranarray(np.tri(480, 640, dtype=np.uint8)))["counts"].decode()
    instance = {
        "category_id": 1, "category": "thing", "bbox_x": 0.1, "bbox_y": 0.2, "bbox_w": 3.3, "bbox_h": 4.4,
        "area": 1, "height": 480, "width": 640, "rle_counts": code,
    }  # fmt: skip
    image = {
        "shard": ".", "sha256": "", "byte_size": 0, "status": "ok", "num_candidates": 100, "num_instances": 100,
        "instances_capped": False, "width": 640, "height": 480,
    }  # fmt: skip
    for index in range(-(-num_instances // 10_000)):
        names = [f"{index:06d}-{number:03d}.jpg" for number in range(100)]
        rows = [
            {"image_id": name, "instance_id": rank, "score": 1 - rank / 128, **instance}
            for name in names
            for rank in range(100)
        ]
        images = [{"image_id": name, "key": name, **image} for name in names]
        chunk = SegmentedChunk(
            ChunkId(f"c{index:06d}", ".", index, 1, ""),
            pa.Table.from_pylist(images, schema=IMAGES_SCHEMA),
            pa.Table.from_pylist(rows, schema=INSTANCES_SCHEMA),
            None,
            {},
            {},
        )
        commit_chunk(chunk, layout=layout, label=label)
    write_bytes(layout.categories_file, write_table(categories_table(_MODEL), label))
    write_bytes(layout.run_file, b"{}")


def _write_small_jpegs(path: Path, size_bytes: int) -> int:
    """Write a tar of some 30 kB JPEGs, as large as asked for; return how many images it holds."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(SMALL_JPEGS):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((320, 240))
        noisy = np.asarray(coarse, np.int16) + rng.integers(-20, 20, (240, 320, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        contents.append(buffer.getvalue())
    path.parent.mkdir(parents=True)
    count = 0
    with tarfile.open(path, "w") as tar:
        while tar.offset < size_bytes:
            data = contents[count % SMALL_JPEGS]
            info = tarfile.TarInfo(f"{count:08d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            count += 1
    return count


def _segpipe(*arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "segpipe", *(word for part in arguments for word in part)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run_here(photos: Path, lake: Path, model: str, threads: int, batch: int) -> Path:
    settings = {
        "input.uri": str(photos),
        "input.chunk_images": 32,
        "output.uri": str(lake),
        "output.max_failed_share": 1.0,
        "model.name": model,
        "model.batch_size": batch,
        "resources.engine": "inline",
        "resources.cpus_per_actor": threads,
    }
    run(load_config(settings=settings))
    return lake


def _compare(base: Path, other: Path) -> list[tuple[str, float]]:
    """Match each instance of one run with the same category and the largest mask IoU in the other."""
    theirs: dict[tuple[str, int], list[dict[str, object]]] = {}
    for row in read_table(str(other), "instances").to_pylist():
        theirs.setdefault((row["image_id"], row["category_id"]), []).append(row)
    rows = read_table(str(base), "instances").to_pylist()
    matches = list(_match(rows, theirs))
    ious = np.array([iou for iou, _ in matches])
    scores = np.array([difference for _, difference in matches])
    return [
        ("instances of base", len(rows)),
        ("instances of other", sum(map(len, theirs.values()))),
        ("matched at IoU 0.5", len(matches)),
        ("identical masks", int((ious == 1).sum())),
        ("least matched IoU", float(ious.min())),
        ("mean matched IoU", float(ious.mean())),
        ("largest score difference", float(scores.max())),
    ]


def _match(
    rows: Sequence[dict[str, object]], theirs: dict[tuple[str, int], list[dict[str, object]]]
) -> Iterator[tuple[float, float]]:
    for row in rows:
        candidates = theirs.get((str(row["image_id"]), int(str(row["category_id"]))), [])
        if not candidates:
            continue
        overlaps = coco_mask.iou([_rle(row)], [_rle(other) for other in candidates], [0] * len(candidates))[0]
        # Equal codes are equal masks, also empty ones, whose IoU is 0.
        overlaps = np.where([other["rle_counts"] == row["rle_counts"] for other in candidates], 1.0, overlaps)
        differences = [abs(float(str(row["score"])) - float(str(other["score"]))) for other in candidates]
        overlap, difference = max(zip(overlaps, differences, strict=True), key=lambda pair: (pair[0], -pair[1]))
        if overlap >= 0.5:
            yield float(overlap), difference


def _rle(row: dict[str, object]) -> dict[str, object]:
    return {"size": [row["height"], row["width"]], "counts": str(row["rle_counts"]).encode()}


def _report(name: str, figures: Sequence[tuple[str, float]], derived: Sequence[tuple[str, float]]) -> None:
    print(f"\n{name}")
    for label, value in (*figures, *derived):
        print(f"  {label:<28} {value:,.0f}" if value >= 10 or value == int(value) else f"  {label:<28} {value:.4g}")
    machine = {"processor": _processor(), "cpus": _cpus(), **versions()}
    print(json.dumps({"benchmark": name, **dict(figures), **dict(derived), "machine": machine}))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpus() -> int:
    from segpipe.engines import local_cpus

    return local_cpus()


if __name__ == "__main__":
    app()
