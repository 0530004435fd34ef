"""Commands that do something with a run's results: measure them, write them in other formats, take in others'."""

from pathlib import Path
from typing import Annotated

import typer

from segpipe.cli.options import Annotations, OneRun, OutputArgument

app = typer.Typer(add_completion=False, rich_markup_mode=None)
export_app = typer.Typer(no_args_is_help=True, help="Write a run in another format.", rich_markup_mode=None)
import_app = typer.Typer(no_args_is_help=True, help="Write another tool's results as a run.", rich_markup_mode=None)
app.add_typer(export_app, name="export")
app.add_typer(import_app, name="import")


@app.command(name="eval")
def evaluate(
    output: OutputArgument,
    annotations: Annotations,
    run_id: OneRun = None,
    max_dets: Annotated[int, typer.Option(min=1, help="Instances of each image and category that count.")] = 100,
    per_category: Annotated[bool, typer.Option("--per-category", help="Print every category, not the worst.")] = False,
    by_supercategory: Annotated[
        bool, typer.Option("--by-supercategory", help="The run's categories are the annotations' supercategories.")
    ] = False,
    matched_only: Annotated[
        bool, typer.Option("--matched-only", help="Look only at the annotated images that the run has.")
    ] = False,
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figures and pictures; one folder a run.")
    ] = Path("evaluation"),
) -> None:
    """Measure a run by COCO annotations: the twelve figures, AP of each category, pictures.

    \b
    segpipe eval lake/ --annotations instances_val2017.json
    segpipe eval lake/ --annotations instances.json --run demo-0a1b2c3d --by-supercategory --matched-only
    """
    from segpipe.coco.notes import EvaluationOptions
    from segpipe.console.coco import print_evaluation
    from segpipe.evaluation import evaluate as measure
    from segpipe.lake import choose_run
    from segpipe.storage import locate

    options = EvaluationOptions(
        max_dets=max_dets, by="supercategory" if by_supercategory else "category", matched_only=matched_only
    )
    chosen = choose_run(locate(output), run_id)
    print_evaluation(
        measure(output, annotations=annotations, run_id=chosen, options=options, folder=folder / chosen),
        is_long=per_category,
    )


@export_app.command(name="coco")
def export_coco(
    output: OutputArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON file to write.")],
    annotations: Annotated[
        str | None, typer.Option("--annotations", "-a", help="COCO dataset whose ids are taken, by file name.")
    ] = None,
    run_id: OneRun = None,
    full: Annotated[
        bool, typer.Option("--full", help="A whole dataset: images, categories, annotations; not results alone.")
    ] = False,
) -> None:
    """Write a run as COCO results, for COCO.loadRes and every tool that reads them.

    \b
    segpipe export coco lake/ results.json --annotations instances_val2017.json
    segpipe export coco lake/ dataset.json --full
    """
    from segpipe.coco.exporting import export_coco as export
    from segpipe.console.coco import print_export

    print_export(export(output, file, run_id=run_id, annotations=annotations, full=full))


@import_app.command(name="coco")
def import_coco(
    results: Annotated[str, typer.Argument(metavar="RESULTS", help="JSON list of COCO results; a path or any URI.")],
    annotations: Annotations,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the lake; a path or any fsspec URI.")],
    run_id: Annotated[str, typer.Option("--run", help="Name of the new run.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Take only the images that have results: the tool saw a part.")
    ] = False,
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="The results' category ids count the categories from 0.")
    ] = False,
) -> None:
    """Write any tool's COCO results (masks, polygons, boxes) as a run of a lake.

    \b
    segpipe import coco results.json --annotations instances_val2017.json --output lake/ --run other-tool
    """
    from segpipe.coco.importing import import_coco as import_
    from segpipe.console.coco import print_import

    print_import(
        import_(results, annotations=annotations, output=output, run_id=run_id, partial=partial, contiguous=contiguous)
    )
