"""The folder of a model that odedit serves: the parameters that an editor applies to the unedited model, and
`edits.json`. The files of a routed model are `adapters.safetensors` and `router.safetensors`, of another model
`parameters.safetensors`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors import SafetensorError

from odedit.errors import InputError
from odedit.inputs.batch import EditParams
from odedit.runtime.addresses import masked
from odedit.storage.location import LocationLike, at
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.ways.common.adapters import adapters_of
from odedit.ways.common.files import CommittedInfo
from odedit.ways.common.router import KEYS
from odedit.ways.common.router import ROUTER as ROUTER_PREFIX

FORMAT = "odedit-model-1"
ADAPTERS, ROUTER, EDITS = "adapters.safetensors", "router.safetensors", "edits.json"
PARAMETERS = "parameters.safetensors"


def write(folder: LocationLike, params: EditParams, info: CommittedInfo) -> None:
    """Writes a routed model, each file atomically, `edits.json` last.

    Args:
        params: The committed model. Edits are stored in the type `stored` of the way's settings, to which they were
            rounded.
        info: Its metadata; `details["edits"]` may have a mapping per edit: edit_id, prompt, target, image, picture.
    """
    location = at(folder)
    dtype = getattr(torch, info.way_config.get("stored", "float32"))
    adapters = {name: value.to(dtype) for name, value in adapters_of(params).items()}
    router = {name: value for name, value in params.items() if name not in adapters}
    write_tensors(location / ADAPTERS, adapters, {"format": FORMAT})
    write_tensors(location / ROUTER, router, {"format": FORMAT})
    write_edits(location, info)


def write_parameters(folder: LocationLike, params: EditParams, info: CommittedInfo) -> None:
    """Writes a model that is not routed, `edits.json` last."""
    write_tensors(at(folder) / PARAMETERS, params, {"format": FORMAT})
    write_edits(folder, info)


def read_parameters(folder: LocationLike, device: str = "cpu") -> tuple[EditParams, CommittedInfo]:
    """Parameters and metadata of a folder that `write_parameters` made. Raises InputError as `read` does."""
    info, _ = read_edits(folder)
    return _tensors(folder, PARAMETERS, device), info


def write_edits(folder: LocationLike, info: CommittedInfo) -> None:
    """Writes `edits.json`: format, metadata, and what each edit changes."""
    edits = info.details.get("edits") or [{"edit_id": edit_id} for edit_id in info.edit_ids]
    details = {name: value for name, value in info.details.items() if name not in ("edits", "tables")}
    values = {"format": FORMAT, "info": asdict(replace(info, details=details)), "edits": edits}
    (at(folder) / EDITS).write_text(json.dumps(values, indent=1, ensure_ascii=False))


def read_edits(folder: LocationLike) -> tuple[CommittedInfo, list[dict[str, Any]]]:
    """Metadata and edits of a folder with `edits.json`. Raises InputError if the file is missing or damaged."""
    location = at(folder, "model") / EDITS
    name = repr(masked(location.text))
    try:
        values = json.loads(location.read_text())
        if values["format"] != FORMAT:
            raise InputError(f"{name}: format is {values['format']!r}, expected {FORMAT!r}.")
        info = values["info"]
        return CommittedInfo(**info | {"edit_ids": tuple(info["edit_ids"])}), list(values["edits"])
    except OSError as error:
        raise InputError(f"{name} cannot be read ({masked(str(error))}); `odedit commit` writes it.") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is damaged ({error}); commit the model again.") from error


def read(folder: LocationLike, device: str = "cpu") -> tuple[EditParams, CommittedInfo]:
    """Parameters, float32, and metadata of a folder that `write` made.

    Raises:
        InputError: A file is missing or damaged, or the number of edits differs between files.
    """
    info, _ = read_edits(folder)
    params: EditParams = {}
    for file in (ADAPTERS, ROUTER):
        params |= {key: value.float() for key, value in _tensors(folder, file, device).items()}
    counts = {len(value) for name, value in params.items() if name == KEYS or not name.startswith(ROUTER_PREFIX)}
    if counts != {len(info.edit_ids)}:
        raise InputError(
            f"{masked(at(folder).text)!r}: its files are of different models ({len(info.edit_ids)} edits in {EDITS}, "
            f"{', '.join(map(str, sorted(counts)))} in the others); commit the model again."
        )
    return params, info


def _tensors(folder: LocationLike, file: str, device: str) -> EditParams:
    """Tensors of one file of the folder."""
    location = at(folder, "model") / file
    name = repr(masked(location.text))
    try:
        tensors, metadata = read_tensors(location, device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} cannot be read as safetensors: {masked(str(error))}.") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{name}: format is {metadata.get('format')!r}, expected {FORMAT!r}.")
    return tensors
