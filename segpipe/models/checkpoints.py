"""Checkpoint files: fetched once, hashed, and read without running any code in them.

`.safetensors`, or a torch file read with `weights_only=True`. Knows tensors and metadata, not what they are for.
"""

import hashlib
import os
import pickle
import struct
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segpipe.errors import StoreError, WeightsError
from segpipe.listing import list_files
from segpipe.records import Location
from segpipe.storage import open_stream

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 1 << 22


def fetch(location: Location) -> Path:
    """Return a local file with the content of a location; a remote one is copied to the cache once a version.

    Raises:
        WeightsError: if there is none, or it cannot be read.
    """
    try:
        if location.is_local:
            if not Path(location.uri).is_file():
                raise FileNotFoundError(location.uri)
            return Path(location.uri)
        version = list_files(location)[0].version
        digest = hashlib.sha256(f"{location.uri}\n{version}".encode()).hexdigest()[:32]
        target = _cache_folder() / f"{digest}-{location.name}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            with open_stream(location) as stream, beside.open("wb") as file:
                while block := stream.read(_COPY_BYTES):
                    file.write(block)
            beside.replace(target)
    except FileNotFoundError:
        raise WeightsError(f"model.weights: there is no file at {location.uri}") from None
    except (StoreError, OSError) as error:
        raise WeightsError(f"model.weights: cannot be read: {error}") from None
    return target


def has_batch_norm(names: Mapping[str, object]) -> bool:
    """Tell whether a checkpoint's backbone was trained with live batch norm; frozen ones keep no batch count."""
    return any(name.startswith("backbone.body.") and name.endswith("num_batches_tracked") for name in names)


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any]]:
    """Return the name and shape of every tensor, and what else the checkpoint says.

    Raises:
        WeightsError: if it cannot be read.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                return shapes, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"model.weights: {path} is no readable safetensors file ({error})") from None
    tensors, metadata = load_tensors(path)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata


def load_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], Mapping[str, Any]]:
    """Return the tensors of a checkpoint and what else it says. Torch files are read without running code."""
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path), read_shapes(path)[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch doubts old pickles and asks to file an issue
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, struct.error) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"model.weights: {path} cannot be read as weights ({reason}); allowed are .safetensors files and torch "
            f"files that hold nothing but tensors, as torch.save(model.state_dict(), path) writes"
        ) from None
    metadata = content if isinstance(content, Mapping) else {}
    for inner in ("model", "state_dict", "model_state_dict"):
        if isinstance(metadata.get(inner), Mapping):
            content = metadata[inner]
            break
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise WeightsError(f"model.weights: {path} holds no state dict; save model.state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, metadata


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "segpipe" / "weights"
