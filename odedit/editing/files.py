"""Edits as files: saved as safetensors with what is needed to apply them again, and to ask whether they hold."""

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
from odedit.storage.location import Location, Place, at
from odedit.storage.tensors import read_metadata, read_tensors, write_tensors

FORMAT = "odedit-edit-1"
T = TypeVar("T")


@dataclass(frozen=True)
class EditInfo:
    """What an edit file says about itself.

    Attributes:
        edit_id: The request's name.
        editor, editor_config: What wrote it, and what applies it.
        family, checkpoint, fingerprint: The backbone whose weights it changes.
        template: Prompt template it was trained and scored with.
        prompt, target: The edit in words.
        metrics: Its scores.
        is_caption: Whether the prompt is the beginning of a caption rather than a question.
        picture: Key of the picture that the prompt is about (`Picture.key`); empty: it has none; None: not known, in
            files of older versions.
        image, image_root: Where that picture was: as the record names it, and below which folder or packed folder.
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


def save_edit(path: Place, params: EditParams, info: EditInfo) -> None:
    """Writes one edit; a reader sees the whole file or none."""
    metadata = {"format": FORMAT, "info": json.dumps(asdict(info), sort_keys=True)}
    write_tensors(at(path), params, metadata)


def is_whole(path: Place) -> bool:
    """Whether a file of tensors is there, and as long as its header says; the tensors themselves are not read."""
    try:
        read_metadata(at(path))
    except (SafetensorError, FileNotFoundError):
        return False
    return True


def load_edit(path: Place, device: str = "cpu") -> tuple[EditParams, EditInfo]:
    """Reads an edit file.

    Raises:
        InputError: Missing, damaged, or not an edit.
    """
    params, metadata = _read(path, lambda place: read_tensors(place, device))
    return params, _info(path, metadata)


def read_info(path: Place) -> EditInfo:
    """What an edit file says about itself, without its tensors. Raises InputError as `load_edit` does."""
    return _info(path, _read(path, read_metadata))


def _read(path: Place, read: Callable[[Location], T]) -> T:
    place = at(path, "edit")
    name = repr(place.text)
    try:
        if not place.is_file():
            raise InputError(f"edit {name}: no such file.")
        return read(place)
    except (SafetensorError, OSError) as error:
        raise InputError(f"edit {name} cannot be read as safetensors: {masked(str(error))}.") from error


def _info(path: Place, metadata: Mapping[str, str]) -> EditInfo:
    name = repr(at(path, "edit").text)
    if metadata.get("format") != FORMAT:
        raise InputError(f"edit {name}: format is {metadata.get('format')!r}, expected {FORMAT!r}.")
    try:
        return EditInfo(**json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"edit {name}: what it says about itself is damaged ({error}).") from error


def load_edits(
    paths: Sequence[Place], backbone: Backbone, device: str = "cpu"
) -> tuple[Editor, EditParams, list[EditInfo]]:
    """Reads edits that are to be applied together.

    Raises:
        InputError: None given, made by an editor outside the package, by different editors or settings, or for other
            weights than the backbone's.
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
        # A dotted name would import whatever module the file asks for.
        raise InputError(
            f"edit {names[0]} was made by the editor {first.editor!r}, which is not one of "
            f"{', '.join(editors.names())}; load edits of editors outside the package in Python."
        )
    editor = editors.load_editor(first.editor, first.editor_config)
    return editor, stack_params([params for params, _ in loaded]), [info for _, info in loaded]


def _settings(info: EditInfo) -> Any:
    """The editor's settings, those that are newer than the edit at their defaults."""
    if info.editor not in editors.names():
        return info.editor_config
    return editors.load_editor(info.editor, info.editor_config).config
