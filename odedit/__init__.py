"""odedit: batch editing of multimodal language models.

The public names are imported on first use, so that `odedit --help` and job submission do not wait for torch.
transformers is imported when a backbone is loaded; only the `pipeline` package imports Ray and MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odedit.backbones import encode_requests, load_backbone, load_processor
    from odedit.data.images import ImageReader
    from odedit.data.negatives import NegativePool
    from odedit.editing.curves import EditResult
    from odedit.editing.loop import Stopping, edit
    from odedit.editors import load_editor
    from odedit.errors import InputError
    from odedit.evaluation.scores import EvaluationConfig, evaluate
    from odedit.evaluation.statistics import paired, summarize
    from odedit.inputs.batch import EditRequest, Picture, Probe, stack_params
    from odedit.inputs.prompts import find_template
    from odedit.objectives import Objective, ObjectiveConfig, calibrate
    from odedit.ways.common.serving import load_edited

__version__ = "0.1.0"

_MODULES = {
    "backbones": ("encode_requests", "load_backbone", "load_processor"),
    "inputs.batch": ("EditRequest", "Picture", "Probe", "stack_params"),
    "data.images": ("ImageReader",),
    "data.negatives": ("NegativePool",),
    "editing.curves": ("EditResult",),
    "editing.loop": ("Stopping", "edit"),
    "editors": ("load_editor",),
    "errors": ("InputError",),
    "evaluation.scores": ("EvaluationConfig", "evaluate"),
    "evaluation.statistics": ("paired", "summarize"),
    "objectives": ("Objective", "ObjectiveConfig", "calibrate"),
    "inputs.prompts": ("find_template",),
    "ways.common.serving": ("load_edited",),
}

_PIPELINE = {"open_run": "pipeline.notebook"}
"""Names of modules outside this package, which the core itself does not need."""

__all__ = [
    "EditRequest",
    "EditResult",
    "EvaluationConfig",
    "ImageReader",
    "InputError",
    "NegativePool",
    "Objective",
    "ObjectiveConfig",
    "Picture",
    "Probe",
    "Stopping",
    "calibrate",
    "edit",
    "encode_requests",
    "evaluate",
    "find_template",
    "load_backbone",
    "load_edited",
    "load_editor",
    "load_processor",
    "open_run",
    "paired",
    "stack_params",
    "summarize",
]


def __getattr__(name: str) -> Any:
    modules = {each: f"odedit.{module}" for module, names in _MODULES.items() for each in names} | _PIPELINE
    if name in modules:
        value = getattr(import_module(modules[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'odedit' has no attribute {name!r}")
