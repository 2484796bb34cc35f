"""Reading any configuration gives a run, a search or a study, or raises InputError with a printable message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odedit import editors
from odedit.errors import InputError
from pipeline.config import run as runs
from pipeline.study import spec as studies
from tests.support import fuzzing
from tune import config as searches

FUZZ = settings(fuzzing.FUZZ, max_examples=200)
EXTREME = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.0, 1e308, 1e-320, float("inf"), ""])
TEXT = st.text(st.characters(codec=None, exclude_characters="."), max_size=12)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | EXTREME
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
WORDS = "a editor [ ] { } &x *x ' \" # | > ? % @ 2026-01-01 1e9 .nan 0o7 10.0.0.2:1 !!python/object:os.system"
FRAGMENTS = [*WORDS.split(), ": ", "- ", "<<: ", "  ", "\n", "\t", "\x00", "\ufeff"]
BYTES = st.binary(max_size=100) | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(lambda x: "".join(x).encode())
NINES = [b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefghijklmno"]


def paths(values: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of every setting and section."""
    names = []
    for key, value in values.items():
        names.append(before + key)
        if isinstance(value, Mapping):
            names += paths(value, f"{before}{key}.")
    return names


EVERY_EDITOR = [runs.from_dict({"editor": {"name": name}}).to_dict() for name in editors.names()]
SETTINGS = sorted({path for values in EVERY_EDITOR for path in paths(values)})
CHANGES = st.dictionaries(st.sampled_from(SETTINGS) | TEXT, VALUE, min_size=1, max_size=3)


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested sections; a value in the way of a section is replaced."""
    values: dict[str, Any] = {}
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = values
        for part in parents:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = value
    return values


def refused(read, *arguments) -> str | None:
    """The printable message of the InputError, or None if the input is accepted."""
    try:
        read(*arguments)
    except InputError as error:
        text = str(error)
        assert text.strip() and all(len(line) < 2000 for line in text.splitlines())
        text.encode()
        return text
    return None


@FUZZ
@given(changes=CHANGES, editor=st.sampled_from(editors.names()))
def test_any_values_are_a_run_or_refused(changes, editor):
    values = nested({"editor.name": editor} | changes)
    if refused(runs.from_dict, values) is None:
        accepted = runs.from_dict(values)
        assert runs.from_dict(yaml.safe_load(accepted.to_yaml())) == accepted


@FUZZ
@given(data=BYTES)
@example(b"a: &a [*a]")
@example(b"editor: &a {name: *a}")
@example(b"a: &a [x]\n" + b"".join(NINES))
@example(b"[" * 50_000)
@example(b"a:\n" + b" - " * 5_000)
@example(b"seed: " + b"9" * 5000)
@example("editor: {name: 'wise\ud800'}".encode("utf-8", "surrogatepass"))
@example(b'editor: {name: "wise\\uD800"}')
@example(b"? [a, b]\n: 1")
@example(b"a: 0000-99-99")
def test_any_file_is_a_configuration_or_refused(tmp_path, data):
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    refused(runs.load, path)
    refused(searches.load, path)
    refused(studies.load, "table1", path)


@FUZZ
@given(text=st.sampled_from(SETTINGS).flatmap(lambda path: TEXT.map(lambda value: f"{path}={value}")) | TEXT)
def test_any_override_is_applied_or_refused(text):
    refused(runs.load, None, [text])


PARAMETER = st.dictionaries(
    st.sampled_from(["low", "high", "step", "log", "choices", "when", "scale", "number"]), VALUE, max_size=4
)
SPACE = st.dictionaries(st.sampled_from([*SETTINGS, "objective.bandwidths"]), PARAMETER | VALUE, max_size=3)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(paths(searches.SearchConfig().to_dict())), VALUE, max_size=2),
    space=SPACE,
)
def test_any_search_is_checked_or_refused(changes, space):
    refused(lambda: searches.check(searches.from_values(nested(changes | {"space": space}))))


@FUZZ
@given(
    name=st.sampled_from(studies.names()),
    changes=st.dictionaries(
        st.sampled_from(["axes", "baseline", "plot", "plot.x", "skip", "special", "settings", "seeds", "rows"]),
        VALUE,
        max_size=2,
    ),
    labels=st.dictionaries(TEXT, st.dictionaries(TEXT, CHANGES.map(nested) | VALUE, max_size=2) | VALUE, max_size=2),
)
def test_any_study_is_read_or_refused(tmp_path, name, changes, labels):
    path = Path(tmp_path) / "study.yaml"
    path.write_text(yaml.safe_dump(nested(changes | {"axes": labels})))
    refused(studies.load, name, path)
