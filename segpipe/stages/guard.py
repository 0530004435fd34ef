"""Segment and commit a chunk so that no image can stop a run: one that kills its worker becomes a failed row.

A chunk whose worker died is tried again with a note, before each step, of the images that are in flight. What was in
flight when a worker died is tried alone in a process of its own, with limits of time and memory: if that dies too, the
image is to blame. Each death narrows it down, so a chunk with n such images costs at most 2 n + 1 workers.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow.compute as pc

from segpipe.attempts import Attempt, begin_attempt, end_attempt, note_attempt
from segpipe.errors import StoreError
from segpipe.lake import read_chunk
from segpipe.layout import RunLayout
from segpipe.records import Committed, EncodedChunk, Fault, ImageFailure
from segpipe.stages import SegmentSettings
from segpipe.stages.commit import commit_chunk
from segpipe.stages.isolation import segment_alone
from segpipe.stages.segment import Rows, SegmentChunk, failed_rows
from segpipe.tables import RunLabel

logger = logging.getLogger(__name__)

# Workers that may die before any image of a chunk is begun, until the chunk is left pending.
_MAX_BARREN = 3
# The watchdog needs Python; where native code holds on to it, this one does not, and comes later.
_BACKSTOP_S = 30.0


class ChunkProcessor:
    """Holds a model; turns encoded chunks into committed ones."""

    def __init__(self, settings: SegmentSettings, *, layout: RunLayout, label: RunLabel) -> None:
        self._settings = settings
        self._layout = layout
        self._label = label
        self._segment = SegmentChunk(settings)
        self._watchdog = Watchdog(settings.max_seconds)

    def __call__(self, chunk: EncodedChunk | Fault) -> Committed | Fault:
        """Segment and commit a chunk, or hand on the fault that came instead of it."""
        if isinstance(chunk, Fault):
            return chunk
        try:
            attempt = begin_attempt(self._layout, chunk.id)
            return self._try(chunk, attempt)
        except StoreError as error:  # of a note, or of rows that stand; commit_chunk answers for its own
            return Fault(chunk.id.name, "segment", str(error))
        finally:
            self._watchdog.rest()

    def _try(self, chunk: EncodedChunk, attempt: Attempt) -> Committed | Fault:
        afresh = replace(attempt, count=1)
        try:
            outcome, attempt = self._process(chunk, attempt)
        except BaseException:
            self._end(chunk, afresh)  # nobody died: begin afresh the next time
            raise
        self._end(chunk, attempt)
        return outcome

    def _end(self, chunk: EncodedChunk, attempt: Attempt) -> None:
        try:
            end_attempt(self._layout, chunk.id, attempt)
        except StoreError as error:  # a note that stays makes the next attempt careful, and no more
            logger.info("attempt_note_removed=false chunk=%s reason=%s", chunk.id.name, error)

    def _process(self, chunk: EncodedChunk, attempt: Attempt) -> tuple[Committed | Fault, Attempt]:
        if attempt.barren >= _MAX_BARREN:
            message = f"{attempt.barren} workers died before they had begun an image of it"
            return Fault(chunk.id.name, "segment", message), attempt
        known = self._committed_rows(chunk)
        for position, image in enumerate(chunk.images):
            if image.image_id not in attempt.suspects or position in known:
                continue
            verdict = attempt.verdicts.get(image.image_id)
            if verdict is None:
                found = segment_alone(replace(chunk, images=(image,)), self._settings)
                if isinstance(found, Fault):
                    return found, attempt
                if isinstance(found, ImageFailure):
                    verdict = found
                    attempt = replace(attempt, verdicts={**attempt.verdicts, image.image_id: verdict})
                    note_attempt(self._layout, chunk.id, attempt)
                    logger.info("quarantined=%s type=%s attempts=%d", image.image_id, verdict.type, attempt.count)
                else:
                    known[position] = found
            if verdict is not None:
                known[position] = failed_rows(image, chunk.id.shard, verdict, None)
        segmented = self._segment(chunk, known=known, watch=self._watcher(chunk, attempt))
        self._watchdog.rest()
        return commit_chunk(segmented, layout=self._layout, label=self._label), attempt

    def _committed_rows(self, chunk: EncodedChunk) -> dict[int, Rows]:
        """Return the rows that stand, by position, of a chunk in which only failed images are tried again."""
        if chunk.retry is None:
            return {}
        images, instances = read_chunk(self._layout, chunk.id.name)
        rows = {row["image_id"]: row for row in images.to_pylist()}
        return {
            position: Rows(
                rows[image.image_id], instances.filter(pc.equal(instances["image_id"], image.image_id)).combine_chunks()
            )
            for position, image in enumerate(chunk.images)
            if image.image_id not in chunk.retry and image.image_id in rows
        }

    def _watcher(self, chunk: EncodedChunk, attempt: Attempt) -> Callable[[str, Sequence[str]], None]:
        """Return what is called before each step with some images: winds up the watchdog, and notes them."""

        def watch(stage: str, image_ids: Sequence[str]) -> None:
            self._watchdog.wind_up(f"{stage} of {', '.join(image_ids)}", len(image_ids))
            if attempt.count > 1:
                note_attempt(self._layout, chunk.id, replace(attempt, in_flight=tuple(image_ids)))

        return watch


class Watchdog:
    """Ends this process when a step takes longer than it may: what hangs in native code cannot be stopped otherwise."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline: float | None = None
        self._what = ""
        self._stopped: threading.Event | None = None

    def wind_up(self, what: str, times: int = 1) -> None:
        """Give a step its time: the limit for each of its images."""
        self._what, self._deadline = what, time.monotonic() + times * self._limit_s
        faulthandler.dump_traceback_later(times * self._limit_s + _BACKSTOP_S, exit=True, file=2)
        if self._stopped is None:
            self._stopped = threading.Event()
            threading.Thread(target=self._watch, args=(self._stopped,), name="segpipe-watchdog", daemon=True).start()

    def rest(self) -> None:
        """Stop watching until the next step; no thread is left behind."""
        self._deadline = None
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(min(1.0, self._limit_s / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                logger.error(
                    "%s took over %g s: this process ends. Run the same command again: it tries the image alone",
                    self._what, self._limit_s,
                )  # fmt: skip
                logging.shutdown()
                os._exit(1)
