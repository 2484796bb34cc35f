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
from odedit.runtime.addresses import above
from odedit.storage.location import Location, locate

_RECORDS, _PICTURES, _FOLDERS = 64, 8, 400


def root_of(path: str, given: str | None, columns: Mapping[str, str], task: str = "auto") -> str | None:
    """The folder of the pictures: the given one, else the one that is found; None for a packed folder.

    Args:
        path: File or folder of records.
        given: The folder that a setting names, if any.
        columns: Columns of the file by field.

    Raises:
        InputError: There is no such file of records, it cannot be read, or it names its pictures by full paths.
    """
    location = locate(path, "data.path")
    if given is not None or is_pack(location):
        return given
    if not location.is_folder():
        check_is_file(location)
    return _found(path, location, columns, task)


def _found(path: str, location: Location, columns: Mapping[str, str], task: str) -> str:
    """The folder of the records' file, the folder above it, or one below it: the first that holds a picture of theirs.

    Args:
        path: Path or address of a file of records or of a folder of such files, not packed; with its password.
        location: Location of `path`.

    Returns:
        The folder of the file itself if none holds one, so that messages name it; always at an address.

    Raises:
        InputError: The records cannot be read, or name their pictures by full paths.
    """
    home = path if location.is_folder() else above(path)
    records = (record for record in read_records(path, task=task, columns=columns) if not record.problem)
    named = [image.path for record in islice(records, _RECORDS) for image in request_images(record.fields)]
    paths = [name for name in dict.fromkeys(named) if not is_embedded_reference(name)][:_PICTURES]
    full = [name for name in paths if name.startswith("/")]
    if full:
        raise InputError(
            f"data.image_root: not set, and the records name pictures by full paths such as {full[0]!r}. Set it to the "
            f"folder that they lie in, such as {os.path.commonpath(list(map(os.path.dirname, full)))!r}."
        )
    if not location.is_local:
        return home
    home = (location if location.is_folder() else location.parent).path
    for is_exact in (True, False):
        for folder in _candidates(home):
            reader = ImageReader(folder)
            if any(_is_there(reader, name, is_exact=is_exact) for name in paths):
                return folder
    return home


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


def _is_there(reader: ImageReader, path: str, *, is_exact: bool) -> bool:
    """Whether the file is there, or one of a similar name, which the message about the missing file then tells."""
    try:
        return reader.location(path).is_file() if is_exact else reader.similar(path) is not None
    except (ValueError, OSError):
        return False
