"""Every setting of a fine-tuning, checked before anything starts: five sections of one YAML file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from segpipe.coco.annotations import GroupBy
from segpipe.errors import ConfigError
from segpipe.sections import Auto, Section, describe_sections, load_sections, setting

# What marks a run's checkpoint as incompatible with another start: everything but where, how long and how watched.
_FREE_KEYS = frozenset({
    "network.licence", "output.uri", "train.epochs", "train.num_workers", "train.device", "train.threads",
    "train.save_minutes",
})  # fmt: skip


class DatasetConfig(Section):
    """One COCO dataset: an annotations file and the images that it names."""

    annotations: str = Field(min_length=1)
    images: str = "auto"
    only: str | None = None


class DataConfig(Section):
    """What to learn from, and what to measure with."""

    train: list[DatasetConfig] = setting(
        ...,
        "datasets to learn from: annotations (path or URI of a COCO JSON file), images (folder; auto is `images` "
        "beside the file), only (JSON file of file names to use, FILE#key for one list of an object; none uses all)",
        min_length=1,
    )
    validation: list[DatasetConfig] = setting(
        [], "datasets to measure with after an epoch, of the same form; may be none"
    )
    group_by: GroupBy = setting("category", "learn the categories, or their supercategories")
    categories: list[str] = setting(
        [], "names to learn, in this order; empty takes all, in the order of the first file"
    )
    keep_empty: bool = setting(True, "learn also from images without any of the categories: they teach what is none")


class NetworkConfig(Section):
    """Which network, and what it starts from."""

    name: Literal["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "maskrcnn_mobilenet_v2_fpn"] = setting(
        "maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2 or maskrcnn_mobilenet_v2_fpn"
    )
    weights: str = setting(
        "DEFAULT",
        "start from: DEFAULT (torchvision's, on COCO), BACKBONE (a backbone that knows ImageNet), NONE, or the path or "
        "URI of a checkpoint; heads that have another number of categories start anew",
        min_length=1,
    )
    min_size: Auto | Annotated[int, Field(ge=32, le=4096)] = setting(
        "auto", "px; short side that images are resized to; 32 to 4096; auto is the network's own"
    )
    max_size: Auto | Annotated[int, Field(ge=32, le=8192)] = setting(
        "auto", "px; no longer side than this; 32 to 8192; auto is the network's own"
    )
    frozen_stages: int = setting(0, "first stages of the backbone that do not learn; 0 to 5", ge=0, le=5)
    licence: str = setting("not stated", "what a user of the checkpoint must know of data and licences; stored in it")


class TrainConfig(Section):
    """How the network learns."""

    epochs: int = setting(26, "times through the data; 1 to 100000", ge=1, le=100_000)
    batch_size: int = setting(2, "images a step; 1 to 1024", ge=1, le=1024)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "sgd (with momentum) or adamw")
    learning_rate: float = setting(
        0.0025, "of a step, after the warm-up; torchvision's 0.02 is for 16 images a step; above 0, to 10", gt=0, le=10
    )
    momentum: float = setting(0.9, "how much of the last step sgd keeps; 0 to 1", ge=0, lt=1)
    weight_decay: float = setting(1e-4, "pulls weights to zero; 0 to 1", ge=0, le=1)
    warmup_steps: Auto | Annotated[int, Field(ge=0)] = setting(
        "auto",
        "steps in which the learning rate rises from a thousandth; 0 or more; auto is 1000, or the first epoch if less",
    )
    schedule: Literal["steps", "cosine"] = setting(
        "steps", "after the warm-up: steps (at the milestones), or cosine to 0"
    )
    milestones: list[int] = setting([16, 22], "epochs after which the learning rate is multiplied by gamma")
    gamma: float = setting(0.1, "factor at a milestone; above 0, to 1", gt=0, le=1)
    clip_norm: float = setting(10.0, "gradients are scaled down to this norm; 0 does not clip", ge=0)
    average_decay: float = setting(
        0.0,
        "moving average of the weights, which is measured and saved instead; 0 for none, to 0.9999",
        ge=0,
        le=0.9999,
    )
    evaluate_epochs: int = setting(1, "measure after each so many epochs, and after the last; 1 or more", ge=1)
    save_minutes: float = setting(5.0, "save the state that a killed job resumes from at least this often", gt=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the forward pass; auto is mixed precision on a GPU (bfloat16 where it has it), float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto takes cuda, then mps, then cpu")
    threads: Auto | Annotated[int, Field(ge=1, le=1024)] = setting(
        "auto", "CPU threads of the network; 1 to 1024; auto is all"
    )
    num_workers: int = setting(0, "processes that load and vary images; 0 to 256; 0 for this one", ge=0, le=256)
    seed: int = setting(0, "the same seed, settings and machine give the same losses; 0 or more", ge=0)


class AugmentationConfig(Section):
    """How images are varied while learning."""

    flip: float = setting(0.5, "share of images that are mirrored; 0 to 1", ge=0, le=1)
    scale: list[Annotated[float, Field(gt=0, le=16)]] = setting(
        [],
        "two numbers, least and largest: scale jitter around the size at which the image fits the crop; above 1 zooms "
        "in; empty leaves images whole",
        max_length=2,
    )
    crop_size: Annotated[int, Field(ge=32, le=4096)] = setting(
        512, "px; side of the square that is cut after the scale jitter, and filled up with grey; 32 to 4096"
    )
    photometric: float = setting(0.0, "share of images whose brightness, contrast, hue are varied; 0 to 1", ge=0, le=1)
    min_visible: float = setting(
        0.1, "share of an instance's pixels that a crop must leave for it to be learned; 0 to 1", ge=0, le=1
    )


class FinetuneOutputConfig(Section):
    """Where the results go."""

    uri: str = setting(..., "folder on this machine: best.safetensors, last.pt, log.jsonl, curves.png", min_length=1)
    keep: Literal["best", "last"] = setting(
        "best", "network to keep: best (by segm AP on the validation data) or last (validation data only measures)"
    )
    start_share: float = setting(
        0.0,
        "share of the weights that it started from in the network that is measured and saved: some of it keeps what "
        "a small dataset would make it forget (WiSE-FT, Wortsman et al. 2022); 0 to 1",
        ge=0,
        le=1,
    )
    min_size: Auto | Annotated[int, Field(ge=32, le=4096)] = setting(
        "auto", "px; short side in the network that is measured and saved; 32 to 4096; auto is network.min_size"
    )
    max_size: Auto | Annotated[int, Field(ge=32, le=8192)] = setting(
        "auto", "px; longest side in it; 32 to 8192; auto is network.max_size"
    )
    dtype: Literal["float32", "float16"] = setting(
        "float32", "of the numbers in best.safetensors; float16 is half the size"
    )


class FinetuneConfig(Section):
    """Everything that a fine-tuning is told."""

    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    output: FinetuneOutputConfig


def load_finetune_config(file: str | Path | None = None, settings: dict[str, object] | None = None) -> FinetuneConfig:
    """Read a YAML file, lay single settings over it, and check everything.

    Args:
        file: YAML with the sections `data`, `network`, `train`, `augmentation`, `output`; None for none.
        settings: dotted key to value, for example `{"train.epochs": 12}`; win over the file.

    Raises:
        ConfigError: one line for each problem, naming the key, the value and what is allowed.
    """
    config = load_sections(FinetuneConfig, file, settings)
    scale = config.augmentation.scale
    if len(scale) == 1 or (len(scale) == 2 and scale[0] > scale[1]):
        raise ConfigError(
            f"augmentation.scale: {scale} is not allowed; give the least and the largest, such as [0.5, 2.0]"
        )
    return config


def binding_settings(config: FinetuneConfig) -> dict[str, object]:
    """Return every setting that a resumed job must share with the one that it goes on from."""
    flat = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
    return {key: value for key, value in flat.items() if key not in _FREE_KEYS}


def finetune_reference_yaml() -> str:
    """Return the whole configuration with defaults and descriptions, as `configs/finetune.yaml` holds it."""
    return describe_sections(
        FinetuneConfig,
        title="Every setting of a fine-tuning with its default. Written by segpipe.finetuning.settings.",
        examples={"data.train": [{"annotations": "train/instances.json"}], "output.uri": "finetuned/"},
    )
