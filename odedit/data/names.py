"""Names of a record's fields: the plain ones, those of MMEdit, and the columns that a file has instead.

Inside the program a field has its MMEdit name. `NAMED` in a record's fields holds the names that the file has, for
messages.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

NAMED = "named"
"""Key of a record's fields with the file's name of each renamed field."""
PLAIN = {
    "question": "src",
    "answer": "alt",
    "old_answer": "pred",
    "images": "image",
    "locality_question": "loc",
    "locality_answer": "loc_ans",
    "locality_image": "m_loc",
    "locality_image_question": "m_loc_q",
    "locality_image_answer": "m_loc_a",
}
"""MMEdit's name of each field by its plain name. The other fields have one name."""
_PLAIN_OF = {name: plain for plain, name in PLAIN.items() if plain != "images"}
_ONLY_MMEDIT = frozenset(("src", "alt", "pred", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a"))
_ONE_NAME = ("image", "rephrase", "image_rephrase", "edit_id", "task", "fact", "loc_fact", "m_loc_fact", "entity",
             "loc_entity", "m_loc_entity", "probes",
             "held_out")  # fmt: skip
KNOWN = (*_ONE_NAME, *PLAIN, *_PLAIN_OF)
"""All names under which a field is read."""
_LISTED = frozenset(KNOWN)
_ANY_CASE = frozenset((*PLAIN, "image", "rephrase", "image_rephrase"))
"""Names that are also read in other cases and with spaces, as the header of a spreadsheet writes them."""


def canonical(name: str) -> str:
    """MMEdit's name of a field.

    >>> canonical("question"), canonical("src"), canonical("Old answer"), canonical("Category")
    ('src', 'src', 'pred', 'Category')
    """
    plain = "_".join(str(name).casefold().split())
    return PLAIN.get(plain, plain) if plain in _ANY_CASE else name


def unknown_column(name: str) -> str:
    """Message for a key of `data.columns` that is no field."""
    hint = f" Did you mean {near!r}?" if (near := nearest(name)) else ""
    return f"got the key {name!r}, expected a field of a record: {', '.join(KNOWN)}.{hint}"


def nearest(name: str, among: Iterable[str] = KNOWN) -> str:
    """The most similar field's name; empty if none is similar.

    >>> nearest("anwser"), nearest("xyzzy")
    ('answer', '')
    """
    return next(iter(difflib.get_close_matches(name.casefold(), list(among), n=1, cutoff=0.7)), "")


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under MMEdit's names.

    A field under two names has the value of its MMEdit name, else of the one in lower case; the other stays as it is,
    unread.

    Args:
        columns: Column of the file by field, which comes before the field's own names.
    """
    named = {canonical(name): column for name, column in columns.items()}
    fields = {name: record[column] for name, column in named.items() if column in record}
    taken = {column for column in named.values() if column in record}
    listed = {canonical(key) for key in record if key in _LISTED}
    for key, value in record.items():
        name = canonical(key)
        if key in taken or key == NAMED:
            continue
        if name in listed and key not in _LISTED:
            name = key
        if name != key and name not in record and name not in fields:
            named[name] = key
        elif name != key:
            name = key
        fields.setdefault(name, value)
    named = {name: key for name, key in named.items() if name != key}
    return fields | ({NAMED: named} if named else {})


def shown(name: str, fields: Mapping[str, Any]) -> str:
    """Name of a field in messages: the file's; of a field that is not there, one of the same kind as the others'."""
    named = fields.get(NAMED)
    if isinstance(named, Mapping) and name in named:
        return str(named[name])
    if name in fields or not _ONLY_MMEDIT.isdisjoint(fields.keys() - (named or {}).keys()):
        return name
    return _PLAIN_OF.get(name, name)


def unread(record: Mapping[str, Any], columns: Mapping[str, str], read_by_layout: Iterable[str] = ()) -> list[str]:
    """Keys of a record without a reader."""
    read = {*KNOWN, *columns.values(), *read_by_layout}
    twice = [key for key in record if canonical(key) != key and canonical(key) in record]
    return sorted({*(str(key) for key in record if key not in read), *twice})
