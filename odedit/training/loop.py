"""Trains the weights that an editor has of its own, before any edit: MEND's hypernetwork, UniKE's encoders.

The loop knows the `Trainable` protocol alone. It draws records in an order that the seed and the step fix, steps with
Adam, looks at validation records, keeps the best weights, and writes all it needs to go on to one file: a training
that was interrupted and resumed is bit for bit the one that was not.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor, Estimating, Mergeable, Trainable, TrainingSettings
from odedit.errors import Explained, listed
from odedit.inputs.batch import EditBatch, EditParams
from odedit.objectives.base import Objective
from odedit.objectives.common.terms import Terms
from odedit.runtime.brief import brief
from odedit.storage.location import Place, at
from odedit.training.multiplier import SharedMultiplier
from odedit.training.state import TrainingState, read_state, write_state

STATISTICS_RECORDS = 256
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

Figures = dict[str, float]
Progress = Callable[[TrainingState, Figures], None]


class TrainingError(Explained, RuntimeError):
    """Training cannot go on."""


class TrainingRecords(Protocol):
    """Records that can be drawn by number."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> EditBatch:
        """Their supervision batch (`SUPERVISION_SLOTS`)."""
        ...


@dataclass(frozen=True)
class Trained:
    """What training ended with.

    Attributes:
        weights: Those of the lowest validation loss.
        state: The state at the end.
    """

    weights: dict[str, Tensor]
    state: TrainingState

    __repr__ = brief


def train(
    backbone: Backbone,
    editor: Trainable,
    objective: Objective | None,
    records: TrainingRecords,
    validation: TrainingRecords,
    *,
    seed: int = 0,
    path: Place | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains until `editor.training` says to stop.

    Args:
        editor: With settings; weights it may hold are not read.
        objective: Replaces the editor's own training loss, or adds terms to it (see `BaseConfig`); None: neither. Not
            read for an editor that trains with its own loss alone.
        seed: Of the initial weights, the order of the records, and the multiplier network.
        path: File of the training's state: written at every look at the validation records and when interrupted;
            where it exists, training goes on from it. None: nothing is written.
        identity: What the training depends on; a state of another is refused.
        progress: Called after every step, and with a new `best` after every look, with the figures of the step.

    Raises:
        InputError: `path` holds the state of another training, or none.
        TrainingError: The loss is not finite.
        ValueError: No records, or an editor that the objective cannot train.
    """
    if not len(records) or not len(validation):
        raise ValueError("training needs at least one training record and one validation record.")
    trainer = _Trainer(backbone, editor, objective, records, validation, seed)
    known, place = dict(identity or {}), None if path is None else at(path)
    device = str(records.batch([0]).tokens_EKS.device)
    state = read_state(place, known, device) if place is not None and place.exists() else trainer.first_state()
    try:
        while not state.stop_reason:
            if state.step % editor.training.validate_every == 0 and state.looked_at != state.step:
                state = trainer.look(state)
                if place is not None:
                    write_state(place, state, known)
                if progress is not None:
                    progress(state, {})
            state = trainer.stopped(state)
            if not state.stop_reason:
                state, figures = trainer.step(state)
                if progress is not None:
                    progress(state, figures)
    except KeyboardInterrupt:
        if place is not None:
            write_state(place, state, known)
        raise
    if place is not None:
        write_state(place, state, known)
    return Trained(state.best, state)


def draw(count: int, size: int, first: int, seed: int) -> list[int]:
    """The records number `first` to `first + count` of an endless order: one shuffle of all `size` after the other.

    >>> sorted(draw(3, 3, 0, seed=7))
    [0, 1, 2]
    """
    drawn = []
    epoch, order = -1, torch.empty(0)
    for position in range(first, first + count):
        if position // size != epoch:
            epoch = position // size
            # The CPU generator reads 32 bits of its seed.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
            order = torch.randperm(size, generator=generator)
        drawn.append(int(order[position % size]))
    return drawn


class _Trainer:
    """The steps of one training; the state is passed from one to the next."""

    def __init__(
        self,
        backbone: Backbone,
        editor: Trainable,
        objective: Objective | None,
        records: TrainingRecords,
        validation: TrainingRecords,
        seed: int,
    ) -> None:
        self._backbone, self._editor = backbone, editor
        self._records, self._validation, self._seed = records, validation, seed
        self._settings: TrainingSettings = editor.training
        self._objective = objective if editor.trains_with_objective else None
        # Only where the objective replaces the editor's own loss.
        self._multiplier: SharedMultiplier | None = None
        if self._objective is not None and self._objective.config.replaces_native_loss:
            config = self._objective.config
            if config.invariance.fixed is None and not isinstance(editor, Mergeable):
                raise ValueError("penalty='adaptive' reads the change of the weights, which this editor cannot state.")
            self._multiplier = SharedMultiplier(config, self._settings.max_steps, seed)

    def first_state(self) -> TrainingState:
        weights = self._editor.initial_weights(self._backbone, self._seed)
        if isinstance(self._editor, Estimating):
            size = self._settings.batch_size
            numbers = draw(min(STATISTICS_RECORDS, len(self._records)), len(self._records), 0, self._seed)
            batches = (self._records.batch(numbers[i : i + size]) for i in range(0, len(numbers), size))
            weights = self._editor.estimated(self._backbone, weights, batches)
        return TrainingState.of(weights)

    def step(self, state: TrainingState) -> tuple[TrainingState, Figures]:
        """One step of Adam on `accumulate` batches."""
        settings = self._settings
        weights = {name: value.detach().requires_grad_() for name, value in state.weights.items()}
        gradients = {name: torch.zeros_like(value) for name, value in weights.items()}
        sums: Figures = {}
        dual = state.dual
        for part in range(settings.accumulate):
            first = (state.step * settings.accumulate + part) * settings.batch_size
            batch = self._records.batch(draw(settings.batch_size, len(self._records), first, self._seed))
            editor = self._editor.with_weights(weights)
            if self._multiplier is not None:
                terms, params = self._terms(editor, batch, state.step)
                loss_E, multiplier_E, dual = self._multiplier.penalised(
                    editor, params, terms, dual, state.step, ascend=part == 0
                )
                shown = {**terms.risks, "penalty": terms.penalty, "lambda": multiplier_E, "loss": loss_E}
            else:
                loss_E = self._native(editor, batch)
                shown = {"loss": loss_E}
            self._check_finite(loss_E, batch, state.step)
            names = [name for name, value in weights.items() if value.requires_grad]
            parts = torch.autograd.grad(loss_E.mean(), [weights[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, parts, strict=True):
                if gradient is not None:
                    gradients[name] = gradients[name] + gradient / settings.accumulate
            for name, value_E in shown.items():
                sums[name] = sums.get(name, 0.0) + float(value_E.detach().mean()) / settings.accumulate
        state = replace(adam_step(state, gradients, settings), dual=dual, losses=(*state.losses, sums["loss"]))
        return state, sums

    def look(self, state: TrainingState) -> TrainingState:
        """The loss on all validation records, without penalty; keeps the weights if they are the best so far."""
        editor = self._editor.with_weights(state.weights)
        size = self._settings.batch_size
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self._validation), size):
                numbers = range(start, min(start + size, len(self._validation)))
                batch = self._validation.batch(list(numbers))
                replaced = self._multiplier is not None
                loss_E = self._terms(editor, batch)[0].total if replaced else self._native(editor, batch)
                self._check_finite(loss_E, batch, state.step)
                total += float(loss_E.sum())
        loss = total / len(self._validation)
        state = replace(state, looks=(*state.looks, (state.step, loss)))
        if loss < state.best_loss:
            state = replace(state, best=dict(state.weights), best_loss=loss, best_step=state.step)
        return state

    def stopped(self, state: TrainingState) -> TrainingState:
        """With a reason, if training ends here."""
        if state.looks_without_improvement >= self._settings.patience:
            return replace(state, stop_reason="patience")
        if state.step >= self._settings.max_steps:
            # The last weights are looked at as well.
            state = state if state.looked_at == state.step else self.look(state)
            return replace(state, stop_reason="max_steps")
        return state

    def _native(self, editor: Editor, batch: EditBatch) -> Tensor:
        assert isinstance(editor, Trainable)
        loss_E = editor.native_training_loss(self._backbone, batch)
        if self._objective is not None and self._objective.config.terms_added_to_training:
            config, (terms, _) = self._objective.config, self._terms(editor, batch)
            for name in config.terms_added_to_training:
                loss_E = loss_E + config.weights[name] * terms.risks[name]
        return loss_E

    def _terms(self, editor: Editor, batch: EditBatch, step: int = 0) -> tuple[Terms, EditParams]:
        """The objective of records edited by these weights, and phi_e as the weights make it."""
        objective = self._objective
        assert objective is not None
        # A record comes back after as many steps as an epoch has: the number itself might always bring the same turn.
        turn = zlib.crc32(f"{self._seed} {step}".encode())
        batch = objective.in_turn(batch.select(objective.slots(editor, batch)), turn)
        prefix = self._backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise)
        with torch.no_grad():
            base_EKTD = self._backbone.suffix(prefix, batch.predict_EKT)
        params = editor.init(self._backbone, batch, prefix)
        with editor.applied(self._backbone, params, batch) as trace:
            hidden = self._backbone.suffix(prefix, objective.read(batch))
        unedited = objective.unedited(self._backbone, batch, base_EKTD)
        return objective(self._backbone, editor, params, trace, batch, hidden, unedited), params

    def _check_finite(self, loss_E: Tensor, batch: EditBatch, step: int) -> None:
        wrong = [name for name, ok in zip(batch.edit_ids, torch.isfinite(loss_E).tolist(), strict=True) if not ok]
        if wrong:
            raise TrainingError(
                f"the training loss is not finite at step {step} (records: {listed(wrong)}). "
                "Lower editor.learning_rate or editor.clip_norm, and start anew with --fresh."
            )


def adam_step(state: TrainingState, gradients: Mapping[str, Tensor], settings: TrainingSettings) -> TrainingState:
    """The state after one step of Adam (arXiv 1412.6980); a tensor whose gradient was always zero stays.

    Gradients are first scaled so that their norm over all tensors is at most `clip_norm`.
    """
    with torch.no_grad():
        if settings.clip_norm is not None:
            # In the order of their names: a state that was read back has them in another order than one just made.
            norm = torch.stack([gradients[name].square().sum() for name in sorted(gradients)]).sum().sqrt()
            scale = (settings.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
            gradients = {name: gradient * scale for name, gradient in gradients.items()}
        count = state.step + 1
        correction1, correction2 = 1 - _BETAS[0] ** count, 1 - _BETAS[1] ** count
        weights, first, second = {}, {}, {}
        for name, value in state.weights.items():
            gradient = gradients[name]
            first[name] = _BETAS[0] * state.first[name] + (1 - _BETAS[0]) * gradient
            second[name] = _BETAS[1] * state.second[name] + (1 - _BETAS[1]) * gradient.square()
            rate = settings.rates.get(name, settings.learning_rate)
            root = (second[name] / correction2).sqrt() + _EPSILON
            weights[name] = value - rate * (first[name] / correction1) / root
    return replace(state, step=count, weights=weights, first=first, second=second)
