"""Every setting, checked before anything starts: four sections of one YAML file, two levels, no unknown keys.

Each key carries its own description with unit and range, and whether it changes rows; the fingerprint of a run is
made of exactly those that do. `configs/reference.yaml` is generated from this module.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from segpipe.errors import ConfigError

# Raised when the same settings would give other rows than an older segpipe gave: such runs must not be mixed.
RESULT_VERSION = 1

Auto = Literal["auto"]
RUN_ID_PATTERN = r"^[a-z][a-z0-9._-]{0,99}$"
RunId = Annotated[str, StringConstraints(pattern=RUN_ID_PATTERN)]


def _key(default: Any, description: str, *, changes_rows: bool = False, **bounds: Any) -> Any:
    """Declare one setting: default, what it means, and whether another value gives other rows."""
    return Field(default, description=description, json_schema_extra={"changes_rows": changes_rows}, **bounds)


class Section(BaseModel):
    """A section of the configuration: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputConfig(Section):
    """Where the photographs are and how they are read."""

    uri: str = _key(
        ...,
        "folder, glob, tar, Parquet file or manifest of images: a local path or any fsspec URI",
        changes_rows=True,
        min_length=1,
    )
    format: Literal["auto", "folder", "webdataset", "parquet", "manifest"] = _key(
        "auto", "kind of input; auto looks at the names", changes_rows=True
    )
    chunk_images: Auto | Annotated[int, Field(ge=1, le=100_000)] = _key(
        "auto", "images per chunk, the unit of work and commit; 1 to 100000; decided once for a run"
    )
    image_column: str = _key(
        "auto", "Parquet or manifest column with the image bytes or the image URI", changes_rows=True, min_length=1
    )
    key_column: str = _key(
        "auto",
        "Parquet column whose text becomes `key`; auto takes a usual name, else the position",
        changes_rows=True,
        min_length=1,
    )
    max_pixels: int = _key(
        200_000_000,
        "pixels; a larger image becomes a failed row before anything is allocated; 1 to 2e9",
        changes_rows=True,
        ge=1,
        le=2_000_000_000,
    )
    allow_truncated: bool = _key(
        False, "decode what there is of an image that was cut short, instead of a failed row", changes_rows=True
    )
    storage_options: dict[str, Any] = _key(
        {}, "passed to the fsspec file system of the input (endpoint_url, profile, anon, ...)"
    )


class ModelConfig(Section):
    """Which network looks at the images and which of its detections are kept."""

    name: str = _key("maskrcnn_resnet50_fpn_v2", "model name, see `segpipe models`", changes_rows=True)
    weights: str = _key(
        "DEFAULT",
        "torchvision name (COCO_V1, DEFAULT) or path or URI of a .pth or .safetensors checkpoint",
        changes_rows=True,
        min_length=1,
    )
    score_threshold: float = _key(
        0.05, "keep detections that score above it; 0 to 1; filter further in SQL", changes_rows=True, ge=0, le=1
    )
    category_thresholds: dict[str | int, Annotated[float, Field(ge=0, le=1)]] = _key(
        {}, "category name or id to its own score threshold, 0 to 1", changes_rows=True
    )
    categories: list[str | int] = _key(
        [], "keep only these category names or ids; empty keeps all; applied before max_instances", changes_rows=True
    )
    max_instances: int = _key(
        100, "instances kept per image, the best by score; 1 to 10000", changes_rows=True, ge=1, le=10_000
    )
    mask_threshold: float = _key(
        0.5, "a pixel belongs to a mask where its probability is above it; 0 to 1", changes_rows=True, ge=0, le=1
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = _key(
        "auto",
        "images of one padded shape per forward pass; 1 to 256; auto is 1 on a CPU, 4 on a GPU",
        changes_rows=True,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "auto", "arithmetic of the forward pass; auto is float32", changes_rows=True
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = _key("auto", "auto takes cuda, then mps, then cpu")


class OutputConfig(Section):
    """Where the tables go."""

    uri: str = _key(..., "folder of the lake: a local path or any fsspec URI that can be written", min_length=1)
    run_id: Auto | RunId = _key(
        "auto",
        "name of the run: a to z, 0 to 9 and . _ -, a letter first; auto is the model and the fingerprint",
    )
    max_failed_share: float = _key(
        0.1, "the run ends as failed when a larger share of its images failed; 0 to 1", ge=0, le=1
    )
    storage_options: dict[str, Any] = _key(
        {}, "passed to the fsspec file system of the output (endpoint_url, profile, anon, ...)"
    )


class ResourcesConfig(Section):
    """Who does the work."""

    engine: Literal["ray", "inline"] = _key("ray", "ray: actors, here or on a cluster; inline: a loop in this process")
    ray_address: str = _key(
        "auto", "address of a Ray cluster; auto takes RAY_ADDRESS, else starts Ray here; local always starts it here"
    )
    num_actors: Auto | Annotated[int, Field(ge=1, le=100_000)] = _key(
        "auto", "models working at the same time under ray, at least 1; auto fills the GPUs, else the CPUs"
    )
    gpus_per_actor: Auto | Annotated[float, Field(ge=0, le=16)] = _key(
        "auto", "GPUs for each actor, may be a fraction below 1; auto is 1 where there are any"
    )
    cpus_per_actor: Auto | Annotated[int, Field(ge=1, le=1024)] = _key(
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
    tree = _read_yaml(Path(file)) if file is not None else {}
    for key, value in (settings or {}).items():
        section, _, name = key.partition(".")
        if not name:
            raise ConfigError(f"{key}: a setting is written section.key, for example model.score_threshold=0.5")
        branch = tree.setdefault(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"{section}: must be a section with keys, got {branch!r}")
        branch[name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = {_explain(problem): None for problem in error.errors()}  # a union reports each member's view
        raise ConfigError("\n".join(problems)) from None


def parse_assignment(text: str) -> tuple[str, object]:
    """Split `section.key=value` and read the value as YAML, so that `0.5`, `true` and `[person]` get their types.

    Raises:
        ConfigError: if there is no `=`, or the value is no YAML.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: write it as section.key=value, for example model.score_threshold=0.5")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is no YAML ({_first_line(error)})") from None


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
    examples = {"input.uri": "photos/", "output.uri": "lake/"}
    lines = ["# Every setting of segpipe with its default. Written by segpipe.config.reference_yaml().", ""]
    for section_name, section in Config.model_fields.items():
        section_type = section.annotation
        if not (isinstance(section_type, type) and issubclass(section_type, Section)):
            raise TypeError(f"section {section_name} is no Section")
        lines.append(f"# {(section_type.__doc__ or '').strip()}")
        lines.append(f"{section_name}:")
        for name, field in section_type.model_fields.items():
            value = examples.get(f"{section_name}.{name}", field.default)
            lines.append(f"  # {field.description}")
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {name}: {text}")
        lines.append("")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: no valid YAML ({_first_line(error)})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold the sections {', '.join(Config.model_fields)}, got {tree!r}")
    return tree


def _explain(problem: Mapping[str, Any]) -> str:
    """Turn one pydantic problem into one line: key, value, what is allowed."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location[:2])
    section = Config.model_fields.get(location[0])
    fields = getattr(section.annotation, "model_fields", {}) if section else {}
    if problem["type"] == "extra_forbidden":
        known = list(fields) if section else list(Config.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"{'.'.join(location)}: unknown {'key' if section else 'section'}.{hint} Known: {', '.join(known)}."
    field = fields.get(location[1]) if len(location) > 1 else None
    allowed = f" Allowed: {field.description}." if field is not None and field.description else ""
    if problem["type"] == "missing":
        option = {"input": "--input", "output": "--output"}.get(location[0], "--set")
        return f"{key}: is missing; give it in the file or with {option}.{allowed}"
    return f"{key}: {problem['input']!r} is not allowed.{allowed}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
