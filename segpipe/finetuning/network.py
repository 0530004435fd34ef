"""The network of a fine-tuning: what it starts from, and how it is saved as one file that explains itself."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from segpipe.config import ModelConfig
from segpipe.errors import ConfigError, WeightsError
from segpipe.finetuning.settings import FinetuneOutputConfig, NetworkConfig
from segpipe.models.checkpoints import has_batch_norm
from segpipe.models.networks import BUILDERS, apply_preprocessing, preprocessing_of
from segpipe.models.weights import read_state, resolve_model
from segpipe.records import Location
from segpipe.storage import locate, write_bytes

# torchvision's name of a network's backbone, and which of its ImageNet weights to start from.
_BACKBONES = {
    "maskrcnn_resnet50_fpn": ("resnet50", "IMAGENET1K_V1"),
    "maskrcnn_resnet50_fpn_v2": ("resnet50", "IMAGENET1K_V2"),
    "maskrcnn_mobilenet_v2_fpn": ("mobilenet_v2", "IMAGENET1K_V1"),
}
# The first parameters of each stage of the two backbones, in their order.
_STAGES = {
    "resnet50": (("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",)),
    "mobilenet_v2": tuple(
        tuple(f"{index}." for index in range(first, last))
        for first, last in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 19))
    ),
}


@dataclass(frozen=True, slots=True)
class Start:
    """What a network starts from.

    Attributes:
        model: with its weights, on the CPU.
        source: what they are, for people: a name, a file and its sha256.
        fresh: names of the tensors that start at random, because the source has none or none of this shape.
    """

    model: MaskRCNN
    source: str
    fresh: tuple[str, ...]


def build_network(config: NetworkConfig, categories: Mapping[int, str]) -> Start:
    """Build the network for some categories and give it the weights that it starts from.

    Args:
        config: the `network` section.
        categories: label to name, 1 and up.

    Raises:
        WeightsError: if the weights cannot be had or are another network's.
        ConfigError: if the smaller side is set above the larger.
    """
    state, source, preprocessing = _initial_state(config)
    # Only v1 and the small network have a choice: frozen statistics, unless the start was trained with live ones.
    model = BUILDERS[config.name](max(categories) + 1, batch_norm=has_batch_norm(state))
    apply_preprocessing(model, preprocessing)
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if state and not fitting:
        raise WeightsError(f"network.weights: {source} has no tensor of {config.name}; is it another network's?")
    model.load_state_dict(fitting, strict=False)
    _resize(model, config)
    _freeze(model, config)
    return Start(model, source, tuple(name for name in own if name not in fitting))


def as_saved(model: MaskRCNN, start: Mapping[str, Tensor], config: FinetuneOutputConfig) -> MaskRCNN:
    """Return the network that is measured and saved: a copy with its share of the start, and its own resize rule.

    Args:
        model: as trained.
        start: its tensors before the first step.
        config: the `output` section.
    """
    saved = copy.deepcopy(model)
    if config.start_share:
        mixed = {
            name: torch.lerp(tensor, start[name].to(tensor), config.start_share)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in saved.state_dict().items()
        }
        saved.load_state_dict(mixed)
    if config.dtype == "float16":  # measured as it is read back
        rounded = {
            name: one.half().float() if one.is_floating_point() else one for name, one in saved.state_dict().items()
        }
        saved.load_state_dict(rounded)
    if config.min_size != "auto":
        saved.transform.min_size = (config.min_size,)
    if config.max_size != "auto":
        saved.transform.max_size = config.max_size
    return saved


def save_network(
    model: MaskRCNN, place: Location, *, architecture: str, metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write one safetensors file that `segpipe run --weights` needs nothing else for.

    Args:
        model: to be saved; its resize rule goes into the file.
        place: of the file.
        architecture: name in the model registry.
        metadata: `categories` (JSON of id to name), `licence`, and whatever a reader should know.
        dtype: of floating point numbers in the file.
    """
    tensors: dict[str, Tensor] = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    everything = {**metadata, "architecture": architecture, "preprocessing": preprocessing_of(model)}
    write_bytes(place, save(tensors, everything))


def metadata_of(categories: Mapping[int, str], *, licence: str, trained: Mapping[str, object]) -> dict[str, str]:
    """Return what a checkpoint says of itself beside its architecture."""
    return {
        "categories": json.dumps({str(index): name for index, name in categories.items()}),
        "licence": licence,
        "trained": json.dumps(dict(trained), sort_keys=True),
    }


def _initial_state(config: NetworkConfig) -> tuple[dict[str, Tensor], str, str | None]:
    """Return the tensors to start from, what they are in words, and the checkpoint's resize rule if it has one."""
    if config.weights == "NONE":
        return {}, "nothing", None
    if config.weights == "BACKBONE":
        return (*_backbone_state(config.name), None)
    request = resolve_model(ModelConfig(name=config.name, weights=config.weights))
    state, metadata = read_state(request)
    return state, f"{request.info.weights} (sha256 {request.info.weights_sha256[:12]})", metadata.get("preprocessing")


def _backbone_state(name: str) -> tuple[dict[str, Tensor], str]:
    backbone, weights = _BACKBONES[name]
    chosen = torchvision.models.get_model_weights(backbone)[weights]
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"network.weights: BACKBONE could not be downloaded from {chosen.url} ({error}); put the file into {folder}"
        ) from None
    kept = {f"backbone.body.{key.removeprefix('features.')}": value for key, value in state.items()}
    if name != "maskrcnn_resnet50_fpn_v2":  # the others keep the statistics frozen, and have no count of batches
        kept = {key: value for key, value in kept.items() if not key.endswith("num_batches_tracked")}
    return kept, f"{backbone} {weights}"


def _resize(model: MaskRCNN, config: NetworkConfig) -> None:
    transform = model.transform
    if config.min_size != "auto":
        transform.min_size = (config.min_size,)
    if config.max_size != "auto":
        transform.max_size = config.max_size
    if transform.min_size[-1] > transform.max_size:
        raise ConfigError(
            f"network.min_size: {transform.min_size[-1]} px is more than network.max_size, {transform.max_size} px"
        )


def _freeze(model: MaskRCNN, config: NetworkConfig) -> None:
    frozen = tuple(prefix for stage in _STAGES[_BACKBONES[config.name][0]][: config.frozen_stages] for prefix in stage)
    for name, parameter in model.backbone.body.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(requires_grad=False)


def checkpoint_place(folder: str) -> Location:
    """Return where the best network of a job is written."""
    return locate(folder) / "best.safetensors"
