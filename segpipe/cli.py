"""The command line: arguments in, exit codes out. What commands do is in the public functions of the same names.

Exit codes: 0 done, 1 the run is unfinished or failed or data is invalid, 2 the request was wrong, 130 interrupted.
"""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from segpipe.errors import RequestError, SegpipeError

app = typer.Typer(
    name="segpipe",
    help="Every object in an archive of photographs as a row: instance segmentation into Parquet tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Input = Annotated[
    str | None,
    typer.Option("--input", "-i", help="Folder, glob, tar, Parquet file or manifest; a path or any fsspec URI."),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of the lake; a path or any fsspec URI.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; see configs/reference.yaml.")]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="Model name; see `segpipe models`.")]
Weights = Annotated[
    str | None, typer.Option("--weights", "-w", help="COCO_V1, DEFAULT, or the path or URI of a checkpoint.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be given more than once.")
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first N images; whole chunks where they come from shards.")
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Segment anew what was replaced in the input since it was read.")
]
Engine = Annotated[str | None, typer.Option(help="ray (default) or inline: a loop in this process, without Ray.")]
RunId = Annotated[str | None, typer.Option("--run", help="One run; all if left out.")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUT", help="Folder of the lake; a path or any fsspec URI.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from segpipe import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log a line for every chunk.")] = False,
    version: Annotated[  # noqa: ARG001  # acted on by its callback, before a command is looked for
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Set up logging."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )


@app.command()
def run(
    input_: Input = None,
    output: Output = None,
    config: ConfigFile = None,
    model: ModelName = None,
    weights: Weights = None,
    engine: Engine = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Join this Ray cluster; default RAY_ADDRESS, else here.")
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; default the model and a fingerprint.")] = None,
    set_: Settings = None,
    limit: Limit = None,
    refresh: Refresh = False,
) -> None:
    """Segment every image of an input into the tables of a lake; the same command again resumes.

    \b
    segpipe run --input photos/ --output lake/ --model demo
    segpipe run --input 's3://bucket/shards/*.tar' --output s3://bucket/lake --set model.score_threshold=0.3
    """
    options = {
        "input.uri": input_,
        "output.uri": output,
        "model.name": model,
        "model.weights": weights,
        "resources.engine": engine,
        "resources.ray_address": ray_address,
        "output.run_id": run_id,
    }
    chosen = _load(config, options, set_)
    from segpipe.console import ProgressLine, print_summary, quiet_native_output
    from segpipe.pipeline import run as run_pipeline

    with _interruptible(), quiet_native_output() as stderr, ProgressLine(stderr) as line:
        summary = run_pipeline(chosen, limit=limit, refresh=refresh, on_progress=line.show)
    print_summary(summary)
    raise typer.Exit(summary.exit_code)


@app.command()
def plan(
    input_: Input = None,
    output: Output = None,
    config: ConfigFile = None,
    model: ModelName = None,
    weights: Weights = None,
    set_: Settings = None,
    limit: Limit = None,
) -> None:
    """Say what `run` would do: shards, images, what is pending. Writes nothing.

    \b
    segpipe plan --input photos/ --output lake/ --model demo
    """
    options = {"input.uri": input_, "output.uri": output, "model.name": model, "model.weights": weights}
    chosen = _load(config, options, set_)
    from segpipe.console import print_plan
    from segpipe.overview import plan as make_plan

    print_plan(make_plan(chosen, limit=limit))


@app.command()
def status(output: OutputArgument, run_id: RunId = None) -> None:
    """Say how far the runs of a lake are, and who is working on them.

    \b
    segpipe status lake/
    """
    from segpipe.console import print_status
    from segpipe.overview import status as find_status

    print_status(find_status(output, run_id=run_id))


@app.command()
def validate(output: OutputArgument, run_id: RunId = None) -> None:
    """Check every promise of the tables on every file: each image once, each instance once, each mask whole.

    \b
    segpipe validate lake/
    """
    from segpipe.console import print_validation
    from segpipe.validation import validate as check

    runs = check(output, run_id=run_id)
    print_validation(runs)
    raise typer.Exit(0 if all(found.is_valid for found in runs) else 1)


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files; paths or URIs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the overlays.")] = Path("predictions"),
    model: ModelName = None,
    weights: Weights = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Leave out instances that score lower.")] = 0.5,
) -> None:
    """Segment a few images in this process, without Ray, and draw what was found as PNG overlays.

    \b
    segpipe predict photo.jpg
    segpipe predict *.jpg --model maskrcnn_resnet50_fpn_v2 --score 0.85
    """
    from segpipe.config import ModelConfig
    from segpipe.console import print_prediction, quiet_native_output
    from segpipe.quicklook import predict as segment

    chosen = ModelConfig(name=model or "demo", weights=weights or "DEFAULT")
    with _interruptible(), quiet_native_output():
        predictions = segment(images, model=chosen, output=output, score_threshold=score, on_image=print_prediction)
    raise typer.Exit(0 if all(found.row["status"] == "ok" for found in predictions) else 1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that it makes.")] = Path(
        "segpipe-demo"
    ),
    model: Annotated[str, typer.Option("--model", "-m", help="Model name; demo needs no download.")] = "demo",
    engine: Annotated[str, typer.Option(help="ray (default) or inline: a loop in this process, without Ray.")] = "ray",
) -> None:
    """Run the main job on six photographs that installed packages ship, and draw what it found.

    \b
    segpipe demo
    segpipe demo --model maskrcnn_resnet50_fpn_v2
    """
    from segpipe.console import ProgressLine, print_demo, quiet_native_output
    from segpipe.quicklook import demo as run_demo

    with _interruptible(), quiet_native_output() as stderr, ProgressLine(stderr) as line:
        result = run_demo(output, model=model, engine=engine, on_progress=line.show)
    print_demo(result, is_weak=model == "demo")
    raise typer.Exit(result.summary.exit_code)


@app.command()
def models() -> None:
    """List the models and their weights.

    \b
    segpipe models
    """
    from segpipe.console import print_models
    from segpipe.overview import list_models

    print_models(list_models())


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)  # a cluster asks politely before it kills
    try:
        app()
    except SegpipeError as error:
        for text in str(error).splitlines():
            typer.echo(f"error: {text}", err=True)
        sys.exit(2 if isinstance(error, RequestError) else 1)
    sys.exit(0)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say how to resume where a run is stopped with Ctrl-C, or by a cluster."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: what was committed stays; run the same command again to resume", err=True)
        raise typer.Exit(130) from None


def _load(config: Path | None, options: dict[str, str | None], assignments: list[str] | None) -> Any:  # noqa: ANN401
    """Lay options and --set over the file; pydantic is imported only for commands that need it."""
    from segpipe.config import load_config, parse_assignment

    given: dict[str, object] = {key: value for key, value in options.items() if value is not None}
    return load_config(config, {**given, **dict(map(parse_assignment, assignments or []))})


def _interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the shape of a signal handler
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
