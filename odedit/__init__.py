"""odedit: batch editing of multimodal language models.

The core needs torch alone; transformers is imported when a backbone is loaded, Ray and MLflow by the `pipeline`
package.
"""

from odedit.backbones import encode_requests, load_backbone, load_processor
from odedit.edit import EditResult, Stopping, edit
from odedit.editors import load as load_editor
from odedit.edits import EditRequest, Picture, Probe
from odedit.errors import InputError
from odedit.metrics import EvaluationConfig, evaluate, paired, stack_params, summarize
from odedit.objective import Objective, ObjectiveConfig, calibrate
from odedit.prompts import find_template

__version__ = "0.1.0"

__all__ = [
    "EditRequest",
    "EditResult",
    "EvaluationConfig",
    "InputError",
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
    "load_editor",
    "load_processor",
    "paired",
    "stack_params",
    "summarize",
]
