"""Models behind one seam: `prepare`, `forward`, `decode`.

A segmenter turns upright RGB pixels into predictions. It never opens an image, never builds a full-size mask and
never writes RLE: that is the framework's. Only `forward` touches a device. The selection (thresholds, categories,
max_instances) is given when it is loaded, because a two-stage model must select before it computes masks.

To add a model: one module with a load function, one entry in `MODELS`, one test file.
"""

import difflib
import gc
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from segpipe.config import ModelConfig
from segpipe.detections import Frame, ModelInfo, Prediction, Selection, UInt8Array
from segpipe.errors import ConfigError
from segpipe.models.categories import find_category
from segpipe.records import Location

# What torch says in a plain RuntimeError when memory or device give up.
_MACHINE_FAULT = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUDA error|CUDNN|cuBLAS", re.IGNORECASE
)

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)

Pixels = TypeVar("Pixels")
Raw = TypeVar("Raw")


class Segmenter(Protocol[Pixels, Raw]):
    """A loaded model, in three parts that the framework can batch, time and test each.

    Attributes:
        batch_size: images of one padded shape that `forward` takes at once.
        resolved: what `auto` became here: device, dtype.
    """

    batch_size: int
    resolved: Mapping[str, str]

    def prepare(self, image: UInt8Array) -> tuple[Pixels, Frame]:
        """Turn (H, W, 3) uint8 RGB into what `forward` takes, on the host, and say how the image lies in it."""
        ...

    def forward(self, pixels: Sequence[Pixels], frames: Sequence[Frame]) -> Raw:
        """Run the network on images of one padded shape, on the device."""
        ...

    def decode(self, raw: Raw, frames: Sequence[Frame]) -> list[Prediction]:
        """Turn the network's output into one prediction an image, by falling score, in image pixels, on the host."""
        ...


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Everything that a worker needs to load a segmenter; resolved and checked by the driver.

    Attributes:
        info: what the model is.
        weights_location: checkpoint to read; None for weights by torchvision name, or without weights.
        selection: what to keep.
        dtype: `auto` or a torch dtype name.
        device: `auto`, `cpu`, `cuda` or `mps`.
        batch_size: None for `auto`.
    """

    info: ModelInfo
    weights_location: Location | None
    selection: Selection
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the registry.

    Attributes:
        summary: one line for `segpipe models`.
        module: module with `load(request) -> Segmenter`; imported only where the model is loaded.
        weight_files: weights by name, and the file each stands for; the first is what `DEFAULT` means.
        weights_note: what to know about the weights before using them.
        licence: of code and weights.
        architecture: the network's name where it is another than the entry's; what a checkpoint says of itself.
        is_network: False for a model without weights.
        is_bundled: True if the weights ship with the package.
    """

    summary: str
    module: str
    weight_files: Mapping[str, str] = field(default_factory=dict)
    weights_note: str = ""
    licence: str = "BSD-3-Clause (code); weights trained by torchvision on COCO"
    architecture: str = ""
    is_network: bool = True
    is_bundled: bool = False


DEFAULT_MODEL = "maskrcnn_resnet50_fpn_v2"

MODELS: Mapping[str, Model] = {
    "maskrcnn_resnet50_fpn_v2": Model(
        "Mask R-CNN, ResNet-50-FPN, improved recipe; 80 COCO categories, mask AP 41.8",
        "segpipe.models.maskrcnn",
        {"COCO_V1": "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"},
        "178 MB, downloaded by torchvision on first use",
    ),
    "maskrcnn_resnet50_fpn": Model(
        "Mask R-CNN, ResNet-50-FPN; 80 COCO categories, mask AP 34.6, faster",
        "segpipe.models.maskrcnn",
        {"COCO_V1": "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"},
        "170 MB, downloaded by torchvision on first use",
    ),
    "maskrcnn_mobilenet_v2_fpn": Model(
        "small Mask R-CNN, MobileNetV2-FPN, 3.4 M parameters, short side 320 px; to be fine-tuned",
        "segpipe.models.maskrcnn",
        weights_note="your own: see jobs/finetune.py",
        licence="Apache-2.0 (code)",
    ),
    "demo": Model(
        "small Mask R-CNN, MobileNetV2-FPN; person, animal, vehicle; weak, for demonstrations",
        "segpipe.models.maskrcnn",
        {"BUNDLED": "demo_maskrcnn.safetensors"},
        "7 MB, ships with the package",
        licence="Apache-2.0 (code); weights trained on COCO photographs, for demonstrations",
        architecture="maskrcnn_mobilenet_v2_fpn",
        is_bundled=True,
    ),
    "blank": Model(
        "no network: finds cells of strong colour; for tests and for measuring overhead",
        "segpipe.models.blank",
        weights_note="none",
        licence="Apache-2.0",
        is_network=False,
    ),
}


def find_model(name: str) -> Model:
    """Return the registry entry of a model.

    Raises:
        ConfigError: if there is none; names the nearest.
    """
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"model.name: unknown model {name!r}.{hint} Known models: {', '.join(MODELS)}")


def select(config: ModelConfig, categories: Mapping[int, str]) -> Selection:
    """Turn the user's thresholds and category names into a selection by id.

    Raises:
        ConfigError: if the model has no such category.
    """
    thresholds = {
        find_category(name, categories, key="model.category_thresholds"): threshold
        for name, threshold in config.category_thresholds.items()
    }
    wanted = [find_category(name, categories, key="model.categories") for name in config.categories]
    return Selection(
        score_threshold=config.score_threshold,
        category_thresholds=thresholds,
        category_ids=frozenset(wanted) if wanted else None,
        max_instances=config.max_instances,
        mask_threshold=config.mask_threshold,
    )


def load_segmenter(request: ModelRequest) -> Segmenter[Any, Any]:
    """Load a model in this process.

    Raises:
        WeightsError: if the weights cannot be read, or are not the ones that the run was planned with.
    """
    module = importlib.import_module(find_model(request.info.name).module)
    segmenter: Segmenter[Any, Any] = module.load(request)
    return segmenter


def pin_threads(model_name: str, threads: int) -> int:
    """Limit the CPU threads of a model's library in this process; return the limit before.

    Two libraries that each take every core stall each other: measured 10 times slower.
    """
    if not find_model(model_name).is_network:
        return threads
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    return before


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory, the host's or the device's, was too small for what a model was asked."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def release_memory() -> None:
    """Give back what the model's library keeps for later."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_machine_fault(error: BaseException) -> bool:
    """Tell whether an error of a model is the machine's fault (memory, device) and not the image's."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return True
    return isinstance(error, RuntimeError) and bool(_MACHINE_FAULT.search(str(error)))
