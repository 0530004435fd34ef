"""What a person sees of evaluations, exports and imports."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from segpipe.console.printing import print_out

if TYPE_CHECKING:
    from segpipe.coco.exporting import ExportSummary
    from segpipe.coco.importing import ImportSummary
    from segpipe.evaluation import Evaluation


def print_evaluation(evaluation: "Evaluation", *, is_long: bool) -> None:
    """Print the figures, the worst categories or all, and what makes them not comparable."""
    print_out(escape(f"{evaluation.run_id}: {evaluation.num_found:,} of {evaluation.num_images:,} annotated images"))
    figures = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = list(next(iter(evaluation.figures.values())))
    for name in ("", *names):
        figures.add_column(name, justify="right" if name else "left")
    for kind, values in evaluation.figures.items():
        figures.add_row(kind, *(_share(values[name]) for name in names))
    print_out(figures)
    shown = evaluation.categories if is_long else evaluation.categories[:10]
    if shown:
        columns = list(shown[0].values)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("category, worst first", "instances", *columns):
            table.add_column(name, justify="left" if name.startswith("category") else "right")
        for one in shown:
            table.add_row(
                escape(one.category), f"{one.num_instances:,}", *(_share(one.values[name]) for name in columns)
            )
        print_out("")
        print_out(table)
        if len(shown) < len(evaluation.categories):
            print_out(f"and {len(evaluation.categories) - len(shown)} more: --per-category")
    for warning in evaluation.warnings:
        print_out(escape(f"note: {warning}"))
    for file in evaluation.files:
        print_out(escape(file))


def print_export(summary: "ExportSummary") -> None:
    """Print what was exported."""
    print_out(escape(f"{summary.run_id}: {summary.num_instances:,} instances of {summary.num_images:,} images"))
    if summary.num_left_out:
        print_out(f"note: {summary.num_left_out:,} images of the run are not in the annotations and are left out")
    print_out(escape(summary.file))
    if summary.mapping is not None:
        print_out(escape(f"{summary.mapping}  (which image has which id)"))


def print_import(summary: "ImportSummary") -> None:
    """Print what was imported."""
    print_out(
        escape(
            f"{summary.run_id}: {summary.num_instances:,} instances of {summary.num_images:,} images, "
            f"{summary.num_without:,} of them without any"
        )
    )
    for problem in summary.problems:
        print_out(escape(f"note: {problem}"))
    for name in ("images", "instances", "categories"):
        print_out(escape(f"{name:<11} {summary.output.rstrip('/')}/{name}/run_id={summary.run_id}/"))


def _share(value: float) -> str:
    """Return a figure with four digits; `-` where there is nothing to measure."""
    return "-" if value < 0 else f"{value:.4f}"
