"""What a person sees of runs, plans, predictions and models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from segpipe.console.printing import print_out
from segpipe.console.progress import duration
from segpipe.progress import RunSummary

if TYPE_CHECKING:
    from segpipe.doctor import Finding
    from segpipe.overview import ModelSummary, PlanSummary, RunStatus
    from segpipe.quicklook import DemoResult, ImagePrediction
    from segpipe.validation import RunValidation
    from segpipe.validation.repair import Repair


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
    print_out(table)
    for name in ("images", "instances", "categories"):
        print_out(escape(f"{name:<11} {summary.output.rstrip('/')}/{name}/run_id={summary.run_id}/"))
    for line in _next_steps(summary):
        print_out(escape(line))


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
    print_out(table)
    for text in summary.replaced[:5]:
        print_out(escape(f"replaced: {text}; --refresh segments it anew"))


def print_status(runs: Sequence["RunStatus"]) -> None:
    """Print how far the runs of a lake are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "state", "images", "failed", "instances", "updated", "held by"):
        table.add_column(name, justify="right" if name in ("images", "failed", "instances") else "left")
    for run in runs:
        images = f"{run.totals.images:,}" + (f"/{run.num_images:,}" if run.num_images is not None else "")
        counts = (images, f"{run.totals.failed:,}", f"{run.totals.instances:,}")
        table.add_row(run.run_id, run.state, *counts, run.updated_at, escape(run.holder or ""))
    print_out(table)


def print_validation(runs: Sequence["RunValidation"]) -> None:
    """Print every promise and what breaks it."""
    for run in runs:
        print_out(escape(f"{run.run_id}: {run.num_images:,} images, {run.num_instances:,} instances, {run.state}"))
        for promise, problems in run.problems.items():
            print_out(escape(f"  {'kept  ' if not problems else 'BROKEN'}  {promise}"))
            for problem in problems[:10]:
                print_out(escape(f"            {problem}"))
            if len(problems) > 10:
                print_out(f"            and {len(problems) - 10:,} more")


def print_repairs(repairs: Sequence["Repair"]) -> None:
    """Print what was repaired."""
    for one in repairs:
        print_out(
            escape(f"{one.run_id}: {one.num_swept:,} strays removed, {len(one.requeued):,} chunks to be made anew")
        )


def print_findings(findings: Sequence["Finding"]) -> None:
    """Print what the doctor found."""
    for finding in findings:
        print_out(escape(f"{'good' if finding.is_good else 'BAD '}  {finding.name:<14} {finding.text}"))
        if finding.fix:
            print_out(escape(f"{'':<21}{finding.fix}"))


def print_prediction(prediction: "ImagePrediction") -> None:
    """Print what the model says about one image."""
    row = prediction.row
    if row["status"] == "failed":
        print_out(
            escape(f"{prediction.image}: {row['error_stage']} failed: {row['error_type']}: {row['error_message']}")
        )
        return
    print_out(escape(f"{prediction.image}: {len(prediction.instances)} instances -> {prediction.overlay}"))
    if prediction.instances:
        print_out(_instances(prediction.instances))


def print_demo(result: "DemoResult", *, is_weak: bool) -> None:
    """Print what the demo made."""
    print_summary(result.summary)
    print_out("\nfirst rows of instances:")
    print_out(_instances(result.instances))
    print_out("\noverlays, score 0.5 and over:")
    for path in result.overlays:
        print_out(escape(f"  {path}"))
    if is_weak:
        print_out(
            "\nThe demo's model is small and weak. The real thing, where torchvision's weights can be downloaded:\n"
            "  segpipe demo --model maskrcnn_resnet50_fpn_v2"
        )


def print_models(models: Sequence["ModelSummary"]) -> None:
    """Print the registry."""
    for model in models:
        print_out(escape(f"{model.name}\n  {model.summary}"))
        print_out(escape(f"  weights: {', '.join(model.weights) or 'none'} ({model.weights_note})"))
        print_out(escape(f"  licence: {model.licence}"))
    print_out("\nOwn weights: --weights FILE.pth or FILE.safetensors, of the same network with any categories.")


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
