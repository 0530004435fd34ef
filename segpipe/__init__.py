"""Every object in an archive of photographs as a row: distributed instance segmentation with Ray Data.

Public functions have the names of the commands. Importing segpipe loads neither ray nor torch; each name is loaded
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segpipe.config import Config, load_config
    from segpipe.errors import RequestError, SegpipeError, StoreError
    from segpipe.lake import read_table
    from segpipe.overview import list_models, plan, status
    from segpipe.pipeline import run
    from segpipe.quicklook import demo, predict
    from segpipe.validation import validate

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "RequestError": "errors",
    "SegpipeError": "errors",
    "StoreError": "errors",
    "demo": "quicklook",
    "list_models": "overview",
    "load_config": "config",
    "plan": "overview",
    "predict": "quicklook",
    "read_table": "lake",
    "run": "pipeline",
    "status": "overview",
    "validate": "validation",
}

__all__ = [
    "Config",
    "RequestError",
    "SegpipeError",
    "StoreError",
    "demo",
    "list_models",
    "load_config",
    "plan",
    "predict",
    "read_table",
    "run",
    "status",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'segpipe' has no attribute {name!r}")
    return getattr(import_module(f"segpipe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
