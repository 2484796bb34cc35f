"""What model families share, and what a family outside the package imports: `from odedit.backbones.common import ...`.

The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odedit.backbones.base import Backbone
    from odedit.backbones.common.checkpoints import Architecture, PretrainedProcessor
    from odedit.backbones.common.decoders import Decoder, LlamaDecoder, OPTDecoder
    from odedit.backbones.common.qformer import QFormerBackbone, QFormerProcessor
    from odedit.inputs.batch import Probe
    from odedit.inputs.encoding import TokenSequence
    from odedit.inputs.prompts import Frame, Template, tokenize

_MODULES = {
    "backbones.base": ("Backbone",),
    "backbones.common.checkpoints": ("Architecture", "PretrainedProcessor"),
    "backbones.common.decoders": ("Decoder", "LlamaDecoder", "OPTDecoder"),
    "backbones.common.qformer": ("QFormerBackbone", "QFormerProcessor"),
    "inputs.batch": ("Probe",),
    "inputs.encoding": ("TokenSequence",),
    "inputs.prompts": ("Frame", "Template", "tokenize"),
}

__all__ = [
    "Architecture",
    "Backbone",
    "Decoder",
    "Frame",
    "LlamaDecoder",
    "OPTDecoder",
    "PretrainedProcessor",
    "Probe",
    "QFormerBackbone",
    "QFormerProcessor",
    "Template",
    "TokenSequence",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"odedit.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
