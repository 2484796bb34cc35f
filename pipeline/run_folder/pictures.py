"""Whether the folders of pictures are the right ones: some that the records name are looked for before a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import get_args

from odedit.data.fields import Root, request_images
from odedit.data.images import ImageError, ImageReader
from odedit.data.packed import is_pack_reference
from odedit.data.records import RawRecord
from odedit.errors import InputError, counted
from odedit.runtime.addresses import relative_note

_RECORDS, _PICTURES = 512, 64


def check_pictures(records: Iterable[RawRecord], reader: ImageReader) -> None:
    """Looks for pictures of the first records. Single missing ones become skipped rows later.

    Args:
        records: All records; a few hundred are read, so that a wrong folder is noticed before a long file is read.
        reader: Opens their pictures.

    Raises:
        InputError: None of the pictures under a root is there.
    """
    first = [record for record in islice(records, _RECORDS) if not record.problem]
    for root in get_args(Root):
        named = [
            (record, reference.path)
            for record in first
            for reference in request_images(record.fields)
            if reference.root == root and not is_pack_reference(reference.path)
        ]
        named = named[:: max(1, len(named) // _PICTURES)]
        if named and all(_is_missing(reader, path, root) for _, path in named):
            raise InputError(_message(reader, named, root))


def _is_missing(reader: ImageReader, path: str, root: Root) -> bool:
    try:
        return not reader.location(path, root).is_file()
    except ImageError:
        return True
    except OSError:  # storage that refuses for now says nothing about the root
        return False


def _message(reader: ImageReader, named: Sequence[tuple[RawRecord, str]], root: Root) -> str:
    record, path = named[0]
    setting = reader.settings[root]
    try:
        place = reader.location(path, root)
        tried = f"{str(place)!r}.{relative_note(str(place))}"
    except ImageError as error:
        tried = str(error)
    fields = sorted({name for one, text in named for name, value in one.fields.items() if _names(value, text)})
    return (
        f"{setting}: none of {counted(len(named), 'picture')} looked for is there "
        f"(fields: {', '.join(fields) or 'probes'}). The first, of {record.where}: {tried} "
        f"Set {'data.rephrase_root' if root == 'rephrase' else setting} to the folder that {path!r} lies in."
    )


def _names(value: object, path: str) -> bool:
    return isinstance(value, str) and value == path
