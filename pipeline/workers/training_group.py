"""Ray Train for one committed model: starts the workers, and follows their progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from odedit.errors import InputError
from odedit.storage.location import Location
from pipeline.variables import environment
from pipeline.workers.committing import CommitJob, explained, failure, show_progress, work
from pipeline.workers.plan import Plan
from pipeline.workers.stages import GraphError

_POLL_S = 0.5
_QUIET = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # The state of a training is ours: Ray Train's own records of runs would lie in the user's home folder.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def train(commit_job: CommitJob, plan: Plan, num_workers: int, show: Callable[[Mapping[str, Any]], None]) -> None:
    """Runs the workers until the model is written.

    Args:
        show: Callback for the progress that the first worker writes.

    Raises:
        InputError: The records or the settings do not allow the model.
        GraphError: The workers failed more often than `pipeline.max_attempts` allows.
    """
    workspace = commit_job.job.workspace
    for file in (workspace.progress, workspace.problem):
        file.delete()
    own_files = workspace.out / ".ray-train"
    errors: list[BaseException] = []
    with environment(_QUIET):
        thread = threading.Thread(target=_fit, args=(commit_job, plan, num_workers, own_files, errors), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_POLL_S)
                show_progress(workspace, show)
        finally:
            own_files.delete_folder()
    is_made = not errors and workspace.committed.exists() and workspace.model.is_folder()
    problem = failure(workspace)
    if problem and not is_made:
        raise InputError(problem)
    if errors:
        if not isinstance(errors[0], Exception):
            raise errors[0]
        message = f"the workers ended the run: {explained(errors[0])} The same command goes on from there."
        raise GraphError(f"{message} Tracebacks: {workspace.errors}.") from errors[0]
    if not is_made:
        raise GraphError(f"the workers ended without a model in {workspace.out}. The same command goes on from there.")


def _fit(commit_job: CommitJob, plan: Plan, num_workers: int, own_files: Location, errors: list[BaseException]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": plan.cpus_per_actor} | ({"GPU": plan.gpus_per_actor} if plan.gpus_per_actor else {})
    trainer = TorchTrainer(
        work,
        train_loop_config={"commit": commit_job},
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=plan.gpus_per_actor > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="commit",
            storage_path=own_files.path,
            storage_filesystem=own_files.filesystem,
            failure_config=FailureConfig(max_failures=commit_job.job.config.pipeline.max_attempts - 1),
        ),
    )
    try:
        trainer.fit()
    except BaseException as error:
        errors.append(error)
