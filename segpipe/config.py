"""Every setting, checked before anything starts: four sections of one YAML file, two levels, no unknown keys.

Each key carries its own description with unit and range, and whether it changes rows; the fingerprint of a run is
made of exactly those that do. `configs/reference.yaml` is generated from this module.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from segpipe.errors import ConfigError
from segpipe.sections import Auto, Section, describe_sections, load_sections, setting

# Raised when the same settings would give other rows than an older segpipe gave: such runs must not be mixed.
RESULT_VERSION = 1

RUN_ID_PATTERN = r"^[a-z][a-z0-9._-]{0,99}$"
RunId = Annotated[str, StringConstraints(pattern=RUN_ID_PATTERN)]


class InputConfig(Section):
    """Where the photographs are and how they are read."""

    uri: str = setting(
        ...,
        "folder, glob, tar, Parquet file or manifest of images: a local path or any fsspec URI",
        changes_rows=True,
        min_length=1,
    )
    format: Literal["auto", "folder", "webdataset", "parquet", "manifest"] = setting(
        "auto", "kind of input; auto looks at the names", changes_rows=True
    )
    chunk_images: Auto | Annotated[int, Field(ge=1, le=100_000)] = setting(
        "auto", "images per chunk, the unit of work and commit; 1 to 100000; decided once for a run"
    )
    image_column: str = setting(
        "auto", "Parquet or manifest column with the image bytes or the image URI", changes_rows=True, min_length=1
    )
    key_column: str = setting(
        "auto",
        "Parquet column whose text becomes `key`; auto takes a usual name, else the position",
        changes_rows=True,
        min_length=1,
    )
    max_pixels: int = setting(
        200_000_000,
        "pixels; a larger image becomes a failed row before anything is allocated; 1 to 2e9",
        changes_rows=True,
        ge=1,
        le=2_000_000_000,
    )
    max_bytes: int = setting(
        1_000_000_000,
        "bytes; a larger encoded image becomes a failed row before it is read (in Parquet, after); 1 to 1e12",
        changes_rows=True,
        ge=1,
        le=1_000_000_000_000,
    )
    allowed_schemes: list[str] = setting(
        [],
        "schemes that the entries of a manifest may have, file for local paths; empty allows all to a local manifest, "
        "and all but file to a remote one",
    )
    allow_truncated: bool = setting(
        False, "decode what there is of an image that was cut short, instead of a failed row", changes_rows=True
    )
    storage_options: dict[str, Any] = setting(
        {}, "passed to the fsspec file system of the input (endpoint_url, profile, anon, ...)"
    )


class ModelConfig(Section):
    """Which network looks at the images and which of its detections are kept."""

    name: str = setting(
        "auto",
        "model name, see `segpipe models`; auto is what a checkpoint says of itself, else maskrcnn_resnet50_fpn_v2",
        changes_rows=True,
    )
    weights: str = setting(
        "DEFAULT",
        "torchvision name (COCO_V1, DEFAULT) or path or URI of a .pth or .safetensors checkpoint",
        changes_rows=True,
        min_length=1,
    )
    score_threshold: float = setting(
        0.05, "keep detections that score above it; 0 to 1; filter further in SQL", changes_rows=True, ge=0, le=1
    )
    category_thresholds: dict[str | int, Annotated[float, Field(ge=0, le=1)]] = setting(
        {}, "category name or id to its own score threshold, 0 to 1", changes_rows=True
    )
    categories: list[str | int] = setting(
        [], "keep only these category names or ids; empty keeps all; applied before max_instances", changes_rows=True
    )
    max_instances: int = setting(
        100, "instances kept per image, the best by score; 1 to 10000", changes_rows=True, ge=1, le=10_000
    )
    mask_threshold: float = setting(
        0.5, "a pixel belongs to a mask where its probability is above it; 0 to 1", changes_rows=True, ge=0, le=1
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = setting(
        "auto",
        "images of one padded shape per forward pass; 1 to 256; auto is 1 on a CPU, 4 on a GPU",
        changes_rows=True,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "arithmetic of the forward pass; auto is float32", changes_rows=True
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "auto takes cuda, then mps, then cpu")


class OutputConfig(Section):
    """Where the tables go."""

    uri: str = setting(..., "folder of the lake: a local path or any fsspec URI that can be written", min_length=1)
    run_id: Auto | RunId = setting(
        "auto",
        "name of the run: a to z, 0 to 9 and . _ -, a letter first; auto is the model and the fingerprint",
    )
    max_failed_share: float = setting(
        0.1, "the run ends as failed when a larger share of its images failed; 0 to 1", ge=0, le=1
    )
    storage_options: dict[str, Any] = setting(
        {}, "passed to the fsspec file system of the output (endpoint_url, profile, anon, ...)"
    )


class ResourcesConfig(Section):
    """Who does the work."""

    engine: Literal["ray", "inline"] = setting(
        "ray", "ray: actors, here or on a cluster; inline: a loop in this process"
    )
    ray_address: str = setting(
        "auto", "address of a Ray cluster; auto takes RAY_ADDRESS, else starts Ray here; local always starts it here"
    )
    num_actors: Auto | Annotated[int, Field(ge=1, le=100_000)] = setting(
        "auto", "models working at the same time under ray, at least 1; auto fills the GPUs, else the CPUs"
    )
    gpus_per_actor: Auto | Annotated[float, Field(ge=0, le=16)] = setting(
        "auto", "GPUs for each actor, may be a fraction below 1; auto is 1 where there are any"
    )
    max_image_seconds: float = setting(
        600.0,
        "seconds that decoding or segmenting one image may take; its worker is ended after them, and the image is "
        "tried once alone; 1 to 86400",
        ge=1,
        le=86_400,
    )
    max_image_memory_gb: float = setting(
        8.0,
        "GB that an image which killed its worker may take when it is tried once alone; 0.1 to 1024",
        ge=0.1,
        le=1024,
    )
    cpus_per_actor: Auto | Annotated[int, Field(ge=1, le=1024)] = setting(
        "auto", "threads for each actor; auto is 4, or all CPUs where there are fewer"
    )


class Config(Section):
    """A whole run: input, model, output, resources.

    Raises:
        pydantic.ValidationError: use `load_config` for readable errors.
    """

    input: InputConfig
    model: ModelConfig = ModelConfig()
    output: OutputConfig
    resources: ResourcesConfig = ResourcesConfig()


def load_config(file: str | Path | None = None, settings: Mapping[str, object] | None = None) -> Config:
    """Read a YAML file, lay single settings over it, and check everything.

    Args:
        file: YAML with the sections `input`, `model`, `output`, `resources`; None for none.
        settings: dotted key to value, for example `{"model.score_threshold": 0.5}`; win over the file.

    Raises:
        ConfigError: one line for each problem, naming the key, the value and what is allowed.
    """
    return load_sections(Config, file, settings)


def check_run_id(run_id: str) -> str:
    """Return a run's name if it is allowed.

    Raises:
        ConfigError: if it is not.
    """
    if not re.fullmatch(RUN_ID_PATTERN, run_id):
        raise ConfigError(
            f"--run: {run_id!r} is not allowed; a run is named with a to z, 0 to 9 and . _ -, a letter first"
        )
    return run_id


def row_settings(config: Config) -> dict[str, object]:
    """Return every setting that changes rows, by dotted key, as the user asked for it."""
    chosen: dict[str, object] = {}
    for section_name in Config.model_fields:
        section = getattr(config, section_name)
        for name, field in type(section).model_fields.items():
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["changes_rows"]:
                chosen[f"{section_name}.{name}"] = getattr(section, name)
    return chosen


def fingerprint(settings: Mapping[str, object]) -> str:
    """Return 64 hex digits that stand for the settings; equal settings give equal digits on any machine."""
    text = json.dumps({**settings, "result_version": RESULT_VERSION}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def reference_yaml() -> str:
    """Return the whole configuration with defaults and descriptions, as `configs/reference.yaml` holds it."""
    return describe_sections(
        Config,
        title="Every setting of segpipe with its default. Written by segpipe.config.reference_yaml().",
        examples={"input.uri": "photos/", "output.uri": "lake/"},
    )
