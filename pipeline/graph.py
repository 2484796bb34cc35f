"""The Ray Data graph: groups -> prepare (CPU) -> edit (actors) -> reports. The actors write the results.

One group is one block, because a block is what Ray schedules, retries and loses. The two stages ask for different
resources, else Ray would fuse them and a GPU would wait for pictures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.data import ActorPoolStrategy, DataContext

from odedit.errors import InputError
from pipeline.actor import EditActor
from pipeline.prepare import Preparer, one_sentence, write_traceback
from pipeline.results import Row
from pipeline.spec import CPUS_PER_PREPARER, Job, Plan


class GraphError(RuntimeError):
    """The run cannot go on; the message is one sentence."""


def run_graph(job: Job, plan: Plan, groups: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    """Edits the groups; yields each one's number and reported rows as it is finished, in any order.

    Raises:
        InputError: A worker found that the settings do not fit the model.
        GraphError: A worker cannot start, or Ray gave up.
    """
    _quiet()
    num_actors, num_preparers = (min(number, len(groups)) for number in (plan.num_actors, plan.num_preparers))
    reports = (
        ray.data.from_items([{"group": group} for group in groups], override_num_blocks=len(groups))
        .map_batches(
            PrepareStage,
            fn_constructor_args=(job,),
            batch_size=1,
            num_cpus=CPUS_PER_PREPARER,
            compute=ActorPoolStrategy(size=num_preparers),
        )
        .map_batches(
            EditStage,
            fn_constructor_args=(job,),
            batch_size=1,
            num_cpus=plan.cpus_per_actor,
            num_gpus=plan.gpus_per_actor or None,
            compute=ActorPoolStrategy(size=num_actors),
        )
    )
    for report in _rows(reports):
        raise_fatal(report)
        yield int(report["group"]), json.loads(report["rows"])


def raise_fatal(report: Mapping[str, Any]) -> None:
    """Raises what a worker found to be wrong with the whole run, if that is what it reports."""
    if report["fatal"]:
        kind = InputError if report["is_input"] else GraphError
        raise kind(str(report["fatal"]))


def _rows(reports: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from reports.iter_rows()
    except ray.exceptions.RayError as error:
        raise GraphError(f"Ray ended the run: {one_sentence(error)}") from error


class _Stage:
    """A worker whose constructor cannot fail: what went wrong there is told with the first group instead.

    An exception in a constructor would reach the user as a page of traceback, after Ray had tried it again and again.
    """

    Worker: type

    def __init__(self, job: Job) -> None:
        self._worker: Any = None
        self._fatal: dict[str, Any] = {}
        try:
            self._worker = self.Worker(job)
        except Exception as error:
            write_traceback(job, self.Worker.__name__)
            self._fatal = {"fatal": one_sentence(error), "is_input": isinstance(error, InputError)}


class PrepareStage(_Stage):
    """`{"group"}` -> `{"prepared"}`: pickled, since a request is a nest of objects and not a table."""

    Worker = Preparer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = self._fatal or self._worker(int(batch["group"][0]))
        return {"prepared": [cloudpickle.dumps(prepared, protocol=5)]}


class EditStage(_Stage):
    """`{"prepared"}` -> one report per group."""

    Worker = EditActor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prepared = cloudpickle.loads(batch["prepared"][0])
        fatal = self._fatal or (prepared if isinstance(prepared, dict) else {})
        rows: list[Row] = []
        try:
            rows = [] if fatal else self._worker(prepared)
        except InputError as error:
            fatal = {"fatal": str(error), "is_input": True}
        except OSError as error:
            message = f"results cannot be written ({one_sentence(error)}). The same command goes on from there."
            fatal = {"fatal": message, "is_input": False}
        return {
            "group": [-1 if fatal else prepared.group],
            "rows": [json.dumps(rows)],
            "fatal": [fatal.get("fatal", "")],
            "is_input": [bool(fatal.get("is_input", False))],
        }


def _quiet() -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
