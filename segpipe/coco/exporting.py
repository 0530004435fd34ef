"""A run as COCO results, or as a whole COCO dataset; one chunk in memory at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from segpipe.coco.annotations import Annotations, read_annotations
from segpipe.coco.matching import ImageMatcher, match_categories
from segpipe.errors import InputError, OutputError
from segpipe.lake import choose_run, iterate_chunks, read_categories
from segpipe.layout import RunLayout
from segpipe.runs import read_run
from segpipe.storage import locate

Entry = Mapping[str, Any]
_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was written.

    Attributes:
        run_id: of the run.
        file: path of the JSON file.
        mapping: path of the file that says which image has which id; None where the annotations or the file say it.
        num_images: of the run that have an id.
        num_instances: written.
        num_left_out: images of the run that the annotations do not have.
    """

    run_id: str
    file: str
    mapping: str | None
    num_images: int
    num_instances: int
    num_left_out: int


def export_coco(
    output: str, file: str | Path, *, run_id: str | None = None, annotations: str | None = None, full: bool = False
) -> ExportSummary:
    """Write a run as COCO results, which `COCO.loadRes` loads, or as a dataset.

    Args:
        output: folder of the lake, path or URI.
        file: path of the JSON file to write.
        run_id: of the run; None where there is only one.
        annotations: COCO dataset whose image and category ids are taken, by name. Without it, images are numbered
            from 1, and `<file stem>.images.json` says which is which.
        full: write a dataset (info, images, categories, annotations with scores) instead of results.

    Raises:
        InputError: if the annotations are no COCO dataset, or have nothing in common with the run.
        OutputError: if there is no such run, or it has no image, or the file cannot be written.
        StoreError: if a store does not answer.
    """
    layout = RunLayout(locate(output), choose_run(locate(output), run_id))
    source = CocoView(layout, None if annotations is None else read_annotations(locate(annotations)))
    path = Path(file)
    mapping = None if full or annotations is not None else path.with_name(f"{path.stem}.images.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stream = stack.enter_context(_replacing(path))
            names = None if mapping is None else stack.enter_context(_replacing(mapping))
            counts = _write_dataset(stream, source) if full else _write_results(stream, names, source)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None
    return ExportSummary(layout.run_id, str(path), None if mapping is None else str(mapping), *counts)


class CocoView:
    """A run in COCO's terms: its images with COCO ids, its instances as COCO results."""

    def __init__(self, layout: RunLayout, annotations: Annotations | None) -> None:
        self.layout = layout
        self.annotations = annotations
        self.categories = read_categories(layout)
        self._category_ids = (
            {index: index for index in self.categories}
            if annotations is None
            else match_categories(self.categories, annotations)
        )

    def chunks(self) -> Iterator[tuple[dict[str, int], pa.Table, pa.Table]]:
        """Yield, for each chunk, the COCO id of each image that has one, and its images and instances.

        Raises:
            InputError: if the annotations have none of the run's images.
            OutputError: if the run has no image.
        """
        matcher = None if self.annotations is None else ImageMatcher(self.annotations)
        num_images, example = 0, None
        for images, instances in iterate_chunks(self.layout):
            ids: dict[str, int] = {}
            for image_id, key in zip(images["image_id"].to_pylist(), images["key"].to_pylist(), strict=True):
                num_images, example = num_images + 1, example or image_id
                coco_id = num_images if matcher is None else matcher.find(image_id, key)
                if coco_id is not None:
                    ids[image_id] = coco_id
            yield ids, images, instances
        if not num_images:
            raise OutputError(f"{self.layout.output.uri}: run {self.layout.run_id} has no image; run it first")
        if matcher is not None and not matcher.num_found:
            raise InputError(
                f"{matcher.annotations.uri}: has none of the run's {num_images:,} images; the run's are called such as "
                f"{example!r}, its own such as {next(iter(matcher.missing()), 'nothing')!r}"
            )

    def results(
        self, ids: Mapping[str, int], instances: pa.Table, *, with_area: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yield the COCO results of one chunk, of its images with an id and its categories with an id."""
        columns = ["image_id", "category_id", "score", *_BOX, "height", "width", "area", "rle_counts"]
        for row in zip(*(instances[name].to_pylist() for name in columns), strict=True):
            image_id, category_id, score, x, y, width_px, height_px, height, width, area, counts = row
            if image_id not in ids or category_id not in self._category_ids:
                continue
            result = {
                "image_id": ids[image_id],
                "category_id": self._category_ids[category_id],
                "bbox": [_short(x), _short(y), _short(width_px), _short(height_px)],
                "score": _short(score),
            }
            if counts is not None:
                result["segmentation"] = {"size": [height, width], "counts": counts}
            if with_area:
                result["area"] = _short(width_px) * _short(height_px) if area is None else area
            yield result


def _write_results(stream: IO[str], names: IO[str] | None, source: CocoView) -> tuple[int, int, int]:
    writer, mapping = _Items(stream, "[", "]"), _Items(names, "{", "}")
    num_images = num_left_out = 0
    for ids, images, instances in source.chunks():
        num_images += len(ids)
        num_left_out += images.num_rows - len(ids)
        writer.extend(map(_dump, source.results(ids, instances)))
        mapping.extend(f"{_dump(str(coco_id))}:{_dump(image_id)}" for image_id, coco_id in ids.items())
    writer.end()
    mapping.end()
    return num_images, writer.count, num_left_out


def _write_dataset(stream: IO[str], source: CocoView) -> tuple[int, int, int]:
    """Write a dataset, its annotations first: the run is read once for them and once for the images."""
    record = read_run(source.layout)
    about = {"description": f"segpipe run {source.layout.run_id}", "model": record.model if record else {}}
    own = [{"id": index, "name": name, "supercategory": "none"} for index, name in source.categories.items()]
    categories = own if source.annotations is None else [dict(one) for one in source.annotations.categories.values()]
    stream.write(f'{{"info":{_dump(about)},"licenses":[],"categories":{_dump(categories)},\n"annotations":')
    annotations, num_left_out = _Items(stream, "[", "]"), 0
    for ids, images, instances in source.chunks():
        num_left_out += images.num_rows - len(ids)
        for result in source.results(ids, instances, with_area=True):
            annotations.extend([_dump({"id": annotations.count + 1, **result, "iscrowd": 0})])
    annotations.end()
    stream.write(',\n"images":')
    entries = _Items(stream, "[", "]")
    for ids, images, _ in source.chunks():
        entries.extend(
            _dump(_image_entry(row, ids[row["image_id"]])) for row in images.to_pylist() if row["image_id"] in ids
        )
    entries.end()
    stream.write("}\n")
    return entries.count, annotations.count, num_left_out


def _image_entry(row: Entry, coco_id: int) -> dict[str, Any]:
    """Return one entry of `images`; a failed image may have no size."""
    return {"id": coco_id, "file_name": row["image_id"], "width": row["width"] or 0, "height": row["height"] or 0}


class _Items:
    """Writes the items of one JSON list or object as they come, a line each."""

    def __init__(self, stream: IO[str] | None, opening: str, closing: str) -> None:
        self._stream = stream
        self._closing = closing
        self.count = 0
        if stream is not None:
            stream.write(opening)

    def extend(self, texts: Iterable[str]) -> None:
        """Write some more items."""
        if self._stream is None:
            return
        for text in texts:
            self._stream.write(f"{',' if self.count else ''}\n{text}")
            self.count += 1

    def end(self) -> None:
        """Close the list."""
        if self._stream is not None:
            self._stream.write(f"\n{self._closing}")


class _replacing:  # noqa: N801  # used like a function
    """Opens a file beside a path, and puts it in its place if the block ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> IO[str]:
        self._stream = self._beside.open("w", encoding="utf-8")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        if kind is None:
            self._beside.replace(self._path)
        else:
            self._beside.unlink(missing_ok=True)


_dump: Callable[[object], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _short(value: float) -> float:
    """Return a float32 as the shortest decimal that still is this float32: 0.9 instead of 0.8999999761581421."""
    return float(str(np.float32(value)))
