"""The fields of one record: what must be there, and which prompts, targets and images they make.

Every record is scored on the same five metrics, so a record that lacks one of the fields is skipped, as the
toolkit of MMEdit skips records with an empty field in E-VQA. `pred` may be empty in captions: nothing scored reads it.

An image marker in front of a question about a picture is taken off; a record that holds one elsewhere is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from odedit.evaluation.columns import METRICS
from odedit.inputs.batch import RELIABILITY, SUPERVISION_SLOTS, check_probe_name, is_locality
from odedit.inputs.markers import image_marker, without_leading_marker

TASKS = ("vqa", "caption")
CAPTION_PROMPT = "a photo of"
FIELDS = (
    "src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a",
)  # fmt: skip
_IMAGES = ("image", "image_rephrase", "m_loc")
_QUESTIONS = ("src", "rephrase", "m_loc_q")
"""Fields that hold a question about a picture."""
STANDARD_PROBES = tuple(name for name in METRICS if name != RELIABILITY)
MAX_CHARACTERS = 50_000
"""Of one text; more fills no model's context with anything that is meant."""
REPHRASE_PREFIX = "rephrase:"
"""Before an image's path: it lies under the rephrase root. `image_rephrase` always does, with or without."""

Root = Literal["image", "rephrase"]


@dataclass(frozen=True)
class ImageReference:
    """A path as the record has it, and the root it belongs under."""

    path: str
    root: Root = "image"


@dataclass(frozen=True)
class ProbeText:
    """A probe whose image is not read yet."""

    prompt: str
    target: str
    image: ImageReference | None = None
    is_caption: bool = False


def task_of(fields: Mapping[str, Any], default: str) -> str:
    """The record's own task; else the default; for `auto`, captions are told by their prompt."""
    own = fields.get("task")
    if own in TASKS:
        return str(own)
    if default in TASKS:
        return default
    src = fields.get("src")
    return "caption" if isinstance(src, str) and src.strip() == CAPTION_PROMPT else "vqa"


def without_markers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, each question about a picture without the image marker that it begins with. Odd values stay."""
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
    """What is edited: the question, its new answer and the image."""
    return ProbeText(fields["src"], fields["alt"], image_reference(fields["image"]), task == "caption")


def probe_texts(fields: Mapping[str, Any], task: str) -> dict[str, ProbeText]:
    """Metric name to probe: the four of MMEdit, then the record's `probes`."""
    edit = edit_text(fields, task)
    rephrase_image = ImageReference(fields["image_rephrase"].removeprefix(REPHRASE_PREFIX), "rephrase")
    standard = {
        "t_gen": replace(edit, prompt=fields["rephrase"]),
        "m_gen": replace(edit, image=rephrase_image),
        "t_loc": ProbeText(fields["loc"], fields["loc_ans"]),
        "m_loc": ProbeText(fields["m_loc_q"], fields["m_loc_a"], image_reference(fields["m_loc"])),
    }
    return standard | _extension_texts(fields, "probes", task)


def held_out_texts(fields: Mapping[str, Any], task: str) -> dict[str, ProbeText]:
    """Supervision slot to probe: the record's `held_out`."""
    return _extension_texts(fields, "held_out", task)


def request_images(fields: Mapping[str, Any]) -> list[ImageReference]:
    """Every image the record names, each once, the edit's first."""
    task = task_of(fields, "auto")
    probes = [edit_text(fields, task), *probe_texts(fields, task).values(), *held_out_texts(fields, task).values()]
    return list(dict.fromkeys(probe.image for probe in probes if probe.image is not None))


def image_reference(text: str) -> ImageReference:
    """Which root an image string means: the image root, or the rephrase root after `rephrase:`."""
    if text.startswith(REPHRASE_PREFIX):
        return ImageReference(text.removeprefix(REPHRASE_PREFIX), "rephrase")
    return ImageReference(text)


def _extension_texts(fields: Mapping[str, Any], name: str, task: str) -> dict[str, ProbeText]:
    texts = {}
    for key, entry in (fields.get(name) or {}).items():
        image = None if entry.get("image") is None else image_reference(entry["image"])
        is_caption = _is_caption(entry["prompt"], fields["src"], task, asks_the_fact=not is_locality(key))
        texts[key] = ProbeText(entry["prompt"], entry["target"], image, is_caption)
    return texts


def _is_caption(prompt: str, src: str, task: str, *, asks_the_fact: bool) -> bool:
    """Whether an additional prompt begins a caption: other wordings of an edited caption do, other questions do not."""
    return prompt.strip() == CAPTION_PROMPT or (task == "caption" and (asks_the_fact or prompt == src))


def problem_of_fields(fields: Mapping[str, Any], task: str) -> str:
    """The first thing that keeps a record from being used, as `<kind>: <what>`; empty if nothing does."""
    return next(_problems(fields, task), "")


def marker_problem(fields: Mapping[str, Any]) -> str:
    """What is wrong with a record whose texts hold an image marker; empty if none does."""
    found = _first_in_texts(fields, image_marker)
    if found is None:
        return ""
    return (
        f"image marker: {found[0]} holds {found[1]!r}, which would take an image position of its own. Only a marker in "
        "front of a question about a picture is taken off; remove it here"
    )


def control_token_problem(fields: Mapping[str, Any], find: Callable[[str], str | None]) -> str:
    """What is wrong with a record whose texts hold a special token of the model's tokenizer; empty if none does.

    Args:
        find: Function made by `odedit.inputs.markers.control_token_finder`.
    """
    found = _first_in_texts(fields, find)
    if found is None:
        return ""
    return (
        f"control token: {found[0]} holds {found[1]!r}, which the model's tokenizer reads as a special token and not "
        "as text; write it otherwise"
    )


def _first_in_texts(fields: Mapping[str, Any], find: Callable[[str], str | None]) -> tuple[str, str] | None:
    """The first text of a valid record that a model reads in which something is found, and what."""
    for name in FIELDS:
        if name not in _IMAGES and (found := find(fields.get(name) or "")) is not None:
            return f"field {name!r}", found
    for name in ("probes", "held_out"):
        for key, entry in (fields.get(name) or {}).items():
            for part in ("prompt", "target"):
                if (found := find(entry[part])) is not None:
                    return f"{name}[{shorten(repr(key))}].{part}", found
    return None


def _problems(fields: Mapping[str, Any], task: str) -> Iterator[str]:
    if fields.get("alt") == "":
        yield "not an edit: field 'alt' is empty"
    for name in FIELDS:
        yield from _text_problem(fields, name, f"field {name!r}", may_be_empty=name == "pred" and task == "caption")
    if fields.get("fact") is not None:
        yield from _text_problem(fields, "fact", "field 'fact'")
    own_task = fields.get("task")
    if own_task is not None and own_task not in TASKS:
        yield f"invalid task: field 'task' is {shorten(repr(own_task))}, expected one of {', '.join(TASKS)}"
    for name in ("probes", "held_out"):
        if fields.get(name) is not None:
            yield from _extension_problems(fields[name], name)
    # Reached by a record that is right in all else.
    yield from filter(None, [marker_problem(fields)])


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
        for part in ("prompt", "target", "image"):
            if part != "image" or entry.get(part) is not None:
                yield from _text_problem(entry, part, f"{where}.{part}")
        unknown = sorted(set(entry) - {"prompt", "target", "image"})
        if unknown:
            yield f"unknown key: {where} has {shorten(repr(unknown[0]))}, expected prompt, target and image"


def _name_problem(key: str, name: str) -> Iterator[str]:
    if name == "held_out":
        if key not in SUPERVISION_SLOTS[1:]:
            allowed = ", ".join(SUPERVISION_SLOTS[1:])
            yield f"unknown slot: held_out has {shorten(repr(key))}, expected one of {allowed}"
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
        yield f"invalid text: {where} holds half of a surrogate pair, which no tokenizer or table can store"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def type_name(value: Any) -> str:
    """What a JSON value is, for people.

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
    """At most `length` characters, so that a message with a user's text in it stays readable."""
    return text if len(text) <= length else text[: length - 3] + "..."
