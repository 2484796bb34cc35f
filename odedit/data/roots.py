"""Folder of the pictures of a file of records, when no setting names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice

from odedit.data.fields import request_images
from odedit.data.images import ImageReader
from odedit.data.packed import is_embedded_reference, is_pack
from odedit.data.readers import check_is_file
from odedit.data.records import read_records
from odedit.errors import InputError
from odedit.storage.location import Location, locate

_RECORDS, _PICTURES, _FOLDERS = 64, 8, 400


def root_of(path: str, given: str | None, columns: Mapping[str, str], task: str = "auto") -> str | None:
    """The folder of the pictures: the given one, else the one that is found; None for a packed folder.

    Raises:
        InputError: There is no such file of records, or see `found_root`.
    """
    location = locate(path, "data.path")
    if given is not None or is_pack(location):
        return given
    if not location.is_folder():
        check_is_file(location)
    return found_root(location, columns, task)


def found_root(location: Location, columns: Mapping[str, str], task: str = "auto") -> str:
    """The folder of the records' file, the folder above it, or one below it: the first that holds a picture of theirs.

    Args:
        location: File of records or folder of such files, not packed.
        columns: Columns of the file by field.

    Returns:
        The folder of the file itself if none holds one, so that messages name it.

    Raises:
        InputError: The records cannot be read, or name their pictures by full paths.
    """
    home = location if location.is_folder() else location.parent
    records = (record for record in read_records(_text(location), task=task, columns=columns) if not record.problem)
    named = [image.path for record in islice(records, _RECORDS) for image in request_images(record.fields)]
    paths = [path for path in dict.fromkeys(named) if not is_embedded_reference(path)][:_PICTURES]
    full = [path for path in paths if path.startswith("/")]
    if full:
        raise InputError(
            f"data.image_root: not set, and the records name pictures by full paths such as {full[0]!r}. Set it to the "
            f"folder that they lie in, such as {os.path.dirname(os.path.commonpath(full)) or '/'!r}."
        )
    if not location.is_local:
        return _text(home)
    for folder in _candidates(home.path):
        reader = ImageReader(folder)
        if any(_is_there(reader, path) for path in paths):
            return folder
    return home.path


def _text(location: Location) -> str:
    return location.path if location.is_local else location.text


def _candidates(home: str) -> list[str]:
    """The folder, those up to two levels below it, and the one above it."""
    below = []
    for depth_one in _folders(home):
        below += [depth_one, *_folders(depth_one)]
    return [home, *below[:_FOLDERS], os.path.dirname(home)]


def _folders(home: str) -> list[str]:
    try:
        with os.scandir(home) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _is_there(reader: ImageReader, path: str) -> bool:
    try:
        return reader.location(path).is_file()
    except (ValueError, OSError):
        return False
