"""Options that several commands share, and what they do before and after their work."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

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
RayAddress = Annotated[str | None, typer.Option(help="Join this Ray cluster; default RAY_ADDRESS, else here.")]
NewRunId = Annotated[str | None, typer.Option("--run-id", help="Name of the run; default the model and a fingerprint.")]
RunId = Annotated[str | None, typer.Option("--run", help="One run; all if left out.")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUT", help="Folder of the lake; a path or any fsspec URI.")]

OneRun = Annotated[str | None, typer.Option("--run", help="Which run; needed where there are several.")]
Annotations = Annotated[
    str, typer.Option("--annotations", "-a", help="COCO dataset with images, categories, annotations; a path or URI.")
]


@contextmanager
def interruptible() -> Iterator[None]:
    """Say how to resume where a run is stopped with Ctrl-C, or by a cluster."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: what was committed stays; run the same command again to resume", err=True)
        raise typer.Exit(130) from None


def load(config: Path | None, options: dict[str, str | None], assignments: list[str] | None) -> Any:  # noqa: ANN401
    """Lay options and --set over the file; pydantic is imported only for commands that need it."""
    from segpipe.config import load_config
    from segpipe.sections import parse_assignment

    given: dict[str, object] = {key: value for key, value in options.items() if value is not None}
    return load_config(config, {**given, **dict(map(parse_assignment, assignments or []))})
