"""Runs a small job and dies (SIGKILL to itself) at a named moment. Run by test_crash_points.py in its own process.

python -m tests.crash_at MOMENT INPUT LAKE [refresh]
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segpipe import pipeline, runs, storage
from segpipe.models import blank
from segpipe.stages import commit, read
from tests.factory import config


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, *, call: int = 1) -> None:
    """Die instead of the n-th call of a function."""
    _patch(module, name, call, lambda honest, *args, **kwargs: die())


def after(module: Any, name: str, *, call: int = 1) -> None:
    """Die right after the n-th call of a function has returned."""

    def do_and_die(honest: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        honest(*args, **kwargs)
        die()

    _patch(module, name, call, do_and_die)


def _patch(module: Any, name: str, call: int, instead: Callable[..., Any]) -> None:
    honest, counter = getattr(module, name), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        return instead(honest, *args, **kwargs) if next(counter) == call else honest(*args, **kwargs)

    setattr(module, name, counted)


# Every chunk is two writes: instances, images. The third chunk is the one that dies.
MOMENTS: dict[str, Callable[[], None]] = {
    "after listing": lambda: before(pipeline, "_begin"),
    "before the keys are written": lambda: before(pipeline, "write_keys"),
    "after the keys are written": lambda: after(pipeline, "write_keys"),
    "during read": lambda: before(read, "read_bytes", call=7),
    "during inference": lambda: before(blank, "_cell_means", call=7),
    "while a file is written": lambda: before(storage.os, "fsync", call=18),
    "before the instances file": lambda: before(commit, "write_bytes", call=5),
    "between the two files": lambda: before(commit, "write_bytes", call=6),
    "after the images file": lambda: after(commit, "write_bytes", call=6),
    "before the old generation is removed": lambda: before(commit, "delete", call=1),
    "during a sweep": lambda: after(runs, "delete", call=1),
    "before chunks beyond the end are removed": lambda: before(pipeline, "delete", call=1),
    "during the finish": lambda: before(pipeline, "_write_end"),
    "after the finish": lambda: after(pipeline, "_write_end"),
}


if __name__ == "__main__":
    moment, source, lake = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    MOMENTS[moment]()
    pipeline.run(
        config(source, lake, input__chunk_images=2),
        refresh="refresh" in sys.argv,
        retry_where="TRUE" if "retry" in sys.argv else None,
    )
    raise SystemExit(f"did not die: {moment}")
