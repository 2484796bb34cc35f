"""Run of a search: check, try points, compare the best with the defaults, report."""

from __future__ import annotations

import logging
import os
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from odedit.errors import InputError, NothingUsable, counted
from odedit.storage.location import Location, delete_all, locate
from pipeline.config.checkpoints import editor_weights, fitted, with_absolute_checkpoints
from pipeline.config.reachable import check_server
from pipeline.config.run import RunConfig
from pipeline.config.values import flatten, masked_values
from pipeline.config.version import code_version
from pipeline.console import say
from pipeline.driver.preflight import check as check_run
from pipeline.driver.preflight import check_records
from pipeline.driver.run import Outcome, run_many
from pipeline.interrupts import terminate_as_interrupt
from pipeline.run_folder import sources
from pipeline.run_folder.workspace import Workspace, new_local_folder
from pipeline.tracking.connection import store_uri
from pipeline.tracking.searches import KIND, SearchRun
from pipeline.workers import ray_session
from pipeline.workers.model import with_checked_store
from pipeline.workers.plan import Job, Plan
from tune import points, report, rungs
from tune.config import Search, SearchConfig, check
from tune.folder import (
    BEFORE_THE_FIRST_TRIAL,
    TUNE_FOLDER,
    Folder,
    alone,
    check_folder,
    clear_folder,
    remember,
    remove_folder,
)
from tune.points import Points, Trial

_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"}


def run(config: SearchConfig, out: Path | str, console: Console, *, resume: bool = False) -> report.Finished:
    """Runs or resumes a search.

    Args:
        config: Settings of the search.
        out: Folder or address.
        console: Console for progress.
        resume: Require a search in `out`.

    Raises:
        InputError: A setting is wrong, a store cannot be used, or `out` holds something else.
        NothingUsable: No trial was completed.
        TrackingError: The search is complete, but MLflow could not be written to.
    """
    search = check(config)
    points.check_driver(config)
    folder = Folder.of(out)
    if search.trial.tracking.enabled:
        store_uri(search.trial.tracking, folder.evaluation)
    check_folder(search, folder, resume=resume)
    with ExitStack() as stack:
        is_begun = bool(folder.state)
        if is_begun:  # a search that another process runs is refused at once
            stack.enter_context(alone(folder))
        _check_runs(search, folder)
        stack.enter_context(new_local_folder(folder.out))
        if not is_begun:
            stack.enter_context(alone(folder))
        for context in (terminate_as_interrupt(), ray_session.shared()):
            stack.enter_context(context)
        clear_folder(search, folder, resume=resume)
        with new_local_folder(folder.out, BEFORE_THE_FIRST_TRIAL):
            (folder.out / "trials").make_folder()
            base, records = _prepared(search, folder, console)
            groups = rungs.stage(base, records, folder.validation, config.rungs.sizes, config.seed)
            remember(search, folder, records)
            state = folder.state
            asked = Points(config, search.space, folder.out, state["search_id"], state["study"])
            if sum(trial.state != points.RUNNING for trial in asked.trials()) < config.trials:
                ray_session.check_reachable(search.trial.pipeline)
            tracker = _tracker(search, folder)
        try:
            job = Job(base, records, Workspace(folder.validation))
            return _run(search, folder, job, groups, asked, tracker, console)
        except BaseException as error:
            if tracker is not None:
                tracker.end(error)
            raise


def _run(
    search: Search,
    folder: Folder,
    job: Job,
    groups: list[list[int]],
    asked: Points,
    tracker: SearchRun | None,
    console: Console,
) -> report.Finished:
    from tune.search import Running

    config = search.config
    running = Running(search, asked, folder.out, tracker, console)
    before = asked.trials()
    done = sum(trial.state != points.RUNNING for trial in before)
    say(console, f"{config.title}: {done} of {counted(config.trials, 'trial')} done in {folder.out}")
    if done < len(before) or done < config.trials:
        started = time.monotonic()
        try:
            _try_points(search, folder, job, groups, running, before, console)
        finally:
            folder.update(seconds=folder.state.get("seconds", 0.0) + time.monotonic() - started)
    if running.problem is not None:
        raise running.problem
    running.catch_up()
    every = asked.trials()
    if len(every) < config.trials:
        say(console, f"The space holds {len(every)} different points, and all were tried.")
    best = points.best(every, config)
    if best is None:
        reasons = next((f" The first: {trial.error}" for trial in every if trial.error), "")
        raise NothingUsable(f"No trial was completed ({len(every)} tried).{reasons}")
    changed = _evaluation_config(search, folder, best)
    (folder.out / "best.yaml").write_text(_best_yaml(changed, best))
    outcomes = _evaluate(search, folder, changed, best, console)
    finished = report.write(search, folder.out, asked.study, every, best, outcomes, folder.state.get("seconds", 0.0))
    if tracker is not None:
        _log(search, tracker, every, best, outcomes, finished)
        # Log what was missed while the store did not answer.
        tracker.failed = None
        running.catch_up()
        tracker.check()
        tracker.end()
    return finished


def _check_runs(search: Search, folder: Folder) -> None:
    """Raises InputError if the final comparison or the trials cannot run; writes nothing.

    Validation records are checked when they are staged.
    """
    if "://" in (search.config.storage or ""):
        check_server(str(search.config.storage), "storage")
    is_finished = (folder.out / "summary.json").exists()
    for name, config in (("evaluation", search.defaults), ("validation", search.trial)):
        try:
            config, *_ = check_run(
                replace(config, out=folder.run_out(name)), servers=not is_finished, is_storage_tried=True
            )
            if name == "evaluation" and not is_finished:
                check_records(config)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def _prepared(search: Search, folder: Folder, console: Console) -> tuple[RunConfig, sources.Sources]:
    """The run that every trial varies, and its records."""
    config = search.trial
    config, notes = fitted(with_checked_store(with_absolute_checkpoints(config)))
    for note in (*notes, *search.notes):
        say(console, f"Note: {note}")
    editor_weights(config)
    located = {}
    # Evaluation records are looked for before hours of trials, too.
    for name, run_config in (("evaluation", search.defaults), ("validation", config)):
        try:
            # An embedded benchmark is written once for both.
            rephrases = run_config.supervision.rephrases
            located[name] = sources.resolve(run_config.data, folder.run_out(name), rephrases)
            located[name].identity()
            located[name].reader.check_roots()
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return config, located["validation"]


def _tracker(search: Search, folder: Folder) -> SearchRun | None:
    settings = search.trial.tracking
    if not settings.enabled:
        return None
    state, config = folder.state, search.config
    tracker = SearchRun.start(
        store_uri(settings, folder.evaluation),
        settings.experiment,
        settings.run_name or folder.out.name,
        state["search_id"],
        flatten({name: value for name, value in config.to_dict().items() if name != "storage"}),
        {
            "odedit.version": code_version(),
            "odedit.study_name": state["study"],
            "odedit.editor": search.trial.editor.name,
            "odedit.objective": search.trial.objective.name,
            "odedit.sampler": config.sampler,
            "odedit.objectives": ", ".join(config.objectives),
        },
        state.get("run_id"),
    )
    folder.update(run_id=tracker.parent.run_id)
    return tracker


def _try_points(
    search: Search,
    folder: Folder,
    job: Job,
    groups: list[list[int]],
    running: Any,
    before: list[Trial],
    console: Console,
) -> None:
    config = search.config
    spread = replace(job.config.pipeline, actors=config.concurrent, preparers=1)
    for trial in before:
        if trial.state == points.RUNNING:
            # A worker that ended with the search does not count as an attempt of its edits.
            delete_all((folder.out / "trials" / trial.key / "attempts").glob())
    try:
        # Ray comes first: its own signal handler, which ends the process at once, must be replaced.
        with (
            ray_session.connected(spread, job.config.backbone, config.concurrent, console) as plan,
            terminate_as_interrupt(),
        ):
            _fit(search, folder, _on(job, plan), groups, running, before, plan, console)
    except InputError as error:
        raise InputError(str(error).replace("pipeline.actors", "concurrent")) from error


def _on(job: Job, plan: Plan) -> Job:
    """The job with the device, threads and memory share of the plan."""
    return replace(job, device=plan.device, num_threads=plan.threads_per_actor, memory_share=plan.memory_share)


def _fit(
    search: Search,
    folder: Folder,
    job: Job,
    groups: list[list[int]],
    running: Any,
    before: list[Trial],
    plan: Plan,
    console: Console,
) -> None:
    """Runs trials with Ray Tune until there are enough."""
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the handler would end the search as if it were complete
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray import tune
        from ray.tune.execution import class_cache

        from tune.search import Asking, Listening, scheduler
        from tune.trainable import EditTrial
    # Tune copies the driver's keys into each trial's runtime environment, which nodes log and the dashboard shows.
    # Trials take keys from their node or job instead, as the workers of `odedit edit` do.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_KEYS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    config = search.config
    takes = f"{plan.gpus_per_actor:g} GPU" if plan.device == "cuda" else counted(plan.threads_per_actor, "CPU thread")
    edits = ", ".join(map(str, config.rungs.sizes))
    say(console, f"Plan: {config.concurrent} at a time on {takes} each, scored on {edits} edits. Starting workers ...")
    trainable = tune.with_parameters(
        EditTrial,
        job=job,
        rungs=groups,
        sizes=config.rungs.sizes,
        folder=folder.out,
        judged_by=config.judged_by,
    )
    with _tune_folder(folder) as temporary:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": plan.cpus_per_actor, "gpu": plan.gpus_per_actor}),
            tune_config=tune.TuneConfig(
                search_alg=Asking(running),
                scheduler=scheduler(search, before),
                num_samples=-1,  # until `Asking` has no more points
                max_concurrent_trials=config.concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=temporary.path,
                storage_filesystem=None if temporary.is_local else temporary.filesystem,
                # `Running` retries trials itself: Tune does not retry one whose worker dies while it is started.
                failure_config=tune.FailureConfig(max_failures=0),
                # The result files of a trial are its checkpoint.
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                callbacks=[Listening(running)],
                verbose=0,
            ),
        ).fit()


@contextmanager
def _tune_folder(folder: Folder) -> Iterator[Location]:
    """A folder for Tune's own state, deleted at the end."""
    temporary = folder.out / f"{TUNE_FOLDER}{uuid.uuid4().hex[:8]}"
    temporary.make_folder()
    try:
        yield temporary
    finally:
        remove_folder(temporary)


def _evaluation_config(search: Search, folder: Folder, trial: Trial) -> RunConfig:
    """The trial's run on the evaluation records, with absolute paths."""
    if search.space.defaults() == trial.point:
        return _named(folder, search.defaults, "defaults")
    return _named(folder, search.space.config(trial.point), f"trial-{trial.number}")


def _named(folder: Folder, config: RunConfig, name: str) -> RunConfig:
    uri = store_uri(config.tracking, folder.evaluation) if config.tracking.enabled else config.tracking.uri
    return replace(
        fitted(with_absolute_checkpoints(config))[0],
        data=sources.with_absolute_paths(config.data),
        out=folder.run_out(name),
        tracking=replace(config.tracking, uri=uri, run_name=name.replace("-", " ")),
    )


def _best_yaml(config: RunConfig, trial: Trial) -> str:
    """The best trial's run as YAML, without passwords."""
    values: Mapping[str, Any] = config.to_dict()
    public = masked_values(values)
    if public["tracking"]["uri"] != values["tracking"]["uri"]:
        public["tracking"]["uri"] = None
    text = yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
    note = "" if public == values else "# Addresses are without their passwords; tracking.uri has to be given again.\n"
    return f"# The settings of trial {trial.number}, on the evaluation records.\n{note}{text}"


def _evaluate(search: Search, folder: Folder, changed: RunConfig, best: Trial, console: Console) -> dict[str, Outcome]:
    """Runs the defaults, and the best settings unless these are the defaults, on the evaluation records."""
    configs = {"defaults": _named(folder, search.defaults, "defaults")}
    if changed != configs["defaults"]:
        configs["best"] = changed
    say(console, f"Best on the validation records: trial {best.number}. Now on the evaluation records:")
    outcomes = dict(zip(configs, run_many(list(configs.values()), console), strict=True))
    folder.update(evaluated=[locate(config.out, "out").name for config in configs.values()])
    return outcomes


def _log(
    search: Search,
    tracker: SearchRun,
    every: list[Trial],
    best: Trial,
    outcomes: Mapping[str, Outcome],
    finished: report.Finished,
) -> None:
    """Logs the results to the search's parent run in MLflow, and tags the trials on the front."""
    for name, outcome in outcomes.items():
        tracker.tag_run(outcome.run_id, {KIND: "evaluation", "odedit.arm": name})
    settings = {f"best.{path}": str(value) for path, value in search.space.settings(best.point).items()}
    run_id = tracker.trials[best.key].run_id if best.key in tracker.trials else ""
    tracker.log_search(
        finished.files,
        finished.metrics,
        settings | {"best.trial": str(best.number), "best.run_id": run_id},
        finished.markdown,
    )
    for trial in every:
        if trial.key in tracker.trials and trial in finished.front:
            tracker.tag_run(tracker.trials[trial.key].run_id, {"odedit.best": "true" if trial is best else "front"})
