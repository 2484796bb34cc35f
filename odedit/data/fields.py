"""Fields of a record: their validation, and the prompts, targets and images that they hold.

A record needs a picture, a question and a right answer. A probe that it lacks is not scored; one of which it has only a
part makes it unusable. A record with all eleven fields of MMEdit is skipped if one is empty, as in the toolkit, whose
counts would change otherwise; `pred` may be empty in captions, because no metric reads it.

An image marker at the start of a question about a picture is removed; a record with a marker elsewhere is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from odedit.data.names import shown
from odedit.evaluation.columns import METRICS
from odedit.inputs.batch import (
    RELIABILITY,
    SUPERVISION_ALLOWED,
    check_probe_name,
    is_locality,
    is_supervision,
    things_of,
)
from odedit.inputs.markers import image_marker, without_leading_marker

TASKS = ("vqa", "caption")
CAPTION_PROMPT = "a photo of"
FIELDS = (
    "src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a",
)  # fmt: skip
REQUIRED = ("image", "src", "alt")
TEXT_LOCALITY = ("loc", "loc_ans")
IMAGE_LOCALITY = ("m_loc", "m_loc_q", "m_loc_a")
FACTS = ("fact", "loc_fact", "m_loc_fact")
"""Optional fields that name the fact of the edit, of `loc` and of `m_loc_q`."""
ENTITIES = ("entity", "loc_entity", "m_loc_entity")
"""Optional fields that name the thing that `image` shows, that `loc` is about, and that `m_loc` shows."""
IMAGES = ("image", "image_rephrase", "m_loc")
"""Fields that hold a picture."""
_VIDEO = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_QUESTIONS = ("src", "rephrase", "m_loc_q")
"""Fields that hold a question about a picture."""
STANDARD_PROBES = tuple(name for name in METRICS if name != RELIABILITY)
MAX_CHARACTERS = 50_000
"""Longest text of a field."""
REPHRASE_PREFIX = "rephrase:"
"""Prefix of an image path that is relative to the rephrase root. Paths in `image_rephrase` always are."""

Root = Literal["image", "rephrase"]


@dataclass(frozen=True)
class ImageReference:
    """An image path of a record, and the root that it is relative to."""

    path: str
    root: Root = "image"


@dataclass(frozen=True)
class ProbeText:
    """A probe whose image has not been read."""

    prompt: str
    target: str
    image: ImageReference | None = None
    is_caption: bool = False
    fact: str | None = None
    entity: str | None = None


def task_of(fields: Mapping[str, Any], default: str) -> str:
    """The record's own task, else the default. With `auto`, the prompt "a photo of" means caption."""
    own = fields.get("task")
    if own in TASKS:
        return str(own)
    if default in TASKS:
        return default
    src = fields.get("src")
    return "caption" if isinstance(src, str) and src.strip() == CAPTION_PROMPT else "vqa"


def without_markers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with leading image markers removed from questions about pictures. Values of a wrong type stay."""
    changed: dict[str, Any] = {}
    changed |= {name: without_leading_marker(fields[name]) for name in _QUESTIONS if isinstance(fields.get(name), str)}
    for name in ("probes", "held_out"):
        if isinstance(fields.get(name), dict):
            changed[name] = {key: _without_marker(entry) for key, entry in fields[name].items()}
    return {**fields, **changed}


def _without_marker(entry: Any) -> Any:
    if not isinstance(entry, dict) or entry.get("image") is None or not isinstance(entry.get("prompt"), str):
        return entry
    return entry | {"prompt": without_leading_marker(entry["prompt"])}


def edit_text(fields: Mapping[str, Any], task: str) -> ProbeText:
    """The edit itself: question, new answer and image."""
    image = image_reference(fields["image"])
    return ProbeText(fields["src"], fields["alt"], image, task == "caption", entity=fields.get("entity"))


def probe_texts(fields: Mapping[str, Any], task: str) -> dict[str, ProbeText]:
    """Probes by metric name: those of MMEdit that the record has, then its `probes`."""
    edit = edit_text(fields, task)
    standard: dict[str, ProbeText] = {}
    if has(fields, "rephrase"):
        standard["t_gen"] = replace(edit, prompt=fields["rephrase"])
    if has(fields, "image_rephrase"):
        path = fields["image_rephrase"].removeprefix(REPHRASE_PREFIX)
        standard["m_gen"] = replace(edit, image=ImageReference(path, "rephrase"))
    if has(fields, *TEXT_LOCALITY):
        question = ProbeText(fields["loc"], fields["loc_ans"])
        standard["t_loc"] = replace(question, fact=fields.get("loc_fact"), entity=fields.get("loc_entity"))
    if has(fields, *IMAGE_LOCALITY):
        question = ProbeText(fields["m_loc_q"], fields["m_loc_a"], image_reference(fields["m_loc"]))
        standard["m_loc"] = replace(question, fact=fields.get("m_loc_fact"), entity=fields.get("m_loc_entity"))
    return standard | _extension_texts(fields, "probes", task)


def has(fields: Mapping[str, Any], *names: str) -> bool:
    """Whether a record has these fields; an empty text is none."""
    return all(fields.get(name) not in (None, "") for name in names)


def old_answer(fields: Mapping[str, Any]) -> str | None:
    """The answer that the edit replaces, according to the record; None if it has none."""
    return str(fields.get("pred") or "").strip() or None


def held_out_texts(fields: Mapping[str, Any], task: str) -> dict[str, ProbeText]:
    """Probes by supervision slot: the record's `held_out`."""
    return _extension_texts(fields, "held_out", task)


def request_images(fields: Mapping[str, Any]) -> list[ImageReference]:
    """Distinct images of a record, the edit's first."""
    task = task_of(fields, "auto")
    probes = [edit_text(fields, task), *probe_texts(fields, task).values(), *held_out_texts(fields, task).values()]
    return list(dict.fromkeys(probe.image for probe in probes if probe.image is not None))


def scored_things(fields: Mapping[str, Any], task: str) -> frozenset[str]:
    """Facts and entities of the probes whose answers must stay, see `odedit.inputs.batch.things_of`."""
    stay = (text for name, text in probe_texts(fields, task).items() if is_locality(name))
    return frozenset().union(*(things_of(text.fact, text.entity) for text in stay))


def supervising_things(fields: Mapping[str, Any]) -> frozenset[str]:
    """Facts and entities of the questions that a record of the pool may supervise others with."""
    pairs = zip((fields.get(name) for name in FACTS), (fields.get(name) for name in ENTITIES), strict=True)
    return frozenset().union(*(things_of(fact, entity) for fact, entity in pairs))


def image_reference(text: str) -> ImageReference:
    """Reference of an image string: to the rephrase root if it begins with `rephrase:`, else to the image root."""
    if text.startswith(REPHRASE_PREFIX):
        return ImageReference(text.removeprefix(REPHRASE_PREFIX), "rephrase")
    return ImageReference(text)


def _extension_texts(fields: Mapping[str, Any], name: str, task: str) -> dict[str, ProbeText]:
    texts = {}
    for key, entry in (fields.get(name) or {}).items():
        image = None if entry.get("image") is None else image_reference(entry["image"])
        is_caption = _is_caption(entry["prompt"], fields["src"], task, asks_the_fact=not is_locality(key))
        named = (entry.get("fact"), entry.get("entity"))
        texts[key] = ProbeText(entry["prompt"], entry["target"], image, is_caption, *named)
    return texts


def _is_caption(prompt: str, src: str, task: str, *, asks_the_fact: bool) -> bool:
    """True when an extra prompt begins a caption, as rewordings of an edited caption do."""
    return prompt.strip() == CAPTION_PROMPT or (task == "caption" and (asks_the_fact or prompt == src))


def problem_of_fields(fields: Mapping[str, Any], task: str) -> str:
    """The first problem of a record, as `<kind>: <what>`; empty if it can be used."""
    return next(_problems(fields, task), "")


def marker_problem(fields: Mapping[str, Any]) -> str:
    """The problem of a record with an image marker in a text; empty if it has none."""
    match = _first_in_texts(fields, image_marker)
    if match is None:
        return ""
    where, marker = match
    return (
        f"image marker: {where} holds {marker!r}, which would take an image position of its own. Only a marker in "
        "front of a question about a picture is taken off; remove it here"
    )


def control_token_problem(fields: Mapping[str, Any], find: Callable[[str], str | None]) -> str:
    """The problem of a record with a special token of the model's tokenizer in a text; empty if it has none.

    Args:
        find: Function made by `odedit.inputs.markers.control_token_finder`.
    """
    match = _first_in_texts(fields, find)
    if match is None:
        return ""
    where, token = match
    return (
        f"control token: {where} holds {token!r}, which the model's tokenizer reads as a special token and not "
        "as text; write it otherwise"
    )


def _first_in_texts(fields: Mapping[str, Any], find: Callable[[str], str | None]) -> tuple[str, str] | None:
    """The first match of `find` in the texts of a valid record: the field's name and the match."""
    for name in FIELDS:
        if name not in IMAGES and (match := find(fields.get(name) or "")) is not None:
            return f"field {shown(name, fields)!r}", match
    for name in ("probes", "held_out"):
        for key, entry in (fields.get(name) or {}).items():
            for part in ("prompt", "target"):
                if (match := find(entry[part])) is not None:
                    return f"{name}[{shorten(repr(key))}].{part}", match
    return None


def _problems(fields: Mapping[str, Any], task: str) -> Iterator[str]:
    yield from _kind_problems(fields)
    if fields.get("alt") == "":
        yield f"not an edit: field {shown('alt', fields)!r} is empty"
    yield from _missing(fields)
    for name in FIELDS:
        is_needed = name in REQUIRED or (_is_mmedit(fields) and not (name == "pred" and task == "caption"))
        if fields.get(name) is not None and (is_needed or fields[name] != ""):
            yield from _text_problem(fields, name, f"field {shown(name, fields)!r}")
    for name in (*FACTS, *ENTITIES):
        if fields.get(name) is not None:
            yield from _text_problem(fields, name, f"field {name!r}")
    own_task = fields.get("task")
    if own_task is not None and own_task not in TASKS:
        yield f"invalid task: field 'task' is {shorten(repr(own_task))}, expected one of {', '.join(TASKS)}"
    for name in ("probes", "held_out"):
        if fields.get(name) is not None:
            yield from _extension_problems(fields[name], name)
    # Last: it needs fields of the right types.
    yield from filter(None, [marker_problem(fields)])


def _is_mmedit(fields: Mapping[str, Any]) -> bool:
    """Whether a record has all fields of MMEdit, empty ones included."""
    return all(fields.get(name) is not None for name in FIELDS)


def _kind_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a record that is about a video or about several pictures."""
    for name in IMAGES:
        value = fields.get(name)
        if isinstance(value, list) and len(value) > 1:
            yield (
                f"several pictures: field {shown(name, fields)!r} lists {len(value)}, and an edit is about one; make a "
                "record of each"
            )
    videos = [name for name in ("video", "videos") if fields.get(name)]
    videos += [name for name in IMAGES if str(fields.get(name)).lower().endswith(_VIDEO)]
    if videos:
        yield f"video: field {shown(videos[0], fields)!r} names one, and an edit is about a picture; save a frame of it"


def _missing(fields: Mapping[str, Any]) -> Iterator[str]:
    """All missing fields in one problem: the required ones, and the rest of an incomplete probe."""
    missing = [name for name in REQUIRED if fields.get(name) is None]
    for group in (TEXT_LOCALITY, IMAGE_LOCALITY) if not _is_mmedit(fields) else ():
        absent = [name for name in group if not has(fields, name)]
        if absent != list(group):
            missing += absent
    names = [repr(shown(name, fields)) for name in missing]
    if len(names) > 1:
        yield f"missing fields: {', '.join(names[:-1])} and {names[-1]} are not there"
    elif names:
        yield f"missing field: field {names[0]} is not there"


def _extension_problems(entries: Any, name: str) -> Iterator[str]:
    if not isinstance(entries, dict):
        yield f"wrong type: field {name!r} is {type_name(entries)}, expected an object of prompt, target and image"
        return
    for key, entry in entries.items():
        yield from _name_problem(key, name)
        where = f"{name}[{shorten(repr(key))}]"
        if not isinstance(entry, dict):
            yield f"wrong type: {where} is {type_name(entry)}, expected an object"
            continue
        optional = ("image", "fact", "entity") if name == "probes" else ("image",)
        for part in ("prompt", "target", *optional):
            if part not in optional or entry.get(part) is not None:
                yield from _text_problem(entry, part, f"{where}.{part}")
        unknown = sorted(set(entry) - {"prompt", "target", *optional})
        if unknown:
            allowed = ", ".join(("prompt", "target", *optional[:-1]))
            yield f"unknown key: {where} has {shorten(repr(unknown[0]))}, expected {allowed} and {optional[-1]}"


def _name_problem(key: str, name: str) -> Iterator[str]:
    if name == "held_out":
        if not is_supervision(key):
            yield f"unknown slot: held_out has {shorten(repr(key))}, expected one of {SUPERVISION_ALLOWED}"
        return
    if key in (RELIABILITY, *STANDARD_PROBES):
        yield f"unknown probe: {key!r} is made from the record's own fields; give the further probe another name"
        return
    try:
        check_probe_name(key)
    except ValueError as error:
        yield f"unknown probe: {shorten(str(error).removeprefix('unknown probe '), 300)}"


def _text_problem(values: Mapping[str, Any], name: str, where: str, *, may_be_empty: bool = False) -> Iterator[str]:
    if values.get(name) is None:
        yield f"missing field: {where} is not there"
        return
    text = values[name]
    if not isinstance(text, str):
        yield f"wrong type: {where} is {type_name(text)}, expected text"
    elif not text.strip() and not may_be_empty:
        yield f"empty field: {where} is empty"
    elif len(text) > MAX_CHARACTERS:
        yield f"text too long: {where} has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}"
    elif not _is_unicode(text):
        yield (
            f"invalid text: {where} holds bytes that are no UTF-8, or half of a surrogate pair, which no tokenizer or "
            "table can store; save it as UTF-8"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def type_name(value: Any) -> str:
    """The type of a JSON value, as messages name it.

    >>> type_name([1]), type_name(None), type_name(2.5)
    ('a list', 'null', 'a number')
    """
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    names: list[tuple[type, str]] = [(bool, "true or false"), (str, "text"), (dict, "an object"), (list, "a list")]
    return next((name for kind, name in names if isinstance(value, kind)), "a number")


def shorten(text: str, length: int = 80) -> str:
    """The text cut to `length` characters, for messages."""
    return text if len(text) <= length else text[: length - 3] + "..."
