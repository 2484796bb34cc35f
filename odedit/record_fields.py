"""The fields of one record: what must be there, and which prompts, targets and images they make.

Every record is scored on the same five metrics, so a record that lacks one of the fields is skipped, as the
toolkit of MMEdit skips records with an empty field in E-VQA. `pred` may be empty in captions: nothing scored reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from odedit.edits import RELIABILITY, SUPERVISION_SLOTS, check_probe_name, is_locality

TASKS = ("vqa", "caption")
CAPTION_PROMPT = "a photo of"
FIELDS = (
    "src", "pred", "alt", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a",
)  # fmt: skip
STANDARD_PROBES = ("t_gen", "m_gen", "t_loc", "m_loc")
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
    names: list[tuple[type, str]] = [(bool, "true or false"), (str, "text"), (dict, "an object"), (list, "a list")]
    return next((name for kind, name in names if isinstance(value, kind)), "a number")


def shorten(text: str, length: int = 80) -> str:
    """At most `length` characters, so that a message with a user's text in it stays readable."""
    return text if len(text) <= length else text[: length - 3] + "..."
