"""Generator of `pipeline/SETTINGS.md`, the page of all settings, from the dataclasses that define them.

python -m pipeline.config.settings_page > pipeline/SETTINGS.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import yaml

from odedit import editors, objectives, ways
from odedit.settings import describe
from pipeline.config import strict
from pipeline.config.run import Choice, RunConfig

_HEADER = """# Settings

Every setting of a run, by its path: in a YAML `editor: {name: wise, max_steps: 20}`, on the command line
`editor.max_steps=20`. A YAML holds only what differs from the defaults. The page is generated from the code:
`python -m pipeline.config.settings_page > pipeline/SETTINGS.md`; a test fails when it is out of date.
"""
_PLUGINS = (Choice,)
"""Types of sections whose settings depend on the plug-in named in them."""
_KINDS: dict[str, tuple[str, Any, str]] = {
    "editor": ("name", editors, "How an edit changes the model: a file in `odedit/editors`."),
    "objective": ("name", objectives, "What an edit minimises: a file in `odedit/objectives`."),
    "commit": ("way", ways, "How the records become one model (`odedit commit`): a file in `odedit/ways`."),
}
"""Sections that name a plug-in: the setting that does so, the package, and what it chooses."""
_WAYS = """## Defaults under `odedit commit`

`odedit commit` replaces these defaults, by way. Settings of yours come first. A section of yours that names another
editor or objective has the defaults of the tables above. `keep_edits` is `false`: the model is the result.
"""
_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")


@dataclass(frozen=True)
class Setting:
    """One line of the page.

    Attributes:
        path: Dotted name.
        allowed: Type in words.
        default: Default in YAML.
        meaning: Description from the docstring of its dataclass.
    """

    path: str
    allowed: str
    default: str
    meaning: str


def settings(cls: type, path: str = "") -> Iterator[Setting]:
    """Settings of a dataclass and of its sections, in the order of the code."""
    hints = get_type_hints(cls, include_extras=True)
    meanings = attribute_texts(cls)
    presets = getattr(cls, "PRESETS", {})
    if presets:
        yield Setting(f"{path}.preset", describe(Literal[tuple(presets)]), next(iter(presets)), _presets_text(presets))
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        where = f"{path}.{field.name}" if path else field.name
        section = strict.section_type(hints[field.name])
        if section in _PLUGINS:
            continue
        if section is not None:
            yield from settings(section, where)
            continue
        yield Setting(where, describe(hints[field.name]), _default(field), meanings.get(field.name, ""))


def attribute_texts(cls: type) -> dict[str, str]:
    """Descriptions by setting, from the `Attributes:` of a dataclass's docstring and of its bases' docstrings."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        names: list[str] = []
        inside = False
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            if line.strip() == "Attributes:":
                inside = True
            elif inside and (match := _ATTRIBUTE.match(line)):
                names = match[1].split(", ")
                texts |= dict.fromkeys(names, match[2])
            elif inside and line.startswith("     "):
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            elif inside and line.strip():
                inside = False
    return texts


def _presets_text(presets: Mapping[str, Mapping[str, Any]]) -> str:
    lists = [
        f"{name}: {', '.join(f'{key} {yaml.safe_dump(value).split(chr(10))[0]}' for key, value in values.items())}"
        for name, values in presets.items()
    ]
    return f"Values of the settings below that are not given. {'; '.join(lists)}."


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    return _yaml(value)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple | frozenset):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def page() -> str:
    """The whole page, as Markdown."""
    parts = [_HEADER]
    for field in dataclasses.fields(RunConfig):
        section = strict.section_type(get_type_hints(RunConfig)[field.name])
        if section is None or section in _PLUGINS:
            continue
        parts.append(_table(f"`{field.name}`", settings(section, field.name)))
    parts.append(_table("Choice of editor, objective and way", _choices()))
    for kind, (key, package, _) in _KINDS.items():
        for name in package.names():
            parts.append(_table(f"`{kind}: {{{key}: {name}}}`", settings(package.find(name).Config, kind)))
    parts.append(_way_defaults())
    top = [setting for setting in settings(RunConfig) if "." not in setting.path]
    parts.append(_table("Top level", iter(top)))
    return "\n".join(parts)


def _choices() -> Iterator[Setting]:
    """Settings that name a plug-in."""
    for kind, (key, package, meaning) in _KINDS.items():
        names = " or ".join(map(repr, package.names()))
        yield Setting(f"{kind}.{key}", f"{names} or a dotted module", _default_name(kind), meaning)


def _default_name(kind: str) -> str:
    """Name of the plug-in of a section that names none."""
    return ways.DEFAULT if kind == "commit" else str(getattr(RunConfig(), kind).name)


def _way_defaults() -> str:
    """Table of the settings whose defaults a way replaces under `odedit commit`."""
    lines = [_WAYS, "| way | setting | default there | instead of |", "|---|---|---|---|"]
    for way in ways.names():
        for section, values in ways.find(way).defaults.items():
            for name, value in values.items():
                before = _yaml(_default_at(section, name, values))
                lines.append(f"| `{way}` | `{section}.{name}` | `{_cell(_yaml(value))}` | `{_cell(before)}` |")
    return "\n".join(lines) + "\n"


def _default_at(section: str, name: str, values: Mapping[str, Any]) -> Any:
    """Default of a setting in a run that names no way, with the plug-in that `values` names."""
    if section not in _KINDS:
        return getattr(getattr(RunConfig(), section), name)
    key, package, _ = _KINDS[section]
    if name == key:
        return _default_name(section)
    return getattr(package.find(values.get(key, _default_name(section))).Config(), name)


def _table(title: str, rows: Iterator[Setting]) -> str:
    lines = [f"## {title}\n", "| setting | values | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{row.path}` | {_cell(row.allowed)} | `{_cell(row.default)}` | {_cell(row.meaning)} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
