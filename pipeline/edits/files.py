"""The edits that a command is given: files, folders, runs, patterns; which of them repeat or contradict each other."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from odedit.editing.files import EditInfo, load_edit, read_info
from odedit.errors import InputError, listed
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.run_folder.workspace import Workspace

_ENDING = ".safetensors"
_PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Given:
    """Edits that differ from one another.

    Attributes:
        files: Where they are.
        infos: What they say about themselves.
        notes: Sentences for the user: which edit was given more than once, which edits contradict each other.
    """

    files: tuple[Location, ...]
    infos: tuple[EditInfo, ...]
    notes: tuple[str, ...]


def find(arguments: Sequence[str]) -> Given:
    """Reads the headers of the edits that are meant.

    Args:
        arguments: A file, a folder of edits, a run's folder, or a pattern such as `runs/*/edits/*.safetensors`; each a
            path or an address.

    Raises:
        InputError: An argument means no edit, or a file is none.
    """
    files = [file for argument in arguments for file in _files(argument)]
    if not files:
        raise InputError(f"no edit given: name at least one {_ENDING} file, or a run's folder.")
    infos = [read_info(file) for file in files]
    first = _first_of_each(files, infos)
    repeats = [infos[index].edit_id for index in range(len(files)) if index not in first]
    notes = [f"{listed(list(dict.fromkeys(repeats)))}: given more than once; counts once."] if repeats else []
    kept = tuple(infos[index] for index in first)
    return Given(tuple(files[index] for index in first), kept, (*notes, *_contradictions(kept)))


def _files(argument: str) -> list[Location]:
    place = locate(argument, "edit")
    if _PATTERN.search(place.path) and not place.exists():
        matches = [file for match in _matches(place) for file in ([match] if _is_edit(match) else _inside(match))]
        if not matches:
            raise InputError(f"edit {masked(argument)!r}: no edit's file fits the pattern, and no folder with one.")
        return matches
    if _is_edit(place) or not place.is_folder():
        return [place]
    found = _inside(place)
    if not found:
        raise InputError(
            f"edit {masked(argument)!r}: the folder holds no edits; expected {_ENDING} files there or in its folder "
            "edits/ (a run keeps them with keep_edits: true)."
        )
    return found


def _is_edit(place: Location) -> bool:
    return place.name.endswith(_ENDING)


def _inside(place: Location) -> list[Location]:
    """The edits of a run's folder, or else those in the folder itself."""
    return _visible(Workspace(place).edits, f"*{_ENDING}") or _visible(place, f"*{_ENDING}")


def _visible(folder: Location, pattern: str) -> list[Location]:
    """Files that match, temporary ones left out."""
    return [child for child in folder.glob(pattern) if not child.name.startswith(".")]


def _matches(place: Location) -> list[Location]:
    """Every file and folder that fits, whichever parts of the path are patterns."""
    parents = _matches(place.parent) if _PATTERN.search(place.parent.path) else [place.parent]
    return [child for parent in parents for child in _visible(parent, place.name)]


def _first_of_each(files: Sequence[Location], infos: Sequence[EditInfo]) -> list[int]:
    """Numbers of the edits without those that repeat an earlier one: the same words, picture and tensors."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, info in enumerate(infos):
        alike[(info.editor, info.fingerprint, info.prompt, info.target, info.picture)].append(index)
    kept: list[int] = []
    for indices in alike.values():
        # Tensors may be large: they are read where nothing else tells two edits apart.
        contents = [_content(files[index]) for index in indices] if len(indices) > 1 else [""]
        kept += [index for at, index in enumerate(indices) if contents[at] not in contents[:at]]
    return sorted(kept)


def _content(file: Location) -> str:
    params, _ = load_edit(file)
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _contradictions(infos: Sequence[EditInfo]) -> list[str]:
    """A sentence for each question about one picture that is to have different answers."""
    facts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for info in infos:
        if info.picture is not None:
            answers = facts[(info.prompt.strip(), info.picture)]
            answers.setdefault(info.target.strip(), info.edit_id)
    found = []
    for (prompt, picture), answers in facts.items():
        if len(answers) > 1:
            said = listed([f"{answer!r} ({edit_id})" for answer, edit_id in answers.items()])
            about = ", asked about the same picture," if picture else ""
            found.append(
                f"Contradiction: {prompt!r}{about} has different answers: {said}. At most one of these edits can hold."
            )
    return found
