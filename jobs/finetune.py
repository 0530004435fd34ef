"""Fine-tune torchvision's Mask R-CNN on a COCO dataset. The same command again resumes where a killed one was.

    python jobs/finetune.py --train train/instances.json --validation val/instances.json --output finetuned/
    python jobs/finetune.py --config configs/demo_model.yaml --set train.epochs=2

Then use it: segpipe run --weights finetuned/best.safetensors --input photos/ --output lake/
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from segpipe.console.progress import duration
from segpipe.errors import RequestError, SegpipeError
from segpipe.finetuning.settings import load_finetune_config
from segpipe.sections import parse_assignment

if TYPE_CHECKING:
    from segpipe.finetuning.job import FinetuneProgress

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_LINE_EVERY_S = 10.0
_CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


class Reporter:
    """Prints a line of losses now and then, and the figures of every epoch."""

    def __init__(self) -> None:
        self._last_at = 0.0

    def show(self, progress: "FinetuneProgress") -> None:
        """Take note of what has just happened."""
        if progress.phase:
            _CONSOLE.print(escape(progress.phase))
        if progress.figures:
            _CONSOLE.print(
                ", ".join(f"{name} {progress.figures[name]:.4f}" for name in ("segm AP", "segm AP50", "bbox AP"))
            )
        step, now = progress.step, time.monotonic()
        if step is None:
            return
        for problem in step.problems:
            _CONSOLE.print(escape(f"not used: {problem}"))
        if now - self._last_at >= _LINE_EVERY_S or step.number == progress.num_steps:
            self._last_at = now
            losses = ", ".join(f"{name} {value:.4f}" for name, value in step.losses.items())
            left = f", {duration(progress.left_s)} left" if progress.left_s is not None else ""
            _CONSOLE.print(
                f"epoch {step.epoch + 1}, step {step.number:,}/{progress.num_steps:,}, rate {step.learning_rate:.2g}: "
                f"{losses}{left}"
            )


@app.command(help=__doc__)
def main(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; see configs/finetune.yaml.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="COCO annotations to learn from; may be repeated.")] = None,
    validation: Annotated[list[str] | None, typer.Option(help="COCO annotations to measure with.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be given more than once.")
    ] = None,
) -> None:
    """Read the settings, fine-tune, print how it ended."""
    settings: dict[str, object] = {}
    if train:
        settings["data.train"] = [{"annotations": name} for name in train]
    if validation:
        settings["data.validation"] = [{"annotations": name} for name in validation]
    if output is not None:
        settings["output.uri"] = output
    chosen = load_finetune_config(config, {**settings, **dict(map(parse_assignment, set_ or []))})
    from segpipe.finetuning.job import finetune

    try:
        summary = finetune(chosen, on_progress=Reporter().show)
    except KeyboardInterrupt:
        _CONSOLE.print("interrupted: run the same command again to resume")
        raise typer.Exit(130) from None
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row("checkpoint", escape(summary.checkpoint))
    table.add_row("epoch", str(summary.best_epoch))
    table.add_row("steps", f"{summary.num_steps:,}, {summary.first_step:,} of them by earlier starts")
    if summary.unusable:
        table.add_row("not used", f"{len(summary.unusable):,} images")
    for name, value in summary.figures.items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("time", duration(summary.seconds))
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except SegpipeError as error:
        for text in str(error).splitlines():
            typer.echo(f"error: {text}", err=True)
        sys.exit(2 if isinstance(error, RequestError) else 1)
