"""Edits as safetensors files, with the metadata to apply them again and to check whether they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from safetensors import SafetensorError

from odedit import editors
from odedit.backbones.base import Backbone
from odedit.backbones.common.fingerprints import comparable, mismatch
from odedit.editors.base import Editor
from odedit.errors import InputError
from odedit.inputs.batch import EditParams, stack_params
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, LocationLike, at
from odedit.storage.tensors import read_metadata, read_tensors, write_tensors

FORMAT = "odedit-edit-1"
T = TypeVar("T")


@dataclass(frozen=True)
class EditInfo:
    """Metadata of an edit file.

    Attributes:
        edit_id: Name of the request.
        editor, editor_config: Name and settings of the editor that made the edit and applies it.
        family, checkpoint, fingerprint: Backbone whose weights the edit changes.
        template: Prompt template of training and scoring.
        prompt, target: Question and new answer.
        metrics: Scores of the edit.
        is_caption: True when the prompt is the beginning of a caption, not a question.
        picture: Key of the prompt's picture (`Picture.key`); empty: no picture; None: unknown, in files of older
            versions.
        image, image_root: Path of that picture as in the record, and its root folder or packed folder.
        image_size: Width and height to which pictures were resized first; None: not resized.
    """

    edit_id: str
    editor: str
    editor_config: dict[str, Any]
    family: str
    checkpoint: str
    fingerprint: str
    template: str
    prompt: str = ""
    target: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    is_caption: bool = False
    picture: str | None = None
    image: str = ""
    image_root: str = ""
    image_size: int | None = None


def save_edit(path: LocationLike, params: EditParams, info: EditInfo) -> None:
    """Writes one edit atomically."""
    metadata = {"format": FORMAT, "info": json.dumps(asdict(info), sort_keys=True)}
    write_tensors(at(path), params, metadata)


def is_whole(path: LocationLike) -> bool:
    """Whether the file exists and is as long as its header says; tensors are not read."""
    try:
        read_metadata(at(path))
    except (SafetensorError, FileNotFoundError):
        return False
    return True


def load_edit(path: LocationLike, device: str = "cpu") -> tuple[EditParams, EditInfo]:
    """Reads an edit file.

    Raises:
        InputError: Missing, damaged, or not an edit.
    """
    params, metadata = _read(path, lambda location: read_tensors(location, device))
    return params, _info(path, metadata)


def read_info(path: LocationLike) -> EditInfo:
    """Metadata of an edit file, without its tensors. Raises InputError as `load_edit` does."""
    return _info(path, _read(path, read_metadata))


def _read(path: LocationLike, read: Callable[[Location], T]) -> T:
    location = at(path, "edit")
    name = repr(location.text)
    try:
        if not location.is_file():
            raise InputError(f"edit {name}: no such file.")
        return read(location)
    except (SafetensorError, OSError) as error:
        raise InputError(f"edit {name} cannot be read as safetensors: {masked(str(error))}.") from error


def _info(path: LocationLike, metadata: Mapping[str, str]) -> EditInfo:
    name = repr(at(path, "edit").text)
    found = metadata.get("format")
    if found != FORMAT:
        hint = ""
        if str(found).startswith("odedit-committed"):
            hint = " It is a model of many records; odedit.load_edited(OUT/model).answer(picture, question) asks it."
        raise InputError(f"edit {name}: format is {found!r}, expected {FORMAT!r}.{hint}")
    try:
        return EditInfo(**json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"edit {name}: its metadata is damaged ({error}).") from error


def load_edits(
    paths: Sequence[LocationLike], backbone: Backbone, device: str = "cpu"
) -> tuple[Editor, EditParams, list[EditInfo]]:
    """Reads edits that are to be applied together.

    Raises:
        InputError: No edit, an edit of an editor outside the package, different editors or settings, or an edit of
            other weights than the backbone's.
    """
    if not paths:
        raise InputError("no edit given: name at least one .safetensors file.")
    loaded = [load_edit(path, device) for path in paths]
    names = [repr(at(path, "edit").text) for path in paths]
    first = loaded[0][1]
    for name, (_, info) in zip(names, loaded, strict=True):
        if info.editor != first.editor or _settings(info) != _settings(first):
            raise InputError(
                f"edit {name} was made by {info.editor!r} with other settings than {names[0]} "
                f"({first.editor!r}); edits applied together must share editor and settings."
            )
        if info.fingerprint != comparable(backbone.fingerprint, info.fingerprint):
            raise InputError(
                f"edit {name} belongs to {info.checkpoint!r} and not to {backbone.checkpoint!r}: it was made "
                f"{mismatch(info.fingerprint, backbone.fingerprint)}."
            )
    if first.editor not in editors.names():
        # A dotted name would import and run any module that the file names.
        raise InputError(
            f"edit {names[0]} was made by the editor {first.editor!r}, which is not one of "
            f"{', '.join(editors.names())}; load edits of editors outside the package in Python."
        )
    editor = editors.load_editor(first.editor, first.editor_config)
    return editor, stack_params([params for params, _ in loaded]), [info for _, info in loaded]


def _settings(info: EditInfo) -> Any:
    """Settings of the editor; settings newer than the edit have their defaults."""
    if info.editor not in editors.names():
        return info.editor_config
    return editors.load_editor(info.editor, info.editor_config).config
