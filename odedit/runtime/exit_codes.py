"""Exit codes of commands: every error ends a command with one message on standard error.

Codes: 0 done, 1 failed or nothing usable, 2 invalid input, 130 interrupted, 141 standard output closed.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from odedit.errors import InputError, NothingUsable, cause_of, one_sentence
from odedit.runtime.addresses import masked

_OUTPUT_CLOSED = 141
"""Exit code of a process ended by SIGPIPE: 128 + 13."""


@contextmanager
def exit_on_error(
    interrupted: str = "Interrupted. What is finished is kept: the same command goes on from there.",
    *,
    debug: bool = False,
) -> Iterator[None]:
    """Converts an exception of the block to a message and an exit code.

    Args:
        interrupted: Message after Ctrl-C.
        debug: Also print the traceback of an unexpected error.
    """
    try:
        yield
    except InputError as error:
        print_error(str(cause_of(error)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print_error(interrupted)
        raise typer.Exit(130) from error
    except NothingUsable as error:
        print_error(str(error))
        raise typer.Exit(1) from error
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_output_closed():
            raise typer.Exit(_OUTPUT_CLOSED) from error
        if debug:
            print_error(traceback.format_exc().rstrip())
        print_error(f"Failed: {one_sentence(error)}" + ("" if debug else "\n(odedit --debug ... shows where.)"))
        raise typer.Exit(1) from error


def is_output_closed() -> bool:
    """True when the reader of standard output has ended, as `head` does. Then discards all further output."""
    if sys.stdout is None:  # closed before the command began
        return True
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        is_closed = bool(poll.poll(0))
    except BrokenPipeError:
        is_closed = True
    except (OSError, ValueError):  # standard output is not a file
        return False
    if is_closed:
        # Python flushes standard output at exit, which would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def print_error(text: str) -> None:
    """Prints a message to standard error, passwords masked."""
    print(masked(text), file=sys.stderr, flush=True)
