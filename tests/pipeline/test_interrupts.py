"""Ctrl-C and SIGTERM: none is lost, and none breaks off a write to a tracking database."""

import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from pipeline.interrupts import interrupts_delayed, raise_if_interrupted, terminate_as_interrupt
from pipeline.tracking.client import Store, Tracker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_whose_exception_is_swallowed_is_not_lost(number: signal.Signals) -> None:
    class Closing:
        def __del__(self) -> None:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)

    handler = signal.getsignal(number)
    raise_if_interrupted()
    with terminate_as_interrupt():
        with terminate_as_interrupt():
            closing = Closing()
            del closing
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    raise_if_interrupted()
    assert signal.getsignal(number) is handler


def test_an_error_caused_by_an_interrupt_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise FileNotFoundError("a lock that was not held yet")
    with pytest.raises(FileNotFoundError), terminate_as_interrupt():
        raise FileNotFoundError("no interrupt")


def test_an_interrupt_is_delayed_to_the_end_of_the_outermost_block_and_a_second_one_is_not() -> None:
    done = []
    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        with interrupts_delayed():
            with interrupts_delayed():
                signal.raise_signal(signal.SIGINT)
            done.append("the rest of the block")
        done.append("never")
    assert done == ["the rest of the block"]
    with terminate_as_interrupt():
        with pytest.raises(KeyboardInterrupt), interrupts_delayed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            done.append("never")
        with interrupts_delayed():  # while the interrupted command closes
            done.append("its end")
    assert done == ["the rest of the block", "its end"]


def test_a_write_to_a_database_is_whole_when_a_signal_arrives_in_it(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/mlflow.db")
    run = Tracker.create(store, store.experiment("interrupted"), "run", {})
    sent = []

    def interrupt(*_: Any) -> None:
        if not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)

    with terminate_as_interrupt():
        event.listen(Engine, "before_cursor_execute", interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                run.set_tags({"first": "1", "second": "2"})
        finally:
            event.remove(Engine, "before_cursor_execute", interrupt)
        run.set_tags({"third": "3"})
    tags = store.run(run.run_id).data.tags
    assert sent and {"first", "second", "third"} <= tags.keys()
