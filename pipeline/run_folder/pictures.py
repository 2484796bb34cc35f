"""A check before a run that `image_root` and `rephrase_root` are right: some pictures of the records must exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import get_args

from odedit.data.fields import Root, request_images
from odedit.data.images import ImageError, ImageReader
from odedit.data.packed import is_embedded_reference
from odedit.data.records import RawRecord
from odedit.errors import InputError, counted
from odedit.runtime.addresses import relative_note

_RECORDS, _PICTURES = 512, 64


def check_pictures(records: Iterable[RawRecord], reader: ImageReader) -> None:
    """Checks that pictures of the first 512 records exist. A record without its picture becomes a skipped row later.

    Args:
        records: All records; only the first are read, so that a wrong folder is reported before a long file is read.
        reader: Reader of the records' pictures.

    Raises:
        InputError: No picture under a root exists.
    """
    usable = [record for record in islice(records, _RECORDS) if not record.problem]
    for root in get_args(Root):
        pictures = [
            (record, reference.path)
            for record in usable
            for reference in request_images(record.fields)
            if reference.root == root and not is_embedded_reference(reference.path)
        ]
        sample = pictures[:: max(1, len(pictures) // _PICTURES)]
        if sample and all(_is_missing(reader, path, root) for _, path in sample):
            raise InputError(_message(reader, sample, root))


def has_embedded_pictures(record: RawRecord) -> bool:
    """Whether pictures of a usable record lie in a packed folder or in a table."""
    return any(is_embedded_reference(reference.path) for reference in request_images(record.fields))


def _is_missing(reader: ImageReader, path: str, root: Root) -> bool:
    try:
        return not reader.location(path, root).is_file()
    except ImageError:
        return True
    except OSError:  # a storage error does not show that the picture is missing
        return False


def _message(reader: ImageReader, missing: Sequence[tuple[RawRecord, str]], root: Root) -> str:
    record, path = missing[0]
    setting = reader.settings[root]
    try:
        location = str(reader.location(path, root))
        tried = f"{location!r}.{relative_note(location)}"
    except ImageError as error:
        tried = str(error)
    fields = sorted({name for other, text in missing for name, value in other.fields.items() if _is_path(value, text)})
    return (
        f"{setting}: none of {counted(len(missing), 'picture')} looked for is there "
        f"(fields: {', '.join(fields) or 'probes'}). The first, of {record.where}: {tried} "
        f"Set {'data.rephrase_root' if root == 'rephrase' else setting} to the folder that {path!r} lies in."
    )


def _is_path(value: object, path: str) -> bool:
    return isinstance(value, str) and value == path
