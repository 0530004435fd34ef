"""The steps of a fine-tuning: optimiser, learning rate, mixed precision, averaging, and a state to resume from.

The recipe is that of torchvision's references/detection: the sum of the five losses
L = L_cls + L_box + L_mask (+ the two of the region proposals), gradients clipped, warm-up, then steps or a cosine.
All randomness of a step is a function of the seed and the step, so that a resumed job takes the same steps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

from segpipe.errors import SegpipeError
from segpipe.finetuning.dataset import EpochBatches, Sample, TrainingSet, keep_list, mix
from segpipe.finetuning.settings import TrainConfig

_WARMUP_FACTOR = 1e-3
_WARMUP_STEPS = 1000

# torchvision's names of the losses, and those of the paper: L = L_cls + L_box + L_mask, and two of the proposals.
LOSSES: Mapping[str, str] = {
    "loss_classifier": "L_cls",
    "loss_box_reg": "L_box",
    "loss_mask": "L_mask",
    "loss_objectness": "L_rpn_cls",
    "loss_rpn_box_reg": "L_rpn_box",
}


class DivergedError(SegpipeError):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step that was taken.

    Attributes:
        number: from 1, over the whole job.
        epoch: 0-based.
        losses: by name, `L` is their sum; empty if none of the step's images could be used.
        learning_rate: of this step.
        problems: images that could not be used, and why.
    """

    number: int
    epoch: int
    losses: Mapping[str, float]
    learning_rate: float
    problems: tuple[str, ...]


class Trainer:
    """A network on its way, and everything that is needed to go on with it after a kill."""

    def __init__(self, model: MaskRCNN, data: TrainingSet, config: TrainConfig, *, device: str) -> None:
        self._config = config
        self._data = data
        self.device = device
        self.model = model.to(device)
        self.average = _averaged(self.model, config.average_decay)
        self.steps_per_epoch = -(-len(data) // config.batch_size)
        asked = config.warmup_steps
        self._warmup_steps = min(_WARMUP_STEPS, self.steps_per_epoch - 1) if asked == "auto" else asked
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._parameters = parameters
        self._optimizer = _optimizer(parameters, config)
        self._dtype = choose_precision(config.precision, device)
        self._scaler = torch.amp.GradScaler(device, enabled=self._dtype == torch.float16)
        self.step = 0

    @property
    def measured(self) -> MaskRCNN:
        """Return the network that is measured and saved: the average where there is one."""
        network = self.model if self.average is None else self.average.module
        if not isinstance(network, MaskRCNN):
            raise TypeError(f"an average of {type(network)}")
        return network

    def steps(self, epoch: int) -> Iterator[Step]:
        """Take what is left of an epoch's steps."""
        self.model.train()
        first = self.step - epoch * self.steps_per_epoch
        batches = EpochBatches(len(self._data), self._config.batch_size, epoch, first, self._config.seed)
        loader: DataLoader[Any] = DataLoader(
            self._data,
            batch_sampler=batches,
            num_workers=self._config.num_workers,
            collate_fn=keep_list,
            pin_memory=self.device == "cuda",
        )
        for samples in loader:
            yield self._take(epoch, samples)

    def state(self) -> dict[str, Any]:
        """Return everything that changes from step to step."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step = int(state["step"])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _take(self, epoch: int, samples: Sequence[Sample]) -> Step:
        rate = self._config.learning_rate * self._factor(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        problems = tuple(sample.problem for sample in samples if sample.problem is not None)
        usable = [sample for sample in samples if sample.problem is None]
        losses: dict[str, float] = {}
        if usable:
            torch.manual_seed(mix(self._config.seed, self.step))  # proposals and RoIs are sampled at random
            losses = self._learn(usable)
        self.step += 1
        return Step(self.step, epoch, losses, rate, problems)

    def _learn(self, samples: Sequence[Sample]) -> dict[str, float]:
        images = [sample.image.to(self.device, non_blocking=True) for sample in samples]
        targets = [
            {key: value.to(self.device, non_blocking=True) for key, value in sample.target.items()}
            for sample in samples
        ]
        with torch.autocast(self.device, dtype=self._dtype, enabled=self._dtype != torch.float32):
            parts: dict[str, Tensor] = self.model(images, targets)
            total = torch.stack([part.float() for part in parts.values()]).sum()
        found = {LOSSES[name]: float(part.detach()) for name, part in parts.items()}
        found["L"] = float(total.detach())
        if not math.isfinite(found["L"]):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {found['L']} ({found}); lower train.learning_rate, or raise "
                f"train.warmup_steps"
            )
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self._config.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return found

    def _factor(self, step: int) -> float:
        """Return what the learning rate is multiplied by at a step, 0-based."""
        config = self._config
        warmup = self._warmup_steps
        if step < warmup:
            return _WARMUP_FACTOR + (1 - _WARMUP_FACTOR) * step / warmup
        if config.schedule == "cosine":
            total = max(1, config.epochs * self.steps_per_epoch - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / total)))
        passed = sum(step >= milestone * self.steps_per_epoch for milestone in config.milestones)
        return float(config.gamma**passed)


def choose_precision(asked: str, device: str) -> torch.dtype:
    """Return the dtype of the forward pass that `auto` means on a device."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _averaged(model: MaskRCNN, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]  # the same


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
