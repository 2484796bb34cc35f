"""The file of a committed model: parameters, and the metadata to apply them to the unedited model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType

from safetensors import SafetensorError
from torch import Tensor

from odedit import editors, ways
from odedit.backbones.base import Backbone
from odedit.backbones.common.fingerprints import comparable, mismatch
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.inputs.batch import EditParams
from odedit.plugins import names as plugin_names
from odedit.runtime.addresses import masked
from odedit.settings import Settings
from odedit.storage.location import LocationLike, at
from odedit.storage.tensors import read_metadata, read_tensors, write_tensors
from odedit.ways.base import CommittedInfo

FORMAT = "odedit-committed-1"

__all__ = [
    "CommittedInfo",
    "load_committed",
    "load_with_carried",
    "read_committed_info",
    "save_committed",
    "serving_editor",
]


_CARRIED = "carried/"
"""Prefix of tensors that are no parameters of the model, see `Committed.carried`."""


def save_committed(
    path: LocationLike, params: EditParams, info: CommittedInfo, carried: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Writes a committed model atomically."""
    named = {**params, **{_CARRIED + name: value for name, value in carried.items()}}
    stored = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    write_tensors(at(path), stored, {"format": FORMAT, "info": json.dumps(asdict(info), sort_keys=True)})


def read_committed_info(path: LocationLike) -> CommittedInfo:
    """Metadata of a committed model, without its tensors.

    Raises:
        InputError: The file is missing, damaged, or no committed model.
    """
    location = at(path, "model")
    name = repr(masked(location.text))
    try:
        if not location.is_file():
            raise InputError(f"{name}: no such file; `odedit commit` writes it.")
        metadata = read_metadata(location)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} cannot be read as safetensors: {masked(str(error))}.") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{name}: format is {metadata.get('format')!r}, expected {FORMAT!r}.")
    try:
        values = json.loads(metadata["info"])
        return CommittedInfo(**values | {"edit_ids": tuple(values["edit_ids"])})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{name}: its metadata is damaged ({error}).") from error


def load_committed(path: LocationLike, device: str = "cpu") -> tuple[EditParams, CommittedInfo]:
    """Parameters and metadata of a committed model. Raises InputError as `read_committed_info`."""
    params, info, _ = load_with_carried(path, device)
    return params, info


def load_with_carried(path: LocationLike, device: str = "cpu") -> tuple[EditParams, CommittedInfo, EditParams]:
    """As `load_committed`, with the tensors that a model that is changed goes on with (`Committed.carried`)."""
    info = read_committed_info(path)
    params, carried = {}, {}
    for name, value in read_tensors(at(path), device)[0].items():
        if name.startswith(_CARRIED):
            carried[name.removeprefix(_CARRIED)] = value
        else:
            params[name] = value
    return params, info, carried


def serving_editor(info: CommittedInfo, backbone: Backbone, *, trusted: bool = False) -> Editor:
    """The editor that applies the parameters to the model with `together`.

    Args:
        trusted: Whether the file is of the present run, whose configuration names the way and the editor too.

    Raises:
        InputError: Another model, or a way or editor from outside the package, which a file must not choose.
    """
    for kind, name, package in (("way", info.way, ways), ("editor", info.editor, editors)):
        if not trusted and name not in plugin_names(package):
            raise InputError(f"this model was made by the {kind} {name!r}, which is not in the package.")
    if info.fingerprint != comparable(backbone.fingerprint, info.fingerprint):
        raise InputError(
            f"this model was committed to {info.checkpoint!r} and not to {backbone.checkpoint!r}: it was made "
            f"{mismatch(info.fingerprint, backbone.fingerprint)}."
        )
    way_class = ways.find(info.way)
    config: Settings = way_class.Config(**info.way_config)
    return way_class(config).serving(editors.load_editor(info.editor, info.editor_config))
