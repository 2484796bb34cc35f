"""Messages of errors: one sentence about the cause, without the wrappers of libraries."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray.exceptions import RayTaskError, UserCodeException

from odedit.errors import InputError, cause_of, counted, in_words, listed, one_sentence

TEXT = (
    "\x1b[36mray::MapWorker(EditStage).submit()\x1b[39m (pid=7, ip=10.0.0.1)\n"
    '  File "actor.py", line 3, in work\n    raise Missing("x")\n'
    "torch.OutOfMemoryError: no room for 3 MiB\n\n"
    "The above exception was the direct cause of the following exception:\n\n"
    "\x1b[36mray::MapWorker(EditStage).submit()\x1b[39m (pid=7, ip=10.0.0.1)\n"
    "ray.exceptions.UserCodeException: UDF failed to process a data block."
)

CHAINED = (
    "Traceback (most recent call last):\n  File \"a.py\", line 3, in find\nKeyError: 'path'\n\n"
    "During handling of the above exception, another exception occurred:\n\n"
    'Traceback (most recent call last):\n  File "a.py", line 5, in find\n'
    "odedit.errors.InputError: data.path: there is no file\n"
)


def wrapped(error: BaseException) -> BaseException:
    """Stand-in for Ray Data's wrapper of a stage's exception."""
    outer = UserCodeException("UDF failed to process a data block.")
    outer.__cause__ = error
    return RayTaskError("submit", TEXT, outer, "ray::MapWorker", 7, "10.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("the site\n is not there"), "ValueError: the site is not there"),
        (InputError("editor.site: none"), "editor.site: none"),
        (wrapped(ArithmeticError("a number that is none")), "ArithmeticError: a number that is none"),
        (wrapped(InputError("editor.site: none")), "editor.site: none"),
        (RuntimeError(TEXT), "OutOfMemoryError: no room for 3 MiB"),
        (RuntimeError(CHAINED), "InputError: data.path: there is no file"),
        (RuntimeError("\x1b[31mred\x1b[0m"), "RuntimeError: red"),
        (RuntimeError(), "RuntimeError: no further explanation"),
    ],
)
def test_an_error_is_one_sentence_about_its_cause(error: BaseException, expected: str) -> None:
    assert one_sentence(error) == expected


def test_the_cause_is_found_where_only_the_text_of_it_was_sent() -> None:
    """Pickling, by which an error comes from a worker, drops `__cause__`."""
    error: Any = pickle.loads(pickle.dumps(UserCodeException("UDF failed to process a data block.")))
    task_error = RayTaskError("submit", TEXT, error, "ray::MapWorker", 7, "10.0.0.1")
    assert one_sentence(task_error.as_instanceof_cause()) == "OutOfMemoryError: no room for 3 MiB"


def test_an_error_of_one_process_is_its_own_cause() -> None:
    error = InputError("x")
    assert cause_of(error) is error


def test_nouns_have_their_numbers() -> None:
    assert [counted(number, "run") for number in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]


def test_an_error_inside_a_sentence_is_one_line_without_full_stop_and_secrets() -> None:
    assert in_words(OSError("no\n  connection to postgresql://me:secret@host/x.")) == (
        "no connection to postgresql://***@host/x"
    )
    assert in_words(KeyError("family")) == "unknown 'family'"
    assert in_words(RuntimeError()) == "RuntimeError"
    assert in_words(RuntimeError("x" * 201)) == "x" * 200 + " ..."


def test_a_few_of_many_names_are_shown() -> None:
    assert [listed(list("abcde"[:count])) for count in (0, 1, 3, 5)] == ["", "a", "a, b, c", "a, b, c and 2 more"]
    assert listed(["a", "b"], shown=1, separator="; ") == "a and 1 more"
