"""A running search: passes points to Ray Tune, and the trials' reports to Optuna, MLflow and the terminal.

`Asking` and `Listening` are its interface to Tune. Tune's own state is discarded; a search is resumed from Optuna's
storage and the files of the trials.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from odedit.errors import InputError, counted, one_sentence
from odedit.evaluation.statistics import MAIN
from odedit.storage.location import Location
from pipeline.config.checkpoints import fitted, with_absolute_checkpoints
from pipeline.config.run import RunConfig
from pipeline.config.values import flatten
from pipeline.console import say
from pipeline.interrupts import raise_if_interrupted
from pipeline.report.formatting import number
from pipeline.run_folder import rows as results
from pipeline.run_folder.curves import mean_curves
from pipeline.tracking.searches import SearchRun
from tune import points
from tune.config import SCORE, Search
from tune.points import COMPLETE, FAILED, PRUNED, Points, Trial
from tune.rungs import TrialWorkspace
from tune.scoring import Report
from tune.trainable import EDITS, JUDGED


class Running:
    """State of the running trials in the driver.

    Args:
        search: The search.
        asked: Source of points.
        folder: Folder of the search.
        tracker: Parent run in MLflow; None: no logging.
        console: Console for progress.
    """

    def __init__(
        self, search: Search, asked: Points, folder: Location, tracker: SearchRun | None, console: Console
    ) -> None:
        self._search, self._points, self._folder = search, asked, folder
        self._tracker, self._console = tracker, console
        self._trials: dict[str, Trial] = {}
        self._broken: list[Trial] = []
        self._failures: Counter[str] = Counter()
        self._started = time.monotonic()
        self.problem: InputError | None = None

    @property
    def is_done(self) -> bool:
        """True once no trial is running or waiting to be retried."""
        return not self._trials and not self._broken

    def ask(self, trial_id: str) -> dict[str, Any] | None:
        """The configuration of a new Tune trial, or None if no point is left."""
        raise_if_interrupted()
        try:
            trial = self._broken.pop(0) if self._broken else self._points.ask()
        except InputError as error:
            self.problem = error
            return None
        if trial is None:
            return None
        self._trials[trial_id] = trial
        asked = with_absolute_checkpoints(self._search.space.config(trial.point))
        try:
            config = fitted(asked)[0]
        except InputError:  # the trial will report it
            config = asked
        if self._tracker is not None:
            self._tracker.open_trial(trial.key, trial.number, self._parameters(trial), _tags(config))
        # Paths are absolute as in the run: a worker has another working directory.
        flat = flatten(config.to_dict())
        settings = self._search.space.settings(trial.point)
        settings |= {path: flat[path] for path, value in flatten(asked.to_dict()).items() if flat[path] != value}
        return {"key": trial.key, "settings": {path: flat.get(path, value) for path, value in settings.items()}}

    def _parameters(self, trial: Trial) -> dict[str, Any]:
        """The point, with the settings that it stands for."""
        return trial.point | self._search.space.settings(trial.point)

    def report(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Records a trial's report at a rung, unless it was recorded before the trial was resumed."""
        raise_if_interrupted()
        trial = self._trials[trial_id]
        if "report" not in result:
            return
        report: Report = json.loads(result["report"])
        edits = report["edits"]
        if edits in trial.reports:
            return
        self._points.report(trial, report)
        trial.reports[edits] = report
        if self._tracker is not None:
            self._tracker.log_rungs(trial.key, {edits: report})
        if edits < self._search.config.rungs.sizes[-1]:
            say(self._console, f"{_name(trial)} {self._figures(report)}")

    def complete(self, trial_id: str, error: str = "") -> None:
        """Closes a trial of Tune: complete, stopped early or failed."""
        trial = self._trials.pop(trial_id)
        last = max(trial.reports, default=0)
        is_whole = last >= self._search.config.rungs.sizes[-1]
        self.close(trial, FAILED if error else COMPLETE if is_whole else PRUNED, error)

    def close(self, trial: Trial, state: str, error: str = "") -> None:
        """Records the end of a trial in Optuna and MLflow."""
        self._points.finish(trial, state, error)
        if self._tracker is not None:
            self._log_end(trial, state, error)
        if state == COMPLETE and trial.last is not None:
            say(self._console, f"{_name(trial)} {self._figures(trial.last)}  done  {self.progress()}")
        elif state == PRUNED:
            say(
                self._console,
                f"{_name(trial)} stopped at {counted(max(trial.reports, default=0), 'edit')}  {self.progress()}",
            )
        else:
            say(self._console, f"{_name(trial)} failed: {error}  {self.progress()}")

    def _log_end(self, trial: Trial, state: str, error: str) -> None:
        assert self._tracker is not None
        workspace = TrialWorkspace(self._folder / "trials" / trial.key, self._folder / "validation")
        rows = list(results.read_rows(results.parts(workspace), ("status", "losses")))
        tags = {"odedit.edits": str(max(trial.reports, default=0))} | ({"odedit.error": error} if error else {})
        self._tracker.close_trial(trial.key, state, trial.reports, tags, mean_curves(rows), error)

    def catch_up(self) -> None:
        """Logs finished trials that are missing in MLflow, after a resumption or an outage of the store."""
        if self._tracker is None:
            return
        for trial in self._points.trials():
            if trial.state == points.RUNNING or self._tracker.is_closed(trial.key):
                continue
            config = self._search.space.config(trial.point)
            self._tracker.open_trial(trial.key, trial.number, self._parameters(trial), _tags(config))
            self._log_end(trial, trial.state, trial.error)

    def broke_off(self, trial_id: str, why: str) -> None:
        """Queues a trial whose worker died for another try, or closes it as failed after `retries`."""
        trial = self._trials[trial_id]
        self._failures[trial.key] += 1
        if self._failures[trial.key] > self._search.config.retries:
            self.complete(trial_id, why)
            return
        self._broken.append(self._trials.pop(trial_id))
        say(self._console, f"{_name(trial)} broke off ({why}); it goes on after its last finished group")

    def progress(self) -> str:
        """`| best so far: trial 3, .871 | 5 of 20 trials, 1:32`."""
        config = self._search.config
        every = self._points.trials()
        done = sum(trial.state != points.RUNNING for trial in every)
        seconds = round(time.monotonic() - self._started)
        leader = points.best(every, config)
        text = ""
        if leader is not None and leader.last is not None:
            shown = config.objectives if len(config.objectives) == 1 else (SCORE, *config.objectives)
            figures = ", ".join(f"{name} {number(leader.last.get(name, 0.0))}" for name in shown)
            text = f"| best so far: trial {leader.number}, {figures} "
        return f"{text}| {done} of {counted(config.trials, 'trial')}, {seconds // 60}:{seconds % 60:02d}"

    def _figures(self, report: Report) -> str:
        """`24 edits  score .842  rel 1.000 ...`."""
        names = dict.fromkeys((SCORE, *self._search.config.objectives, *MAIN))
        shown = "  ".join(f"{name} {number(report[name])}" for name in names if name in report)
        failed = f" ({report['failed']} failed)" if report.get("failed") else ""
        return f"{counted(report['edits'], 'edit')}{failed}  {shown}"


def _name(trial: Trial) -> str:
    return f"trial {trial.number}"


def _tags(config: RunConfig) -> dict[str, str]:
    return {
        "odedit.editor": config.editor.name,
        "odedit.objective": config.objective.name,
        "odedit.backbone": config.backbone.name,
        "odedit.supervision": results.supervision_name(config),
    }


class _Unsaved:
    """Objects that Tune pickles without their content."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Asking(_Unsaved, Searcher):
    """Source of points for Tune."""

    def __init__(self, running: Running) -> None:
        super().__init__(metric=JUDGED, mode="max")
        self._running = running

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        config = self._running.ask(trial_id)
        return config if config is not None else Searcher.FINISHED if self._running.is_done else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Left to `Listening`, which has the error."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: Optuna's storage holds the search."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a resumed search is a new experiment of Tune."""


class Listening(_Unsaved, Callback):
    """Receiver of Tune's events."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._running.report(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.complete(trial.trial_id, (trial.last_result or {}).get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.broke_off(trial.trial_id, _why(trial))


def _why(trial: Any) -> str:
    """A trial's error on one line."""
    error = trial.get_error()
    if isinstance(error, RayActorError) or error is None:
        return "its worker died"
    return one_sentence(error if isinstance(error, BaseException) else RuntimeError(error))


class _Halving(AsyncHyperBandScheduler):
    """Identifies trials by their points: a retried trial is a new one to Tune."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _by_point(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(super().on_trial_result(tune_controller, _by_point(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _by_point(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _by_point(trial))


def _by_point(trial: Any) -> Any:
    return SimpleNamespace(trial_id=trial.config["key"])


def scheduler(search: Search, earlier: Sequence[Trial]) -> TrialScheduler:
    """Asynchronous successive halving over the rungs, with the reports of `earlier` trials."""
    rungs = search.config.rungs
    if rungs.number == 1:
        return FIFOScheduler()
    halving = _Halving(
        time_attr=EDITS,
        metric=JUDGED,
        mode="max",
        grace_period=rungs.edits,
        max_t=rungs.sizes[-1],
        reduction_factor=rungs.factor,
    )
    for trial in earlier:
        known = SimpleNamespace(config={"key": trial.key})
        halving.on_trial_add(None, known)
        for report in trial.reports.values():
            judged = report.get(search.config.judged_by, 0.0)
            halving.on_trial_result(None, known, {EDITS: report["edits"], JUDGED: judged})
        halving.on_trial_remove(None, known)
    return halving
