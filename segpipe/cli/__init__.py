"""The command line: arguments in, exit codes out. What commands do is in the public functions of the same names.

Exit codes: 0 done, 1 the run is unfinished or failed or data is invalid, 2 the request was wrong, 130 interrupted.
"""

import logging
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from segpipe.cli import results, runs
from segpipe.errors import RequestError, SegpipeError

app = typer.Typer(
    name="segpipe",
    help="Every object in an archive of photographs as a row: instance segmentation into Parquet tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(runs.app)
app.add_typer(results.app)


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
    if not verbose:  # what Pillow says of broken files is in their rows
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )


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


def _interrupt(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001  # the shape of a signal handler
    raise KeyboardInterrupt
