"""Neurons of edits in a copy of the model's checkpoint, whose feed-forward networks become wider.

A neuron `relu(h k^T + b) v` beside a network of ReLU units with biases is one more unit of it. The configuration has
one width for all layers, so the others get units of zeros. Any program that loads the source loads the copy.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from odedit.backbones.common import weight_files
from odedit.backbones.common.checkpoints import resolve
from odedit.backbones.common.hub import INDEX
from odedit.editing.merging import other_files
from odedit.editors.base import Neurons
from odedit.errors import InputError
from odedit.storage.atomic import check_new, folder_written_atomically

_CONFIG = "config.json"
_UNITS = re.compile(r"decoder\.layers\.(\d+)\.(fc1\.weight|fc1\.bias|fc2\.weight)$")
"""Stored names of OPT's feed-forward units."""


def can_widen(backbone: Any) -> bool:
    """Whether the model's feed-forward networks take further units: those of OPT with ReLU and biases."""
    config = getattr(getattr(backbone, "model", None), "config", None)
    text: Any = getattr(config, "text_config", None)
    return (
        getattr(text, "model_type", None) == "opt"
        and text.activation_function == "relu"
        and text.enable_bias
        and text.do_layer_norm_before
    )


def export_widened(backbone: Any, neurons: Neurons, directory: Path) -> None:
    """Writes a Hugging Face checkpoint with the neurons in its weights, in the dtype of the source.

    Args:
        backbone: Model for which `can_widen` holds.

    Raises:
        InputError: `directory` is a file or a folder that is not empty, the source's files name the networks
            otherwise, or the dtype overflows.
    """
    check_new(directory)
    source = Path(resolve(backbone.checkpoint, backbone.family, backbone.architecture))
    files = weight_files.find(source)
    named = {match[2] for match in map(_UNITS.search, weight_files.read_headers(files)) if match}
    if len(named) < 3:
        raise InputError(
            f"{source}: its weight files do not name the feed-forward networks decoder.layers.<n>.fc1 and fc2, which "
            "the neurons become a part of. Serve the model with odedit, or choose ftl, ftv, lora or mend."
        )
    with folder_written_atomically(directory) as folder:
        for path in other_files(source):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        for name, text in getattr(backbone, "processor_files", dict)().items():
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")
        added = sum(_widened(file, folder / file.name, neurons) for file in files)
        _edit_json(folder / _CONFIG, "text_config", "ffn_dim", len(neurons.biases_N))
        if (folder / INDEX).exists():
            _edit_json(folder / INDEX, "metadata", "total_size", added)


def _widened(source: Path, target: Path, neurons: Neurons) -> int:
    """Copies a weight file with wider networks; returns the number of added bytes."""
    with safe_open(source, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    added = 0
    for name, value in tensors.items():
        if match := _UNITS.search(name):
            is_edited = int(match[1]) == neurons.layer
            units = _units(match[2], neurons) if is_edited else torch.zeros_like(_units(match[2], neurons))
            units = units.to("cpu", value.dtype)
            if not bool(units.isfinite().all()):
                raise InputError(f"{name}: the neurons are not finite in the checkpoint's dtype, {value.dtype}.")
            tensors[name] = torch.cat([value, units], dim=1 if match[2] == "fc2.weight" else 0).contiguous()
            added += units.nbytes
    save_file(tensors, target, metadata)
    return added


def _units(part: str, neurons: Neurons) -> Tensor:
    return {"fc1.weight": neurons.keys_ND, "fc1.bias": neurons.biases_N, "fc2.weight": neurons.values_ND.T}[part]


def _edit_json(path: Path, section: str, name: str, added: int) -> None:
    """Raises a number in a section of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if name in values.get(section, {}):
        values[section][name] += added
    elif section == "text_config":
        raise InputError(f"{path.name}: it has no {section}.{name}, the width of the feed-forward networks.")
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
