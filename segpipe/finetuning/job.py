"""A fine-tuning from its settings to `best.safetensors`: the whole job on one page.

The folder of results holds
    best.safetensors   the network with the best segm AP so far (without validation data, or with keep: last, the last)
    last.pt            the state that the same command resumes from
    log.jsonl          a line for each step and each epoch, written as they end
    curves.png         losses and AP
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segpipe.errors import InputError, OutputError
from segpipe.finetuning.augmentation import Augment
from segpipe.finetuning.dataset import LabelledData, TrainingSet, mix, read_data
from segpipe.finetuning.measuring import measure
from segpipe.finetuning.network import as_saved, build_network, checkpoint_place, metadata_of, save_network
from segpipe.finetuning.plots import draw_curves
from segpipe.finetuning.settings import FinetuneConfig, binding_settings
from segpipe.finetuning.trainer import Step, Trainer
from segpipe.models.maskrcnn import choose_device
from segpipe.runs import versions

BEST_FIGURE = "segm AP"


@dataclass(frozen=True, slots=True)
class FinetuneProgress:
    """What has just happened.

    Attributes:
        phase: in words; empty while steps are taken.
        step: the step that was taken, None in other phases.
        num_steps: of the whole job.
        figures: of the epoch that has just been measured.
        left_s: seconds left at the speed of this start; None while nobody knows.
    """

    phase: str = ""
    step: Step | None = None
    num_steps: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    left_s: float | None = None


@dataclass(frozen=True, slots=True)
class FinetuneSummary:
    """How a fine-tuning ended.

    Attributes:
        checkpoint: path of best.safetensors.
        figures: of the network in it; empty without validation data.
        best_epoch: 1-based.
        num_steps: taken, those of earlier starts included.
        first_step: of this start, 0-based.
        unusable: images that could not be learned from, each once, and why.
        seconds: of this start.
    """

    checkpoint: str
    figures: Mapping[str, float]
    best_epoch: int
    num_steps: int
    first_step: int
    unusable: tuple[str, ...]
    seconds: float


def finetune(
    config: FinetuneConfig, *, on_progress: Callable[[FinetuneProgress], None] = lambda _: None
) -> FinetuneSummary:
    """Fine-tune a Mask R-CNN; the same call again resumes where a killed one was.

    Args:
        config: what to learn from, which network, how, and where to.
        on_progress: told of every step.

    Raises:
        RequestError: for every mistake of the user; one line with the fix.
        DivergedError: if the loss is no number any more.
    """
    started = time.perf_counter()
    device = choose_device(config.train.device)
    if config.train.threads != "auto":
        torch.set_num_threads(config.train.threads)
    on_progress(FinetuneProgress("reading the annotations"))
    data = read_data(config.data)
    for line in data.problems:
        on_progress(FinetuneProgress(line))
    torch.manual_seed(mix(config.train.seed))  # heads that start anew
    start = build_network(config.network, data.categories)
    folder = Folder(Path(config.output.uri), config, {**data.identity(), "start": start.source})
    on_progress(FinetuneProgress(_describe(data, start.source, len(start.fresh), device)))
    samples = TrainingSet(data.train, Augment(config.augmentation), seed=config.train.seed)
    trainer = Trainer(start.model, samples, config.train, device=device)
    initial = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    best = folder.resume(trainer)
    first_step, unusable = trainer.step, dict.fromkeys(best.unusable)
    num_steps = config.train.epochs * trainer.steps_per_epoch
    saved_at = time.perf_counter()
    num_empty = 0
    for epoch in range(trainer.step // trainer.steps_per_epoch, config.train.epochs):
        for step in trainer.steps(epoch):
            unusable.update(dict.fromkeys(step.problems))
            folder.log(step)
            num_empty = 0 if step.losses else num_empty + 1
            if num_empty >= trainer.steps_per_epoch:
                raise InputError(f"data.train: not one image can be used; the first: {next(iter(unusable), '')}")
            rate = (time.perf_counter() - started) / max(1, step.number - first_step)
            on_progress(FinetuneProgress("", step, num_steps, left_s=rate * (num_steps - step.number)))
            is_last = step.number % trainer.steps_per_epoch == 0  # saved after it was measured
            if not is_last and time.perf_counter() - saved_at > 60 * config.train.save_minutes:
                folder.save(trainer, best)
                saved_at = time.perf_counter()
        if (epoch + 1) % config.train.evaluate_epochs == 0 or epoch + 1 == config.train.epochs:
            best = folder.measure(trainer, best, _Context(data, start.source, initial, tuple(unusable)), on_progress)
            folder.save(trainer, best)
            saved_at = time.perf_counter()
    if not best.epoch or not Path(checkpoint_place(config.output.uri).uri).exists():
        best = folder.measure(trainer, Best(), _Context(data, start.source, initial, tuple(unusable)), on_progress)
        folder.save(trainer, best)
    return FinetuneSummary(
        checkpoint_place(config.output.uri).uri, best.figures, best.epoch, trainer.step, first_step, tuple(unusable),
        time.perf_counter() - started,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Best:
    """The best epoch so far.

    Attributes:
        epoch: 1-based; 0 before any was measured.
        figures: of it.
        unusable: images that could not be learned from, up to now.
    """

    epoch: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()

    def is_better_than(self, other: "Best") -> bool:
        """Tell which to keep: the higher AP, and without one the later."""
        if not other.epoch or not self.figures:
            return True
        return self.figures[BEST_FIGURE] > other.figures.get(BEST_FIGURE, -1.0)


@dataclass(frozen=True, slots=True)
class _Context:
    """What a measured network is described with: data, start, and the images that could not be learned from."""

    data: LabelledData
    source: str
    initial: Mapping[str, Tensor]
    unusable: tuple[str, ...]


class Folder:
    """The folder of results, on this machine."""

    def __init__(self, path: Path, config: FinetuneConfig, identity: Mapping[str, object]) -> None:
        self._path = path
        self._config = config
        self._binding = json.loads(json.dumps({**binding_settings(config), **identity}))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output.uri: {path} cannot be used: {error}") from None

    def resume(self, trainer: Trainer) -> Best:
        """Put the trainer where the last start was, if there was one.

        Raises:
            OutputError: if the folder's state is another job's, or damaged.
        """
        file = self._path / "last.pt"
        if not file.exists():
            return Best()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            settings, best = json.loads(state["settings"]), json.loads(state["best"])
        except Exception as error:
            raise OutputError(f"output.uri: {file} is damaged ({error}); remove it to start anew") from error
        different = [key for key, value in self._binding.items() if settings.get(key) != value]
        if different:
            key = different[0]
            raise OutputError(
                f"output.uri: {self._path} holds a fine-tuning with other settings ({key}: {settings.get(key)!r} "
                f"there, {self._binding[key]!r} now); choose another folder, or give the same settings to go on"
            )
        trainer.restore(state["trainer"])
        self._cut_log(trainer.step)
        return Best(best["epoch"], best["figures"], tuple(best["unusable"]))

    def save(self, trainer: Trainer, best: Best) -> None:
        """Write what a later start resumes from, so that a kill leaves the old state or the new; draw the curves."""
        content = {
            "trainer": trainer.state(),
            "settings": json.dumps(self._binding),
            "best": json.dumps({"epoch": best.epoch, "figures": dict(best.figures), "unusable": best.unusable}),
        }
        beside = self._path / ".last.pt.tmp"
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path / "last.pt")
        entries = self.read_log()
        picture = draw_curves(
            [entry for entry in entries if "losses" in entry],
            [entry for entry in entries if "figures" in entry],
            title=f"{self._config.network.name}, {trainer.step:,} steps",
        )
        (self._path / "curves.png").write_bytes(picture)

    def measure(
        self, trainer: Trainer, best: Best, context: "_Context", on_progress: Callable[[FinetuneProgress], None]
    ) -> Best:
        """Measure the network as it would be saved, and save it if it is the one to keep; return the best."""
        on_progress(FinetuneProgress("measuring"))
        saved = as_saved(trainer.measured, context.initial, self._config.output)
        validation = context.data.validation
        figures = measure(saved, validation, device=trainer.device) if validation else {}
        epoch = trainer.step // trainer.steps_per_epoch
        self._append({"step": trainer.step, "epoch": epoch, "figures": figures})
        on_progress(FinetuneProgress(figures=figures))
        now = Best(epoch, figures, context.unusable)
        if self._config.output.keep == "best" and not now.is_better_than(best):
            return Best(best.epoch, best.figures, now.unusable)
        trained = {
            "started_from": context.source,
            "epoch": now.epoch,
            "images": len(context.data.train),
            "figures": {name: round(value, 4) for name, value in now.figures.items()},
            "settings": self._binding,
            "versions": versions(),
        }
        save_network(
            saved,
            checkpoint_place(str(self._path)),
            architecture=self._config.network.name,
            metadata=metadata_of(context.data.categories, licence=self._config.network.licence, trained=trained),
            dtype=getattr(torch, self._config.output.dtype),
        )
        return now

    def log(self, step: Step) -> None:
        """Append a step."""
        losses = {name: round(value, 6) for name, value in step.losses.items()}
        self._append({"step": step.number, "epoch": step.epoch + 1, "rate": step.learning_rate, "losses": losses})

    def read_log(self) -> list[dict[str, Any]]:
        """Return what was logged; a line that a kill cut short is left out."""
        file = self._path / "log.jsonl"
        if not file.exists():
            return []
        entries = []
        for line in file.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return entries

    def _cut_log(self, step: int) -> None:
        """Drop what was logged after the state that is resumed from: those steps are taken again."""
        lines = [json.dumps(entry) for entry in self.read_log() if entry["step"] <= step]
        (self._path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self._path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _describe(data: LabelledData, source: str, num_fresh: int, device: str) -> str:
    instances = sum(len(image.annotations) for image in data.train)
    fresh = f", {num_fresh} tensors at random" if num_fresh else ""
    return (
        f"{len(data.train):,} images with {instances:,} instances of {', '.join(list(data.categories.values())[:5])}"
        f"{', ...' if len(data.categories) > 5 else ''}; starting from {source}{fresh}; on {device}"
    )
