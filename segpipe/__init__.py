"""Every object in an archive of photographs as a row: distributed instance segmentation with Ray Data.

Public functions have the names of the commands. Importing segpipe loads neither ray nor torch; each name is loaded
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segpipe.coco.exporting import export_coco
    from segpipe.coco.importing import import_coco
    from segpipe.coco.notes import EvaluationOptions
    from segpipe.config import Config, load_config
    from segpipe.doctor import examine
    from segpipe.errors import RequestError, SegpipeError, StoreError
    from segpipe.evaluation import evaluate
    from segpipe.finetuning.job import finetune
    from segpipe.finetuning.settings import FinetuneConfig, load_finetune_config
    from segpipe.lake import read_table
    from segpipe.overview import list_models, plan, status
    from segpipe.pipeline import run
    from segpipe.quicklook import demo, predict
    from segpipe.validation import validate
    from segpipe.validation.repair import repair

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "EvaluationOptions": "coco.notes",
    "FinetuneConfig": "finetuning.settings",
    "RequestError": "errors",
    "SegpipeError": "errors",
    "StoreError": "errors",
    "demo": "quicklook",
    "evaluate": "evaluation",
    "examine": "doctor",
    "export_coco": "coco.exporting",
    "finetune": "finetuning.job",
    "import_coco": "coco.importing",
    "list_models": "overview",
    "load_config": "config",
    "load_finetune_config": "finetuning.settings",
    "plan": "overview",
    "predict": "quicklook",
    "read_table": "lake",
    "repair": "validation.repair",
    "run": "pipeline",
    "status": "overview",
    "validate": "validation",
}

__all__ = [
    "Config",
    "EvaluationOptions",
    "FinetuneConfig",
    "RequestError",
    "SegpipeError",
    "StoreError",
    "demo",
    "evaluate",
    "examine",
    "export_coco",
    "finetune",
    "import_coco",
    "list_models",
    "load_config",
    "load_finetune_config",
    "plan",
    "predict",
    "read_table",
    "repair",
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
