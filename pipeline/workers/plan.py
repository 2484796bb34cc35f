"""The job of a worker, and the plan: how many workers run, and the resources of each."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from odedit import world
from odedit.errors import InputError, counted
from odedit.evaluation.edited import Edited
from odedit.runtime.brief import brief
from odedit.ways.base import Fit
from pipeline.config.run import AUTO, EMBEDDED, BackboneConfig, PipelineConfig, RunConfig
from pipeline.run_folder.sources import Sources
from pipeline.run_folder.workspace import Workspace

CPUS_PER_THREAD = 0.75
"""CPUs that an actor requests from Ray per thread; the rest is for the workers that prepare pictures."""
CPUS_PER_PREPARER = 0.25
SMALL_MODEL_BYTES = 2**30
GROUPS_PER_ACTOR = 32
"""Groups of a small model per actor: starting one takes longer than editing a few groups. The command's own process
edits up to as many."""


@dataclass(frozen=True)
class ScoredModel:
    """A whole model that records are scored on.

    Attributes:
        checkpoint: Folder or hub id of a checkpoint; None: `committed` is scored.
        committed: File of a committed model that acts on the unedited one, see `odedit.ways.common.files`.
        edited: What the records in the model edit.
        left_out: Reason per record that is not in the model and gets a skipped row, by the record's index.
        fits: How each record was learned, by edit id; empty if unknown.
        columns: Columns of every row that describe the model.
        text: Text file whose perplexity is measured; None: none.
        trusted: Whether the model is of the present run, which may use ways and editors from outside the package.
    """

    checkpoint: str | None
    committed: str | None = None
    edited: Edited = field(default_factory=Edited)
    left_out: Mapping[int, str] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None

    __repr__ = brief
    trusted: bool = False


@dataclass(frozen=True)
class Job:
    """Inputs of a worker that are the same for all groups of a run; paths are absolute.

    Attributes:
        config: Configuration of the run without `tracking.uri`, which may hold a password; only the driver writes to
            MLflow.
        sources: Input files of the run.
        workspace: Folder of the run.
        device: Device of the model.
        num_threads: CPU threads of the worker.
        memory_share: Share of the device's memory that the worker may use.
        profile: Whether the worker reports its times by stage.
        scored: Model that the records are scored on; None: every record is edited by itself.
    """

    config: RunConfig
    sources: Sources
    workspace: Workspace
    device: str = "cpu"
    num_threads: int = 1
    memory_share: float = 1.0
    profile: bool = False
    scored: ScoredModel | None = None

    def __post_init__(self) -> None:
        tracking = replace(self.config.tracking, uri=None)
        object.__setattr__(self, "config", replace(self.config, tracking=tracking))


@dataclass(frozen=True)
class Plan:
    """The number of workers and their resources.

    Attributes:
        device: Device of the editing workers.
        num_actors: Number of editing workers (actors).
        threads_per_actor: CPU threads of each actor.
        gpus_per_actor: GPUs that Ray reserves for each actor.
        num_preparers: Number of workers that prepare pictures.
        in_process: Whether the command's own process is the only worker, and Ray is not started.
    """

    device: str
    num_actors: int
    threads_per_actor: int
    gpus_per_actor: float
    num_preparers: int
    in_process: bool = False

    @property
    def cpus_per_actor(self) -> float:
        """CPUs that Ray reserves for an editing worker."""
        return CPUS_PER_THREAD * self.threads_per_actor

    @property
    def num_cpus(self) -> int:
        """CPUs that Ray reserves for all workers, rounded up."""
        return math.ceil(self.num_actors * self.cpus_per_actor + self.num_preparers * CPUS_PER_PREPARER)

    @property
    def memory_share(self) -> float:
        """Share of a device's memory for one actor. On CPUs, all actors are assumed to run on one machine."""
        return min(self.gpus_per_actor, 1.0) if self.device == "cuda" else 1 / self.num_actors

    def __str__(self) -> str:
        threads = f" with {counted(self.threads_per_actor, 'thread')}" if self.device == "cpu" else ""
        if self.in_process:
            return f"this process on {self.device}{threads}"
        actors = f"{counted(self.num_actors, 'actor')} on {self.device}{threads}{' each' if threads else ''}"
        return f"{actors}, {counted(self.num_preparers, 'worker')} preparing pictures"


def local_plan(
    pipeline: PipelineConfig, backbone: BackboneConfig, num_groups: int, groups_per_actor: int = GROUPS_PER_ACTOR
) -> Plan:
    """The plan for this machine: the command's own process for few groups, unless a number of actors is set.

    Raises:
        InputError: See `make_plan`.
    """
    plan = make_plan(pipeline, backbone, machine_cpus(), machine_gpus(), num_groups, groups_per_actor)
    is_small = plan.num_actors == 1 and num_groups <= groups_per_actor
    return replace(plan, in_process=is_small and pipeline.actors == AUTO)


def make_plan(
    pipeline: PipelineConfig,
    backbone: BackboneConfig,
    num_cpus: int,
    num_gpus: float,
    num_groups: int,
    groups_per_actor: int = GROUPS_PER_ACTOR,
) -> Plan:
    """The plan for `num_groups` groups of edits on `num_cpus` CPUs and `num_gpus` GPUs.

    Args:
        groups_per_actor: Groups of a small model for which one more actor is started.

    Raises:
        InputError: `pipeline.device` is "cuda" and there is no GPU, or there are fewer than `backbone.gpus`.
    """
    if pipeline.device == "cuda" and not num_gpus:
        raise InputError("pipeline.device: got 'cuda', but no GPU is visible. Use 'auto' or 'cpu'.")
    on_gpu = pipeline.device != "cpu" and num_gpus > 0
    if backbone.gpus > 1 and (not on_gpu or backbone.gpus > num_gpus):
        where = f"there are {num_gpus:g}" if on_gpu or not num_gpus else "pipeline.device is 'cpu'"
        raise InputError(
            f"backbone.gpus: got {backbone.gpus}, but {where}; run on a node with as many GPUs, or leave it out."
        )
    per_actor = gpus_per_actor(pipeline, backbone)
    is_small = weights_bytes(backbone) < SMALL_MODEL_BYTES
    if on_gpu:
        auto_actors, auto_threads = max(1, int(num_gpus / per_actor)), 1
    elif is_small:
        # One thread: small matrix products gain nothing from more, and results do not depend on the number of CPUs.
        auto_actors, auto_threads = min(num_cpus, -(-num_groups // groups_per_actor)), 1
    else:
        auto_actors, auto_threads = 1, num_cpus
    return Plan(
        device="cuda" if on_gpu else "cpu",
        num_actors=auto_actors if pipeline.actors == AUTO else int(pipeline.actors),
        threads_per_actor=auto_threads if pipeline.threads_per_actor == AUTO else int(pipeline.threads_per_actor),
        gpus_per_actor=per_actor if on_gpu else 0.0,
        num_preparers=max(1, num_cpus // 2) if pipeline.preparers == AUTO else int(pipeline.preparers),
    )


def gpus_per_actor(pipeline: PipelineConfig, backbone: BackboneConfig) -> float:
    """GPUs that an actor on GPUs holds."""
    return float(backbone.gpus) if backbone.gpus > 1 else pipeline.gpus_per_actor


def shortage(plan: Plan, num_cpus: float, num_gpus: float) -> str:
    """The resource that a cluster of this size lacks for the plan, in words; "" if none."""
    if plan.gpus_per_actor * plan.num_actors > num_gpus + 1e-6 and plan.gpus_per_actor:
        actors = f"{counted(plan.num_actors, 'actor')} of {plan.gpus_per_actor:g} GPU each"
        return f"{actors} were asked for, the cluster has {num_gpus:g}"
    if plan.num_cpus > num_cpus:
        return f"{plan} need {plan.num_cpus} cores, the cluster has {num_cpus:g}"
    return ""


def lacking(plan: Plan, nodes: Iterable[Mapping[str, Any]]) -> str:
    """The resources of one actor if no node can hold it, in words; "" if a node can."""
    for node in nodes:
        resources = node["Resources"] if node["Alive"] else {}
        if resources.get("CPU", 0.0) >= plan.cpus_per_actor and resources.get("GPU", 0.0) >= plan.gpus_per_actor:
            return ""
    gpus = f" and {plan.gpus_per_actor:g} GPU" if plan.gpus_per_actor else ""
    return f"a worker takes {plan.cpus_per_actor:g} CPU{gpus}, and no node of the cluster has as much"


def machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def machine_gpus() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def weights_bytes(backbone: BackboneConfig) -> int:
    """Bytes of a local checkpoint's weight files; `SMALL_MODEL_BYTES` for an id of the Hugging Face hub."""
    if backbone.checkpoint == EMBEDDED:
        path = world.checkpoint_path(backbone.family)
    else:
        path = Path(backbone.checkpoint).expanduser()
    if not path.is_dir():
        return SMALL_MODEL_BYTES
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
