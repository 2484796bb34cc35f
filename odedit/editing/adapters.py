"""Committed LoRA parameters as a PEFT adapter, for programs that load adapters beside a model.

Modules are named as in the model's class in transformers. vLLM, untested here, reads the same two files and by default
applies adapters to the text model alone: with sites of the connector, serve the merged checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor
from odedit.editors.lora import LoRA
from odedit.errors import InputError
from odedit.inputs.batch import EditParams
from odedit.runtime.addresses import shareable
from odedit.storage.atomic import check_new, folder_written_atomically
from odedit.storage.location import at
from odedit.storage.tensors import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def is_adapter(editor: Editor) -> bool:
    """Whether the editor's parameters can be written as a PEFT adapter."""
    return isinstance(editor, LoRA)


def write_adapter(backbone: Backbone, editor: Editor, params: EditParams, folder: Path) -> None:
    """Writes an adapter folder atomically: `PeftModel.from_pretrained(model, folder)` equals the merged checkpoint.

    Several edits become one adapter whose rank is the sum of theirs, as in `LoRA.merged`.

    Raises:
        InputError: The parameters are not those of LoRA, or `folder` is a file or a folder that is not empty.
    """
    check_new(folder)
    factors = _factors(editor, params)
    names = _module_names(backbone, list(factors))
    rank = next(iter(factors.values()))[0].shape[0]
    # PEFT scales by lora_alpha / r; the editor's own scale does not depend on the number of edits.
    alpha = editor.config.alpha * rank / editor.config.rank
    tensors: dict[str, Tensor] = {}
    for site, (a, b) in factors.items():
        tensors[f"{_PREFIX}{names[site]}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{names[site]}.lora_B.weight"] = b
    with folder_written_atomically(folder) as partial:
        settings = _settings(backbone, sorted(names.values()), rank, alpha)
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_tensors(at(partial / WEIGHTS), tensors, {"format": "pt"})


def _factors(editor: Editor, params: EditParams) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors `(r, in)` and `(out, r)` of each site. Raises InputError if the parameters are not those of LoRA."""
    if not is_adapter(editor):
        raise InputError(
            f"parameters of {type(editor).__name__} are no PEFT adapter; only those of the editor lora are. Take the "
            "merged checkpoint."
        )
    assert isinstance(editor, LoRA)
    pooled = editor.pooled(params)
    return {
        site: (pooled[f"{site}.lora_A"][0].float(), pooled[f"{site}.lora_B"][0].float())
        for site in editor.sites_of(pooled)
    }


def _module_names(backbone: Backbone, sites: list[str]) -> dict[str, str]:
    """Name in the model of each site's module.

    Raises:
        InputError: Two sites are the same module.
    """
    site_of: dict[int, str] = {}
    for site in sites:
        other = site_of.setdefault(id(backbone.site(site)), site)
        if other != site:
            raise InputError(f"{other!r} and {site!r} are the same matrix; name it once.")
    model: torch.nn.Module = backbone.model
    return {site_of[id(module)]: name for name, module in model.named_modules() if id(module) in site_of}


def _settings(backbone: Backbone, modules: list[str], rank: int, alpha: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,  # PEFT's classes for tasks are those of text models
        "base_model_name_or_path": shareable(backbone.checkpoint),
        "auto_mapping": {
            "base_model_class": type(backbone.model).__name__,
            "parent_library": type(backbone.model).__module__,
        },
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": modules,
    }
