"""The quick look: a few images through the model in this process, without Ray and without a lake; and the demo."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from segpipe.config import InputConfig, ModelConfig, ResourcesConfig, load_config
from segpipe.detections import UInt8Array
from segpipe.engines import local_cpus, threads_per_actor
from segpipe.errors import InputError, OutputError
from segpipe.images import decode_image
from segpipe.lake import read_table
from segpipe.models import pin_threads
from segpipe.models.weights import resolve_model
from segpipe.overlay import draw_overlay
from segpipe.pipeline import run
from segpipe.progress import OnProgress, RunSummary
from segpipe.records import ChunkId, EncodedChunk, EncodedImage, Fault
from segpipe.stages import SegmentSettings
from segpipe.stages.segment import SegmentChunk
from segpipe.storage import locate, read_bytes

# Real photographs that packages ship: package, folder, file. Licences: public domain or CC0.
DEMO_PHOTOS = (
    ("skimage", "data", "astronaut.png"),
    ("skimage", "data", "chelsea.png"),
    ("skimage", "data", "coffee.png"),
    ("skimage", "data", "motorcycle_left.png"),
    ("skimage", "data", "rocket.jpg"),
    ("matplotlib", "mpl-data/sample_data", "grace_hopper.jpg"),
)


@dataclass(frozen=True, slots=True)
class ImagePrediction:
    """What the model says about one image.

    Attributes:
        image: path or URI as given.
        row: the row that the image would have in `images`.
        instances: the rows that it would have in `instances`, by falling score, those over the threshold.
        overlay: PNG with the masks drawn; None for a failed image.
    """

    image: str
    row: Mapping[str, Any]
    instances: tuple[Mapping[str, Any], ...]
    overlay: Path | None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made.

    Attributes:
        summary: of the run.
        photos: folder of the input photographs.
        lake: folder of the tables.
        overlays: one PNG a photograph.
        instances: the first rows of `instances`.
    """

    summary: RunSummary
    photos: Path
    lake: Path
    overlays: tuple[Path, ...]
    instances: tuple[Mapping[str, Any], ...]


def predict(
    images: Sequence[str],
    *,
    model: ModelConfig | None = None,
    output: str | Path = "predictions",
    score_threshold: float = 0.5,
    on_image: Callable[[ImagePrediction], None] = lambda _: None,
) -> list[ImagePrediction]:
    """Segment a few images in this process and draw them.

    Args:
        images: paths or URIs.
        model: model and weights; the demo model if left out.
        output: folder for the overlays, made if it is not there.
        score_threshold: leave out what scores lower, in the overlays and in what is returned.
        on_image: told of every image as soon as it is done.

    Raises:
        RequestError: if an image is missing, or the model cannot be loaded.
    """
    request = resolve_model(model or ModelConfig(name="demo"))
    contents = [_read(image) for image in images]
    decoding = InputConfig(uri="-")
    threads = threads_per_actor(ResourcesConfig(), local_cpus())
    before = pin_threads(request.info.name, threads)
    try:
        segment = SegmentChunk(SegmentSettings(request, decoding.max_pixels, decoding.allow_truncated, threads))
        predictions = []
        taken: Counter[str] = Counter()
        for image, content in zip(images, contents, strict=True):
            stem = Path(locate(image).name).stem
            taken[stem] += 1  # x.jpg and x.png, a/x.jpg and b/x.jpg: each has a picture of its own
            overlay = Path(output) / (stem if taken[stem] == 1 else f"{stem}-{taken[stem]}")
            predictions.append(_predict_one(segment, image, content, overlay, score_threshold))
            on_image(predictions[-1])
        return predictions
    finally:
        pin_threads(request.info.name, before)


def demo(
    folder: str | Path = "segpipe-demo",
    *,
    model: str = "demo",
    engine: str = "ray",
    score_threshold: float = 0.5,
    on_progress: OnProgress = lambda _: None,
) -> DemoResult:
    """Run the main job on six photographs that installed packages ship, and draw what it found.

    Args:
        folder: where photographs, lake and overlays go; run again, it resumes.
        model: `demo` needs no download; others download their weights on first use.
        engine: `ray` or `inline`.
        score_threshold: draw what scores at least this.
        on_progress: see `segpipe.run`.

    Raises:
        RequestError: if the model is unknown or its weights cannot be had.
    """
    photos, lake = Path(folder) / "photos", Path(folder) / "lake"
    config = load_config(
        settings={
            "input.uri": str(photos),
            "input.chunk_images": 1,  # six photographs: a progress line for each
            "model.name": model,
            "output.uri": str(lake),
            "resources.engine": engine,
        }
    )
    copy_demo_photos(photos)
    summary = run(config, on_progress=on_progress)
    rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    table = read_table(str(lake), "instances", run_id=summary.run_id)
    for row in table.to_pylist():
        if row["score"] >= score_threshold:
            rows[row["image_id"]].append(row)
    overlays = []
    for photo in sorted(photos.iterdir()):
        pixels = decode_image(photo.read_bytes(), max_pixels=config.input.max_pixels).pixels
        overlays.append(_save(Path(folder) / "overlays" / photo.stem, pixels, rows[photo.name]))
    return DemoResult(summary, photos, lake, tuple(overlays), tuple(table.slice(0, 5).to_pylist()))


def copy_demo_photos(folder: Path) -> None:
    """Copy the demo's photographs out of the packages that ship them; those already there stay as they are.

    Raises:
        OutputError: if the folder holds anything else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = {path.name for path in folder.iterdir() if path.name[0] != "."} - {name for *_, name in DEMO_PHOTOS}
        if strangers:
            raise OutputError(
                f"{folder}: holds other files, such as {min(strangers)}; choose a new folder with --output"
            )
        for package, inner, name in DEMO_PHOTOS:
            if not (folder / name).exists():
                beside = folder / f".{name}.tmp"
                with resources.as_file(resources.files(package) / inner / name) as source:
                    shutil.copy2(source, beside)
                beside.replace(folder / name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from None


def _read(image: str) -> bytes:
    try:
        return read_bytes(locate(image))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"there is no image file at {image}; for a folder use `segpipe run`") from None


def _predict_one(
    segment: SegmentChunk, image: str, content: bytes, overlay_stem: Path, score_threshold: float
) -> ImagePrediction:
    name = locate(image).name
    chunk = EncodedChunk(ChunkId(name, ".", 0, 1, ""), (EncodedImage(name, name, None, content),))
    segmented = segment(chunk)
    if isinstance(segmented, Fault):
        raise InputError(f"{image}: {segmented.message}")
    row = segmented.images.to_pylist()[0]
    instances = [one for one in segmented.instances.to_pylist() if one["score"] >= score_threshold]
    overlay = None
    if row["status"] == "ok":
        pixels = decode_image(content, max_pixels=segment.settings.max_pixels).pixels
        overlay = _save(overlay_stem, pixels, instances)
    return ImagePrediction(image, row, tuple(instances), overlay)


def _save(stem: Path, pixels: UInt8Array, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = stem.with_name(f"{stem.name}.overlay.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_overlay(pixels, rows).save(path)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error}") from None
    return path
