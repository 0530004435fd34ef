"""Weights: where they come from, what they hold, and whether they fit, before any model is loaded.

A checkpoint is a `.safetensors` file, or a torch file read with `weights_only=True`: neither can run code. Its
category names come from its metadata (`categories`: JSON of id to name), or from a JSON file beside it called
`<checkpoint>.categories.json`; a checkpoint with 91 classes and no names is taken for COCO's.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segpipe.config import ModelConfig
from segpipe.detections import ModelInfo
from segpipe.errors import WeightsError
from segpipe.models import DEFAULT_MODEL, MODELS, Model, ModelRequest, find_model, select
from segpipe.models.categories import (
    COCO_NAMES,
    COCO_NUM_CLASSES,
    COCO_SPACE,
    OWN_SPACE,
    coco_categories,
    contiguous_ids,
)
from segpipe.models.checkpoints import fetch, file_sha256, has_batch_norm, load_tensors, read_shapes
from segpipe.records import Location
from segpipe.storage import locate, read_bytes

if TYPE_CHECKING:
    import torch

_CLASS_COUNT_TENSOR = "roi_heads.box_predictor.cls_score.weight"


def resolve_model(config: ModelConfig, storage_options: Mapping[str, Any] | None = None) -> ModelRequest:
    """Find the model and its weights, check that they fit, and turn names into ids.

    Args:
        config: the `model` section.
        storage_options: for a checkpoint in an object store.

    Raises:
        ConfigError: if the model or a category is unknown.
        WeightsError: if the weights cannot be had, read, or do not fit the model.
    """
    config = _with_name(config, storage_options)
    model = find_model(config.name)
    location = None
    if not model.is_network:
        info = _info_without_weights(config)
    elif config.weights in ("DEFAULT", *model.weight_files):
        name = _default_weights(config.name, model) if config.weights == "DEFAULT" else config.weights
        info = _named_weights(config, model, name)
    else:
        _refuse_unknown_name(config, model)
        location = locate(config.weights, storage_options)
        info = _own_weights(config.name, location)
    return ModelRequest(
        info=info,
        weights_location=location,
        selection=select(config, info.categories),
        dtype=config.dtype,
        device=config.device,
        batch_size=None if config.batch_size == "auto" else config.batch_size,
    )


def read_state(request: ModelRequest) -> tuple[dict[str, "torch.Tensor"], Mapping[str, Any]]:
    """Return the checkpoint's tensors, floating point ones as float32, and what else it says.

    Raises:
        WeightsError: if it cannot be read, or its sha256 is not the planned one.
    """
    location, info = request.weights_location, request.info
    path = _named_path(info.name, info.weights) if location is None else fetch(location)
    found = file_sha256(path)
    if found != info.weights_sha256:
        raise WeightsError(
            f"model.weights: {info.weights} changed while the run was going on: "
            f"sha256 {found[:12]}, planned with {info.weights_sha256[:12]}; start the run again"
        )
    tensors, metadata = load_tensors(path)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return state, metadata


def _with_name(config: ModelConfig, storage_options: Mapping[str, Any] | None) -> ModelConfig:
    """Return the settings with the model that `auto` means: what the checkpoint says of itself, else the default.

    Raises:
        WeightsError: if the checkpoint says that it is of another architecture than the one that was asked for.
    """
    if "/" not in config.weights and "." not in config.weights:
        return config if config.name != "auto" else config.model_copy(update={"name": DEFAULT_MODEL})
    location = locate(config.weights, storage_options)
    stated = read_shapes(fetch(location))[1].get("architecture")
    stated = stated if stated in MODELS else None
    if config.name == "auto":
        return config.model_copy(update={"name": stated or DEFAULT_MODEL})
    asked = find_model(config.name).architecture or config.name
    if stated is not None and stated != asked:
        raise WeightsError(
            f"model.weights: {location.uri} says that it is a {stated}, asked for was {config.name}; leave --model out"
        )
    return config


def _info_without_weights(config: ModelConfig) -> ModelInfo:
    from segpipe.models.blank import CATEGORIES

    if config.weights != "DEFAULT":
        raise WeightsError(
            f"model.weights: the model {config.name!r} has no weights, got {config.weights!r}; leave it out"
        )
    return ModelInfo(config.name, CATEGORIES, OWN_SPACE, contiguous_ids(CATEGORIES), "", "", "Apache-2.0")


def _default_weights(name: str, model: Model) -> str:
    if not model.weight_files:
        raise WeightsError(f"model.weights: {name} has no weights of its own; give a checkpoint with --weights FILE")
    return next(iter(model.weight_files))


def _refuse_unknown_name(config: ModelConfig, model: Model) -> None:
    """Refuse what looks like the name of weights but is none; anything with a dot or a slash is a file."""
    if "/" not in config.weights and "." not in config.weights:
        raise WeightsError(
            f"model.weights: {config.name} has no weights called {config.weights!r}. "
            f"Known: DEFAULT, {', '.join(model.weight_files)}, or the path or URI of a .pth or .safetensors file"
        )


def _named_weights(config: ModelConfig, model: Model, weights: str) -> ModelInfo:
    """Return what is known of weights that go by a name."""
    path = _named_path(config.name, weights)
    if model.is_bundled:
        _, metadata = read_shapes(path)
        categories, space = {int(key): str(name) for key, name in json.loads(metadata["categories"]).items()}, OWN_SPACE
        ids = contiguous_ids(categories)
    else:
        categories, space, ids = coco_categories(), COCO_SPACE, contiguous_ids(COCO_NAMES)
    return ModelInfo(config.name, categories, space, ids, weights, file_sha256(path), model.licence)


def _named_path(model_name: str, weights: str) -> Path:
    """Return the local file of weights that go by a name, downloaded by torchvision if it is not there yet."""
    model = find_model(model_name)
    if model.is_bundled:
        return Path(str(resources.files("segpipe") / "assets" / model.weight_files[weights]))
    import torch
    from torchvision.models import get_model_weights

    path = Path(torch.hub.get_dir()) / "checkpoints" / model.weight_files[weights]
    if not path.exists():
        chosen = get_model_weights(model_name)[weights]
        try:
            chosen.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"model.weights: {weights} could not be downloaded from {chosen.url} ({error}); "
                f"give a file with --weights FILE.pth, or put it at {path}"
            ) from None
    return path


def _own_weights(model_name: str, location: Location) -> ModelInfo:
    path = fetch(location)
    shapes, metadata = read_shapes(path)
    if _CLASS_COUNT_TENSOR not in shapes:
        raise WeightsError(
            f"model.weights: {location.uri} is no Mask R-CNN checkpoint of torchvision: "
            f"it has no {_CLASS_COUNT_TENSOR}; "
            f"its first tensor is {next(iter(shapes), 'none')}"
        )
    num_classes = shapes[_CLASS_COUNT_TENSOR][0]
    categories, space = _categories_of(location, metadata, num_classes)
    _check_fit(model_name, location, shapes, num_classes)
    ids = contiguous_ids(COCO_NAMES if space == COCO_SPACE else categories)
    licence = str(metadata.get("licence") or metadata.get("license") or "not stated in the checkpoint")
    return ModelInfo(model_name, categories, space, ids, location.uri, file_sha256(path), licence)


def _categories_of(location: Location, metadata: Mapping[str, Any], num_classes: int) -> tuple[dict[int, str], str]:
    """Return the category names of a checkpoint and their space.

    Raises:
        WeightsError: if there are none for these classes, or their number does not fit.
    """
    source, raw = f"the metadata of {location.uri}", metadata.get("categories")
    beside = location.parent / f"{location.name}.categories.json"
    if raw is None:
        try:
            source, raw = beside.uri, read_bytes(beside).decode("utf-8")
        except FileNotFoundError:
            if num_classes == COCO_NUM_CLASSES:
                return coco_categories(), COCO_SPACE
            raise WeightsError(
                f"model.weights: {location.uri} has {num_classes} classes (background included) and names none; write "
                f'{beside.uri} with {{"1": "first name", ...}} for ids 1 to {num_classes - 1}'
            ) from None
    try:
        parsed = json.loads(raw) if isinstance(raw, str) else raw
        categories = {int(category_id): str(name) for category_id, name in sorted(dict(parsed).items(), key=_by_number)}
    except (ValueError, TypeError):
        raise WeightsError(f'model.weights: {source} must hold JSON such as {{"1": "cat", "2": "dog"}}') from None
    if sorted(categories) != list(range(1, num_classes)):
        raise WeightsError(
            f"model.weights: {location.uri} has {num_classes} classes (background included), so {source} "
            f"must name the ids 1 to {num_classes - 1}; it names {len(categories)}: {sorted(categories)[:10]}"
        )
    return categories, OWN_SPACE


def _by_number(item: tuple[Any, Any]) -> int:
    return int(item[0])


def _check_fit(model_name: str, location: Location, shapes: Mapping[str, tuple[int, ...]], num_classes: int) -> None:
    """Compare names and shapes with the network, built without memory for its weights.

    Raises:
        WeightsError: if they are another architecture's.
    """
    from segpipe.models.networks import expected_shapes

    expected = expected_shapes(model_name, num_classes, batch_norm=has_batch_norm(shapes))
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    different = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if not (missing or unexpected or different):
        return
    example = (
        f"{different[0]} is {shapes[different[0]]}, the model has {expected[different[0]]}"
        if different
        else f"{(missing or unexpected)[0]} is {'missing' if missing else 'not in the model'}"
    )
    raise WeightsError(
        f"model.weights: {location.uri} does not fit {model_name}: {len(missing)} tensors missing, "
        f"{len(unexpected)} unexpected, {len(different)} of another shape (for example {example}); "
        f"choose the model that it was trained as with --model"
    )
