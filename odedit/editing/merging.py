"""Merging of edits that are plain weights into a copy of the model's checkpoint.

The copy has the source's files: its processor, tokenizer, generation settings, shards, tensor names and dtypes. Only
the values of the edited tensors differ, so any program that loads the source loads the copy. Files of the processor
that the source lacks are added.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from odedit.backbones.common import weight_files
from odedit.backbones.common.checkpoints import resolve
from odedit.backbones.common.hub import INDEX, WEIGHTS
from odedit.editors.base import Editor, Mergeable
from odedit.errors import InputError
from odedit.inputs.batch import EditParams
from odedit.runtime.brief import brief
from odedit.storage.atomic import check_new, folder_written_atomically

_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "additional_chat_templates/*.jinja")
"""Files copied beside the weights: no code, no pickles, and no README, which describes another model."""


@dataclass(frozen=True)
class Merged:
    """Files of a source checkpoint, and the tensors in them that the edits change.

    Attributes:
        source: Folder of the source checkpoint.
        weights: Names of its weight files.
        changed: New values by file name and stored name, in the dtype of the source.
        missing: Texts of files to write if the source lacks them, by name.
    """

    source: Path
    weights: tuple[str, ...]
    changed: Mapping[str, Mapping[str, Tensor]]
    missing: Mapping[str, str] = field(default_factory=dict)

    __repr__ = brief

    def write(self, directory: Path) -> None:
        """Writes the checkpoint folder atomically.

        Raises:
            InputError: `directory` is a file or a folder that is not empty.
        """
        check_new(directory)
        with folder_written_atomically(directory) as folder:
            for path in other_files(self.source):
                target = folder / path.relative_to(self.source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            for name, text in self.missing.items():
                if not (folder / name).exists():
                    (folder / name).write_text(text, encoding="utf-8")
            for name in self.weights:
                shutil.copyfile(self.source / name, folder / name)
                _overwrite(folder / name, self.changed.get(name, {}))


def export(backbone: Any, editor: Editor, params: EditParams, directory: Path) -> None:
    """Writes a plain Hugging Face checkpoint with the edits merged into its weights: `odedit merge` in Python.

    Args:
        backbone: Result of `odedit.load_backbone`.

    Raises:
        InputError: Raised by `merged_into` or `Merged.write`.
    """
    with merged_into(backbone, editor, params) as merged:
        merged.write(directory)


@contextmanager
def merged_into(backbone: Any, editor: Editor, params: EditParams) -> Iterator[Merged]:
    """Context in which the model has the merged weights, rounded to the checkpoint's dtype.

    Raises:
        InputError: The editor's edits are not plain weights (WISE routes at inference), the checkpoint's files have
            changed since the model was loaded, or the dtype overflows.
    """
    if not isinstance(editor, Mergeable):
        raise InputError(
            f"edits of {type(editor).__name__} cannot be merged into plain weights: it decides per prompt. "
            "Keep the edit files and use `odedit apply`."
        )
    deltas = editor.merged(params)
    modules = {site: backbone.site(site) for site in deltas}
    source = Path(resolve(backbone.checkpoint, backbone.family, backbone.architecture))
    weights = tuple(path.name for path in weight_files.find(source))
    stored_at = _stored_at(backbone.model, source, weights, modules)
    changed: dict[str, dict[str, Tensor]] = {}
    kept = {site: module.weight.data for site, module in modules.items()}
    try:
        for site, module in modules.items():
            file, name = stored_at[site]
            with safe_open(source / file, framework="pt") as stream:
                stored = stream.get_tensor(name)
            if not torch.equal(stored.to(module.weight.dtype), module.weight.cpu()):
                raise InputError(f"{source / file}: {name!r} is not the weight that {site!r} was loaded with.")
            value = _rounded(stored, deltas[site], f"{site} ({name})")
            changed.setdefault(file, {})[name] = value
            module.weight.data = value.to(kept[site])
        yield Merged(source, weights, changed, getattr(backbone, "processor_files", dict)())
    finally:
        for site, module in modules.items():
            module.weight.data = kept[site]


def _rounded(stored: Tensor, delta: Tensor, name: str) -> Tensor:
    """Sum in the dtype of the stored tensor."""
    wide = torch.promote_types(stored.dtype, torch.float32)
    value = (stored.to(wide) + delta.to("cpu", wide)).to(stored.dtype)
    if not bool(value.isfinite().all()):
        raise InputError(f"{name}: the merged values are not finite in the checkpoint's dtype, {stored.dtype}.")
    return value


def other_files(source: Path) -> list[Path]:
    """Files to copy beside the weights, without an index of weights that are not copied."""
    has_index = not (source / WEIGHTS).is_file()
    return [
        path
        for pattern in _COPIED
        for path in sorted(source.glob(pattern))
        if path.is_file() and (not path.name.endswith(".index.json") or (has_index and path.name == INDEX))
    ]


def _stored_at(
    model: Any, source: Path, weights: Iterable[str], modules: Mapping[str, torch.nn.Module]
) -> dict[str, tuple[str, str]]:
    """File and stored name of each site's weight, by the renaming rules of transformers.

    Raises:
        InputError: A weight is not stored as one tensor.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    site_of = {id(module): site for site, module in modules.items()}
    wanted = {f"{name}.weight": site_of[id(module)] for name, module in model.named_modules() if id(module) in site_of}
    stored_at: dict[str, tuple[str, str]] = {}
    for file in weights:
        with safe_open(source / file, framework="pt") as stream:
            names = list(stream.keys())
        for stored in names:
            name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, parameters)
            if name not in parameters and stored in parameters:  # as transformers does
                name, converted = rename_source_key(stored, [], [], model.base_model_prefix, parameters)
            if name in wanted and converted is None:
                stored_at[wanted[name]] = file, stored
    missing = [site for site in modules if site not in stored_at]
    if missing:
        raise InputError(
            f"{source}: the weight of {missing[0]!r} is not stored as a tensor of its own, so nothing can be merged "
            "into it. Keep the edit files and use `odedit apply`."
        )
    return stored_at


def _overwrite(path: Path, values: Mapping[str, Tensor]) -> None:
    """Overwrites tensors of a safetensors file in place with others of the same shape and dtype."""
    if not values:
        return
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        for name, value in values.items():
            begin, end = header[name]["data_offsets"]
            data = value.contiguous().view(torch.uint8).numpy().tobytes()
            if len(data) != end - begin:
                raise ValueError(f"{path}: {name} has {end - begin} bytes, its new value {len(data)}.")
            stream.seek(8 + size + begin)
            stream.write(data)
