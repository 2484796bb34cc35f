"""Training of an editor's own weights, before any edit: MEND's hypernetwork, UniKE's encoders.

The loop uses the `Trainable` protocol only. It draws records in an order fixed by the seed and the step, steps with
Adam, validates, keeps the best weights, and writes its state to one file: a training that was interrupted and resumed
equals an uninterrupted one bit for bit.
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
from odedit.storage.location import LocationLike, at
from odedit.training.multiplier import SharedMultiplier
from odedit.training.state import TrainingState, read_state, write_state

STATISTICS_RECORDS = 256
"""Largest number of records for the statistics of an `Estimating` editor."""
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

Figures = dict[str, float]
Progress = Callable[[TrainingState, Figures], None]


class TrainingError(Explained, RuntimeError):
    """The training has failed."""


class TrainingRecords(Protocol):
    """Records drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Sequence[int]) -> EditBatch:
        """Supervision batch of these records (`SUPERVISION_SLOTS`)."""
        ...


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        weights: Weights of the lowest validation loss.
        state: State after the last step.
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
    path: LocationLike | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains until a stopping rule of `editor.training` applies.

    Args:
        editor: Editor with settings; its current weights are ignored.
        objective: Objective that replaces the editor's own training loss, or adds terms to it (see `BaseConfig`); None:
            neither. Ignored for an editor that trains only with its own loss.
        seed: Seed of the initial weights, the order of the records, and the multiplier network.
        path: File of the training's state, written at every validation and when interrupted; training resumes from an
            existing file. None: no file.
        identity: Settings and data that the training depends on; a state with another identity is refused.
        progress: Callback after every step, with its metrics, and after every validation, with none.

    Raises:
        InputError: `path` holds the state of another training, or no state.
        TrainingError: The loss is not finite.
        ValueError: No records, or an editor that the objective cannot train.
    """
    if not len(records) or not len(validation):
        raise ValueError("training needs at least one training record and one validation record.")
    trainer = _Trainer(backbone, editor, objective, records, validation, seed)
    identity, location = dict(identity or {}), None if path is None else at(path)

    def save(state: TrainingState) -> None:
        if location is not None:
            write_state(location, state, identity)

    if location is not None and location.exists():
        state = read_state(location, identity, str(records.batch([0]).tokens_EKS.device))
    else:
        state = trainer.first_state()
    try:
        while not state.stop_reason:
            if state.step % editor.training.validate_every == 0 and state.looked_at != state.step:
                state = trainer.look(state)
                save(state)
                if progress is not None:
                    progress(state, {})
            state = trainer.stopped(state)
            if not state.stop_reason:
                state, figures = trainer.step(state)
                if progress is not None:
                    progress(state, figures)
    except KeyboardInterrupt:
        save(state)
        raise
    save(state)
    return Trained(state.best, state)


def draw(count: int, size: int, first: int, seed: int) -> list[int]:
    """Indices at positions `first` to `first + count` of an endless order: one shuffle of all `size` records per epoch.

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
    """Steps of one training; the state is passed from step to step."""

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
        # None unless the objective replaces the editor's own loss.
        self._multiplier: SharedMultiplier | None = None
        if self._objective is not None and self._objective.config.replaces_native_loss:
            config = self._objective.config
            if config.invariance.fixed is None and not isinstance(editor, Mergeable):
                raise ValueError("penalty='adaptive' reads the change of weights, which this editor does not compute.")
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
                is_last = part == settings.accumulate - 1
                loss_E, multiplier_E, dual = self._multiplier.penalised(
                    editor, params, terms, dual, state.step, is_first=part == 0, is_last=is_last
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
        """State after validation, without penalty; its weights become the best if their loss is the lowest."""
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
        """State with a stop reason if training ends here."""
        if state.looks_without_improvement >= self._settings.patience:
            return replace(state, stop_reason="patience")
        if state.step >= self._settings.max_steps:
            # Validate the last weights too.
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
        """Terms of records edited with the editor's weights, and the phi_e of these edits."""
        objective = self._objective
        assert objective is not None
        # Hashed: with the step itself, a record might meet the same negatives in every epoch.
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
                "Lower editor.learning_rate or editor.clip_norm, and start over with --fresh."
            )


def adam_step(state: TrainingState, gradients: Mapping[str, Tensor], settings: TrainingSettings) -> TrainingState:
    """State after one step of Adam (arXiv 1412.6980); a tensor whose gradients were all zero does not change.

    Gradients are first scaled so that their norm over all tensors is at most `clip_norm`.
    """
    with torch.no_grad():
        if settings.clip_norm is not None:
            # Sorted: a state read from a file has another order, and sums in another order differ in the last bits.
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
