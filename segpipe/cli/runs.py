"""Commands around a run: make it, plan it, look at it, check it; and the quick looks."""

from pathlib import Path
from typing import Annotated

import typer

from segpipe.cli.options import (
    ConfigFile,
    Engine,
    Input,
    Limit,
    ModelName,
    NewRunId,
    Output,
    OutputArgument,
    RayAddress,
    Refresh,
    RunId,
    Settings,
    Weights,
    interruptible,
    load,
)
from segpipe.errors import ConfigError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def run(
    input_: Input = None,
    output: Output = None,
    config: ConfigFile = None,
    model: ModelName = None,
    weights: Weights = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    run_id: NewRunId = None,
    set_: Settings = None,
    limit: Limit = None,
    refresh: Refresh = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Segment failed images again.")] = False,
    where: Annotated[
        str | None, typer.Option(help="With --retry-failed: which, as SQL over images: \"error_type = 'TimedOut'\".")
    ] = None,
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
    if where is not None and not retry_failed:
        raise ConfigError("--where: says which failed images to try again; give --retry-failed with it")
    chosen = load(config, options, set_)
    from segpipe.console.progress import ProgressLine, quiet_native_output
    from segpipe.console.runs import print_summary
    from segpipe.pipeline import run as run_pipeline

    with interruptible(), quiet_native_output() as stderr, ProgressLine(stderr) as line:
        retry_where = (where or "TRUE") if retry_failed else None
        summary = run_pipeline(chosen, limit=limit, refresh=refresh, retry_where=retry_where, on_progress=line.show)
    print_summary(summary)
    raise typer.Exit(summary.exit_code)


@app.command()
def plan(
    input_: Input = None,
    output: Output = None,
    config: ConfigFile = None,
    model: ModelName = None,
    weights: Weights = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    run_id: NewRunId = None,
    set_: Settings = None,
    limit: Limit = None,
    refresh: Refresh = False,
) -> None:
    """Say what `run` with the same options would do: shards, images, what is pending. Writes nothing.

    \b
    segpipe plan --input photos/ --output lake/ --model demo
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
    chosen = load(config, options, set_)
    from segpipe.console.runs import print_plan
    from segpipe.overview import plan as make_plan

    print_plan(make_plan(chosen, limit=limit, refresh=refresh))


@app.command()
def status(output: OutputArgument, run_id: RunId = None) -> None:
    """Say how far the runs of a lake are, and who is working on them.

    \b
    segpipe status lake/
    """
    from segpipe.console.runs import print_status
    from segpipe.overview import status as find_status

    print_status(find_status(output, run_id=run_id))


@app.command()
def validate(
    output: OutputArgument,
    run_id: RunId = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First remove strays and damaged chunks; `run` then makes them anew.")
    ] = False,
) -> None:
    """Check every promise of the tables on every file: each image once, each instance once, each mask whole.

    \b
    segpipe validate lake/
    segpipe validate lake/ --repair
    """
    if repair:
        from segpipe.console.runs import print_repairs
        from segpipe.validation.repair import repair as repair_runs

        print_repairs(repair_runs(output, run_id=run_id))
    from segpipe.console.runs import print_validation
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
    from segpipe.console.progress import quiet_native_output
    from segpipe.console.runs import print_prediction
    from segpipe.quicklook import predict as segment

    chosen = ModelConfig(name=model or "demo", weights=weights or "DEFAULT")
    with interruptible(), quiet_native_output():
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
    from segpipe.console.progress import ProgressLine, quiet_native_output
    from segpipe.console.runs import print_demo
    from segpipe.quicklook import demo as run_demo

    with interruptible(), quiet_native_output() as stderr, ProgressLine(stderr) as line:
        result = run_demo(output, model=model, engine=engine, on_progress=line.show)
    print_demo(result, is_weak=model == "demo")
    raise typer.Exit(result.summary.exit_code)


@app.command()
def doctor(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Also write, read and remove a file there.")
    ] = None,
    ray_address: RayAddress = None,
) -> None:
    """Say whether this machine can do the job: versions, devices, memory, disks, credentials, Ray; each with the fix.

    \b
    segpipe doctor
    segpipe doctor --output s3://bucket/lake --ray-address 10.0.0.1:6379
    """
    from segpipe.console.progress import quiet_native_output
    from segpipe.console.runs import print_findings
    from segpipe.doctor import examine

    with quiet_native_output():
        findings = examine(output, ray_address=ray_address)
    print_findings(findings)
    raise typer.Exit(0 if all(finding.is_good for finding in findings) else 1)


@app.command()
def models() -> None:
    """List the models and their weights.

    \b
    segpipe models
    """
    from segpipe.console.runs import print_models
    from segpipe.overview import list_models

    print_models(list_models())
