"""What a person sees while work is going on: a progress line, and nothing else.

Progress and errors go to stderr, results to stdout. Libraries written in C (libtiff, Ray's core) write to the file
descriptor of stderr whatever Python says; while work is going on, that goes to a log file.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from segpipe.progress import Progress

# Without a terminal, a line each time this long: enough to follow a log, not enough to fill it.
_LINE_EVERY_S = 10.0


class ProgressLine:
    """Shows how far a run is: one live line in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_phase = ""
        self._last_line_at = 0.0
        self.last = Progress("")
        self._bar = Bar(
            SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), console=console, transient=True
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        elif self.last.committed.images:
            self._console.print(escape(describe(self.last)))

    def show(self, progress: Progress) -> None:
        """Take note of how far the run is."""
        self.last = progress
        if self._console.is_terminal:
            done = progress.skipped + progress.committed.images
            self._bar.update(
                self._task, description=escape(describe(progress)), total=progress.expected_images, completed=done
            )
            return
        now = time.monotonic()
        if progress.phase != self._last_phase or now - self._last_line_at >= _LINE_EVERY_S:
            self._console.print(escape(describe(progress)))
            self._last_phase, self._last_line_at = progress.phase, now


def describe(progress: Progress) -> str:
    """Return one line: images done, speed, instances, failed, time left; or what is being waited for."""
    if not progress.committed.images and not progress.num_faults:
        return progress.phase
    done = progress.skipped + progress.committed.images
    about = "about " if progress.is_estimate else ""
    total = f"/{about}{progress.expected_images:,}" if progress.expected_images is not None else ""
    parts = [f"{done:,}{total} images"]
    if progress.images_per_s:
        parts.append(f"{progress.images_per_s:.3g} images/s")
    parts += [f"{progress.committed.instances:,} instances", f"{progress.committed.failed:,} failed"]
    if progress.num_faults:
        parts.append(f"{progress.num_faults:,} chunks pending")
    if progress.left_s is not None:
        parts.append(f"{about}{duration(progress.left_s)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a time span for people: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def quiet_native_output() -> Iterator[Console]:
    """Send what C libraries write to stderr to a log file; the body gets a console on the real stderr."""
    log = tempfile.NamedTemporaryFile(prefix="segpipe-", suffix=".log", delete=False)  # noqa: SIM115  # kept on a crash
    real, python_stderr = os.dup(2), sys.stderr
    with log, os.fdopen(real, "w", buffering=1) as stderr:
        sys.stderr.flush()
        os.dup2(log.fileno(), 2)
        sys.stderr = stderr
        handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
        streams = [handler.setStream(stderr) for handler in handlers]
        try:
            yield Console(file=stderr, highlight=False, soft_wrap=True)
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream or python_stderr)
            sys.stderr = python_stderr
            os.dup2(real, 2)
            Path(log.name).unlink(missing_ok=True)  # only where the process was killed does the log stay
