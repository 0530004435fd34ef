"""The segment stage: encoded images in, the rows of both tables out. Decoded pixels live and die here."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from segpipe.detections import Frame, Prediction
from segpipe.errors import ImageRejectedError
from segpipe.images import decode_image, stable_text
from segpipe.masks.grids import choose_encoder
from segpipe.models import Segmenter, is_machine_fault, is_out_of_memory, load_segmenter, release_memory
from segpipe.records import EncodedChunk, EncodedImage, Fault, ImageFailure, ImageHeader, SegmentedChunk
from segpipe.rows import failed_image_row, image_row, instances_table
from segpipe.stages import SegmentSettings
from segpipe.tables import IMAGES_SCHEMA, INSTANCES_SCHEMA

logger = logging.getLogger(__name__)

Watch = Callable[[str, Sequence[str]], None]

# Prepared images that may wait for others of their shape, in batches: 4 batches of 16 at 800 x 1333 are 0.8 GB.
_MAX_WAITING_BATCHES = 4


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image on its way through the model: where its row goes, and what the model gets."""

    position: int
    image: EncodedImage
    header: ImageHeader
    pixels: Any
    frame: Frame


@dataclass(frozen=True, slots=True)
class Rows:
    """What one image becomes.

    Attributes:
        image: its `images` row.
        instances: its `instances` rows.
    """

    image: dict[str, object]
    instances: pa.Table


class SegmentChunk:
    """The segment stage with its model loaded.

    Attributes:
        settings: as given.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        self.settings = settings
        self._segmenter: Segmenter[Any, Any] = load_segmenter(settings.request)
        self._usual: dict[str, str | int] = {
            **self._segmenter.resolved,
            "batch_size": self._segmenter.batch_size,
            "threads": settings.threads,
            "mask_encoder": choose_encoder(),
        }
        self._resolved = self._usual
        self._seconds: dict[str, float] = {}
        self._watch: Watch = lambda *_: None

    def __call__(
        self, chunk: EncodedChunk | Fault, *, known: Mapping[int, Rows] | None = None, watch: Watch = lambda *_: None
    ) -> SegmentedChunk | Fault:
        """Segment every image of a chunk, in batches of one padded shape.

        Args:
            chunk: encoded images, or the fault that came instead.
            known: position to rows of images that need not be looked at any more.
            watch: told of each step (`decode`, `segment`) and the image_ids that are in it, before it is taken.

        Returns:
            Rows in the order of the images, or a fault of memory or device, which leaves the chunk pending.
        """
        if isinstance(chunk, Fault):
            return chunk
        self._seconds = defaultdict(float, read=chunk.read_seconds)
        self._watch, self._resolved = watch, self._usual
        rows: dict[int, Rows] = dict(known or {})
        try:
            for batch in self._batches(chunk, rows):
                rows.update(self._segment_batch(batch, chunk.id.shard))
        except Exception as error:
            if not is_machine_fault(error):
                raise
            return Fault(chunk.id.name, "segment", f"{type(error).__name__}: {stable_text(error)}")
        ordered = [rows[position] for position in range(len(chunk.images))]
        instances = pa.concat_tables([INSTANCES_SCHEMA.empty_table(), *(row.instances for row in ordered)])
        return SegmentedChunk(
            id=chunk.id,
            images=pa.Table.from_pylist([row.image for row in ordered], schema=IMAGES_SCHEMA),
            instances=instances.combine_chunks(),
            shard_num_images=chunk.shard_num_images,
            resolved=self._resolved,
            seconds=dict(self._seconds),
        )

    def _batches(self, chunk: EncodedChunk, rows: dict[int, Rows]) -> Iterator[list[_Prepared]]:
        """Yield images grouped by padded shape; those that cannot be used get their row at once.

        Which images share a batch depends on the chunk and the batch size alone, so a repeated try gives the same rows.
        """
        waiting: dict[tuple[int, int], list[_Prepared]] = {}
        for position, image in enumerate(chunk.images):
            if position in rows:
                continue
            prepared = self._prepare(position, image, chunk.id.shard)
            if isinstance(prepared, Rows):
                rows[position] = prepared
                continue
            shape = prepared.frame.padded_hw
            waiting.setdefault(shape, []).append(prepared)
            if len(waiting[shape]) == self._segmenter.batch_size:
                yield waiting.pop(shape)
            elif sum(map(len, waiting.values())) >= _MAX_WAITING_BATCHES * self._segmenter.batch_size:
                yield waiting.pop(next(iter(waiting)))
        yield from waiting.values()

    def _prepare(self, position: int, image: EncodedImage, shard: str) -> _Prepared | Rows:
        if image.failure is not None:
            return failed_rows(image, shard, image.failure, None)
        self._watch("decode", [image.image_id])
        try:
            with self._timed("decode"):
                decoded = decode_image(
                    image.data,
                    max_pixels=self.settings.max_pixels,
                    allow_truncated=self.settings.allow_truncated,
                )
        except ImageRejectedError as error:
            return failed_rows(image, shard, ImageFailure("decode", error.error_type, str(error)), error.header)
        try:
            with self._timed("prepare"):
                pixels, frame = self._segmenter.prepare(decoded.pixels)
        except Exception as error:  # noqa: BLE001  # one image, whatever a model makes of it
            return failed_rows(image, shard, _blame_image(error), decoded.header)
        return _Prepared(position, image, decoded.header, pixels, frame)

    def _segment_batch(self, batch: list[_Prepared], shard: str) -> dict[int, Rows]:
        """Run the model; where a batch fails, its images are tried one by one, so that only the guilty one fails.

        So also where memory is too small for the batch; an image that it is too small for even alone fails.
        """
        self._watch("segment", [prepared.image.image_id for prepared in batch])
        try:
            predictions = self._predict(batch)
        except Exception as error:  # noqa: BLE001  # one batch, then one image
            failure = self._out_of_memory(error, len(batch)) if is_out_of_memory(error) else _blame_image(error)
            if len(batch) == 1:
                return {batch[0].position: failed_rows(batch[0].image, shard, failure, batch[0].header)}
            return {position: row for one in batch for position, row in self._segment_batch([one], shard).items()}
        with self._timed("encode"):
            return {
                prepared.position: self._rows_of(prepared, prediction, shard)
                for prepared, prediction in zip(batch, predictions, strict=True)
            }

    def _predict(self, batch: list[_Prepared]) -> list[Prediction]:
        frames = [prepared.frame for prepared in batch]
        with self._timed("forward"):
            raw = self._segmenter.forward([prepared.pixels for prepared in batch], frames)
            return self._segmenter.decode(raw, frames)

    def _out_of_memory(self, error: Exception, num_images: int) -> ImageFailure:
        release_memory()
        self._resolved = {**self._resolved, "out_of_memory": int(self._resolved.get("out_of_memory", 0)) + 1}
        logger.info("out_of_memory images=%d reason=%s", num_images, stable_text(error))
        return ImageFailure("segment", "OutOfMemory", stable_text(error))

    def _rows_of(self, prepared: _Prepared, prediction: Prediction, shard: str) -> Rows:
        image = prepared.image
        table = instances_table(
            image.image_id,
            prediction,
            image_hw=prepared.frame.image_hw,
            categories=self.settings.request.info.categories,
        )
        return Rows(image_row(image, shard, prepared.header, prediction), table)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started


def failed_rows(image: EncodedImage, shard: str, failure: ImageFailure, header: ImageHeader | None) -> Rows:
    """Return the rows of an image that has no instances because of its bytes."""
    return Rows(failed_image_row(image, shard, failure, header), INSTANCES_SCHEMA.empty_table())


def _blame_image(error: Exception) -> ImageFailure:
    """Return the failure of one image for which the model raised, unless the machine is to blame.

    Raises:
        Exception: the error itself, if it is a fault of memory or device.
    """
    if is_machine_fault(error):
        raise error
    return ImageFailure("segment", type(error).__name__, stable_text(error))
