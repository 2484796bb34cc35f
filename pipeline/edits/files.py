"""Edits named on the command line by files, folders, runs and patterns; duplicates and contradictions among them."""

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
class EditFiles:
    """Files of distinct edits.

    Attributes:
        files: Their locations.
        infos: Their headers.
        notes: Sentences for the user about edits given twice and edits that contradict each other.
    """

    files: tuple[Location, ...]
    infos: tuple[EditInfo, ...]
    notes: tuple[str, ...]


def find(arguments: Sequence[str]) -> EditFiles:
    """Finds the edits and reads their headers.

    Args:
        arguments: Paths or addresses of a file, a folder of edits, a run's folder, or a pattern such as
            `runs/*/edits/*.safetensors`.

    Raises:
        InputError: An argument names no edit, or a file is not an edit.
    """
    files = [file for argument in arguments for file in _files(argument)]
    if not files:
        raise InputError(f"no edit given: name at least one {_ENDING} file, or a run's folder.")
    infos = [read_info(file) for file in files]
    distinct = _without_duplicates(files, infos)
    repeats = [infos[index].edit_id for index in range(len(files)) if index not in distinct]
    notes = [f"{listed(list(dict.fromkeys(repeats)))}: given more than once; counts once."] if repeats else []
    kept = tuple(infos[index] for index in distinct)
    return EditFiles(tuple(files[index] for index in distinct), kept, (*notes, *_contradictions(kept)))


def _files(argument: str) -> list[Location]:
    location = locate(argument, "edit")
    if _PATTERN.search(location.path) and not location.exists():
        files = [file for match in _matches(location) for file in ([match] if _is_edit(match) else _inside(match))]
        if not files:
            raise InputError(f"edit {masked(argument)!r}: no edit's file fits the pattern, and no folder with one.")
        return files
    if _is_edit(location) or not location.is_folder():
        return [location]
    files = _inside(location)
    if not files:
        raise InputError(
            f"edit {masked(argument)!r}: the folder holds no edits; expected {_ENDING} files there or in its folder "
            "edits/ (a run keeps them with keep_edits: true)."
        )
    return files


def _is_edit(location: Location) -> bool:
    return location.name.endswith(_ENDING)


def _inside(folder: Location) -> list[Location]:
    """The edits of a run's folder, or those directly in the folder."""
    return _visible(Workspace(folder).edits, f"*{_ENDING}") or _visible(folder, f"*{_ENDING}")


def _visible(folder: Location, pattern: str) -> list[Location]:
    """Entries of a folder that match, without hidden (temporary) ones."""
    return [child for child in folder.glob(pattern) if not child.name.startswith(".")]


def _matches(pattern: Location) -> list[Location]:
    """Files and folders that match; any part of the path may be a pattern."""
    parents = _matches(pattern.parent) if _PATTERN.search(pattern.parent.path) else [pattern.parent]
    return [child for parent in parents for child in _visible(parent, pattern.name)]


def _without_duplicates(files: Sequence[Location], infos: Sequence[EditInfo]) -> list[int]:
    """Indices of the edits that differ from every earlier one in words, picture or tensors."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, info in enumerate(infos):
        alike[(info.editor, info.fingerprint, info.prompt, info.target, info.picture)].append(index)
    kept: list[int] = []
    for indices in alike.values():
        # Tensors may be large, so they are compared only if all else is equal.
        contents = [_content(files[index]) for index in indices] if len(indices) > 1 else [""]
        kept += [index for rank, index in enumerate(indices) if contents[rank] not in contents[:rank]]
    return sorted(kept)


def _content(file: Location) -> str:
    """SHA-256 of an edit's tensors."""
    params, _ = load_edit(file)
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _contradictions(infos: Sequence[EditInfo]) -> list[str]:
    """One sentence per question about the same picture with different target answers."""
    facts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for info in infos:
        if info.picture is not None:
            answers = facts[(info.prompt.strip(), info.picture)]
            answers.setdefault(info.target.strip(), info.edit_id)
    sentences = []
    for (prompt, picture), answers in facts.items():
        if len(answers) > 1:
            targets = listed([f"{answer!r} ({edit_id})" for answer, edit_id in answers.items()])
            about = ", asked about the same picture," if picture else ""
            sentences.append(
                f"Contradiction: {prompt!r}{about} has different answers: {targets}. "
                "At most one of these edits can hold."
            )
    return sentences
