"""What a person sees: a progress line, tables, and nothing else.

Progress and errors go to stderr, results to stdout. Libraries written in C (libtiff, Ray's core) write to the file
descriptor of stderr whatever Python says; while work is going on, that goes to a log file.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from segpipe.progress import Progress, RunSummary

if TYPE_CHECKING:
    from segpipe.overview import ModelSummary, PlanSummary, RunStatus
    from segpipe.quicklook import DemoResult, ImagePrediction
    from segpipe.validation import RunValidation

# Without a terminal, a line each time this long: enough to follow a log, not enough to fill it.
_LINE_EVERY_S = 10.0

# Width of tables where nothing is known of the reader's screen: rows stay whole in files and pipes.
_PIPE_WIDTH = 200


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


def print_summary(summary: RunSummary) -> None:
    """Print how a run ended, where its tables are, and what to do next."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    totals, new = summary.totals, summary.committed
    table.add_row("run", summary.run_id)
    table.add_row("state", summary.state)
    table.add_row("images", f"{totals.images:,} ({totals.images - totals.failed:,} ok, {totals.failed:,} failed)")
    table.add_row(
        "instances", f"{totals.instances:,}" + (f" ({totals.capped:,} images capped)" if totals.capped else "")
    )
    speed = f", {new.images / summary.elapsed_s:.3g} images/s start-up included" if new.images else ""
    nothing = "nothing to do, everything is committed" if not new.images and not summary.faults else ""
    table.add_row("this start", nothing or f"{new.images:,} images in {duration(summary.elapsed_s)}{speed}")
    if summary.skipped:
        table.add_row("skipped", f"{summary.skipped:,} images that earlier starts had committed")
    _print(table)
    for name in ("images", "instances", "categories"):
        _print(escape(f"{name:<11} {summary.output.rstrip('/')}/{name}/run_id={summary.run_id}/"))
    for line in _next_steps(summary):
        _print(escape(line))


def _next_steps(summary: RunSummary) -> list[str]:
    lines = [f"pending: {fault.where} ({fault.stage}): {fault.message}" for fault in summary.faults[:5]]
    if len(summary.faults) > 5:
        lines.append(f"pending: and {len(summary.faults) - 5:,} more chunks")
    lines += [f"pending: shard {name} is gone from the input; put it back" for name in summary.lost_shards[:5]]
    if summary.state == "failed":
        lines.append(
            f"failed: {summary.totals.failed:,} of {summary.totals.images:,} images failed, more than "
            f"output.max_failed_share allows; every row is committed, see error_type in images"
        )
    elif summary.state == "unfinished" and summary.limited and not lines:
        lines.append("limit reached: run the same command without --limit to go on")
    elif summary.state == "unfinished":
        lines.append("unfinished: run the same command again, it does only what is missing")
    return lines


def print_plan(summary: "PlanSummary") -> None:
    """Print what a run would do."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    about = "about " if summary.is_estimate else ""
    table.add_row("run", summary.run_id)
    shards = f"{summary.num_shards:,} shards" if summary.kind in ("webdataset", "parquet") else summary.kind
    size = f", {summary.input_bytes / 1e6:,.1f} MB" if summary.input_bytes is not None else ""
    table.add_row("input", escape(f"{summary.input_root}: {shards}{size}"))
    if summary.num_ignored:
        table.add_row("ignored", f"{summary.num_ignored:,} files of other kinds")
    table.add_row("images", f"{about}{summary.num_images:,}")
    table.add_row("committed", f"{summary.committed.images:,} in {summary.committed.chunks:,} chunks")
    table.add_row("pending", f"{about}{summary.num_pending:,} in chunks of {summary.chunk_images:,}")
    if summary.num_pending:
        known = summary.left_s is not None
        left = f"{duration(summary.left_s or 0)} at the speed of earlier starts" if known else "unknown before a start"
        table.add_row("time", left)
    _print(table)
    for text in summary.replaced[:5]:
        _print(escape(f"replaced: {text}; --refresh segments it anew"))


def print_status(runs: Sequence["RunStatus"]) -> None:
    """Print how far the runs of a lake are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "state", "images", "failed", "instances", "updated", "held by"):
        table.add_column(name, justify="right" if name in ("images", "failed", "instances") else "left")
    for run in runs:
        images = f"{run.totals.images:,}" + (f"/{run.num_images:,}" if run.num_images is not None else "")
        counts = (images, f"{run.totals.failed:,}", f"{run.totals.instances:,}")
        table.add_row(run.run_id, run.state, *counts, run.updated_at, escape(run.holder or ""))
    _print(table)


def print_validation(runs: Sequence["RunValidation"]) -> None:
    """Print every promise and what breaks it."""
    for run in runs:
        _print(escape(f"{run.run_id}: {run.num_images:,} images, {run.num_instances:,} instances, {run.state}"))
        for promise, problems in run.problems.items():
            _print(escape(f"  {'kept  ' if not problems else 'BROKEN'}  {promise}"))
            for problem in problems[:10]:
                _print(escape(f"            {problem}"))
            if len(problems) > 10:
                _print(f"            and {len(problems) - 10:,} more")


def print_prediction(prediction: "ImagePrediction") -> None:
    """Print what the model says about one image."""
    row = prediction.row
    if row["status"] == "failed":
        _print(escape(f"{prediction.image}: {row['error_stage']} failed: {row['error_type']}: {row['error_message']}"))
        return
    _print(escape(f"{prediction.image}: {len(prediction.instances)} instances -> {prediction.overlay}"))
    if prediction.instances:
        _print(_instances(prediction.instances))


def print_demo(result: "DemoResult", *, is_weak: bool) -> None:
    """Print what the demo made."""
    print_summary(result.summary)
    _print("\nfirst rows of instances:")
    _print(_instances(result.instances))
    _print("\noverlays, score 0.5 and over:")
    for path in result.overlays:
        _print(escape(f"  {path}"))
    if is_weak:
        _print(
            "\nThe demo's model is small and weak. The real thing, where torchvision's weights can be downloaded:\n"
            "  segpipe demo --model maskrcnn_resnet50_fpn_v2"
        )


def print_models(models: Sequence["ModelSummary"]) -> None:
    """Print the registry."""
    for model in models:
        _print(escape(f"{model.name}\n  {model.summary}"))
        _print(escape(f"  weights: {', '.join(model.weights) or 'none'} ({model.weights_note})"))
        _print(escape(f"  licence: {model.licence}"))
    _print("\nOwn weights: --weights FILE.pth or FILE.safetensors, of the same network with any categories.")


def _print(content: str | Table) -> None:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width).print(content)


def _instances(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("image_id", "id", "category", "score", "bbox x, y, w, h", "area", "rle_counts"):
        table.add_column(name, justify="right" if name in ("id", "score", "area") else "left", no_wrap=True)
    for row in rows:
        box = ", ".join(f"{row[name]:.1f}" for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h"))
        area = "" if row["area"] is None else f"{row['area']:,}"
        table.add_row(
            escape(row["image_id"]), str(row["instance_id"]), escape(row["category"]), f"{row['score']:.3f}", box, area,
            escape(f"{(row['rle_counts'] or '')[:24]}..."),
        )  # fmt: skip
    return table
