"""Joint training: one difference of weights learns all records at once.

A step reads some records under the objective of the run, with pictures drawn anew (their own, varied copies, pool
pictures of the same thing), and questions of the pool. The answers to the pool, and to the records' questions about
other pictures, are kept at those of the unedited model by the divergence of the distributions. Answers are learned and
kept with the token that ends them.

With several workers each has a share of the records, and steps with the mean of all gradients.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.editing.primal_dual import State, primal_step
from odedit.editors.base import Editor
from odedit.editors.common.fine_tuning import FineTuning
from odedit.errors import InputError
from odedit.inputs.batch import EDIT, REPHRASE, REPHRASE_SLOTS, EditBatch, EditParams, negative_slots
from odedit.inputs.encoding import TokenSequence
from odedit.objectives.common.penalty import tv_penalty
from odedit.objectives.common.terms import Terms
from odedit.risks.tokens import kl_of_states
from odedit.runtime import parallel
from odedit.runtime.brief import brief
from odedit.storage.location import Location
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.training.loop import draw
from odedit.training.multiplier import Dual, SharedMultiplier
from odedit.ways.base import Committed, Fit, PlainWay, Step, Task, WayConfig
from odedit.ways.common.examples import Example, Examples, Reading, read
from odedit.ways.common.sequences import about, edited_states, flat

_WARMUP_STEPS = 20
"""Steps over which the learning rate rises to its full value; then it falls by a cosine."""
_LEAST_STEPS, _LOOKS = 400, 200
"""`steps: auto`: least number of steps, and times that each record is read."""
_SHARE_OF_CHANGE = 0.5
"""Share of these steps that a changed model takes: it starts from trained parameters."""
_CHECKED_AT_ONCE = 64


@dataclass(frozen=True)
class JointConfig(WayConfig):
    """Settings of joint training.

    Attributes:
        steps: Largest number of steps; `auto`: so many that each record is read 200 times, at least 400; half of them
            for a model that is changed.
        records: Records that a step reads, all workers together.
        negatives: Questions about other pictures that a step reads for each of its records.
        kept: Questions of the pool that a step reads, all workers together.
        kept_weight: Weight of the pool's divergence; that of the negatives is `objective.locality_weight`.
        copies: Varied copies of each of a record's two pictures.
        pool_copies: Copies of each of the pool's pictures in other hues, mirrored or joined with others, which stand
            for what the pool does not show.
        candidates: Pool pictures, the nearest ones, about which each record's question is asked beforehand; those with
            the answer that the edit replaces show the same thing, the others are negatives.
        stop: NLL of the worst answer token over all records at which training ends early; null: never.
        patience: Checks in a row that must find the worst token below `stop`.
        check_every: Least number of steps between two checks; each record is read once in between.
    """

    steps: Literal["auto"] | Annotated[int, Ge(1)] = "auto"
    records: Annotated[int, Ge(1)] = 12
    negatives: Annotated[int, Ge(1)] = 2
    kept: Annotated[int, Ge(1)] = 16
    kept_weight: Annotated[float, Ge(0)] = 2.0
    copies: Annotated[int, Ge(0)] = 12
    pool_copies: Annotated[int, Ge(0)] = 4
    candidates: Annotated[int, Ge(0)] = 128
    stop: Annotated[float, Gt(0)] | None = None
    patience: Annotated[int, Ge(1)] = 3
    check_every: Annotated[int, Ge(1)] = 50


_Cells = dict[str, TokenSequence | None]
"""A record's sequences of one step, by slot."""


@dataclass(frozen=True)
class _Training:
    """Training between two steps.

    Attributes:
        params: The shared parameters; axis 0 has length 1.
        state: Moments and number of steps.
        dual: Multiplier network of the objective's penalty.
        settled: Checks in a row with the worst token below `stop`.
        worst: NLL of the worst answer token of each record at the last check.
        curves: Figures of every check by name.
        stop_reason: Reason for the end; empty during training.
    """

    params: EditParams
    state: State
    dual: Dual = field(default_factory=Dual)
    settled: int = 0
    worst: tuple[float, ...] = ()
    curves: dict[str, list[float]] = field(default_factory=dict)
    stop_reason: str = ""

    __repr__ = brief

    @property
    def step(self) -> int:
        return int(self.state.steps_E[0])


class Joint(PlainWay):
    """One shared difference of weights, by low-rank factors unless the run names another editor."""

    Config: ClassVar[type] = JointConfig
    is_parallel: ClassVar[bool] = True
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "editor": {
            "name": "lora",
            "sites": [
                f"layers.*.{part}"
                for part in ("attention.q", "attention.k", "attention.v", "attention.out", "ffn.in", "ffn.out")
            ],
            "rank": 16,
            "learning_rate": 2e-3,
        },
        "objective": {"name": "contrast"},
        "supervision": {"rephrases": 4},
    }

    def check(self, editor: Editor, name: str) -> None:
        if not isinstance(editor, FineTuning):
            raise InputError(
                f"editor.name: got {name!r}, but commit.way 'joint' trains one difference of weights for all records; "
                "use lora, ftl or ftv, or another way."
            )

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        config, editor = self.config, task.editor
        reading = Reading(config.copies, config.candidates, task.seed, config.pool_copies)
        examples: Examples | None = None
        sources = task.requests, task.pool, reading, task.removed
        for progress in read(task.backbone, task.template, editor.sites, *sources):
            if isinstance(progress, Examples):
                examples = progress
            else:
                yield Step(*progress[1:], doing=progress[0])
        assert examples is not None
        trainer = _Trainer(config, task, examples)
        training = trainer.start()
        while not training.stop_reason:
            training, figures = trainer.step(training)
            if trainer.is_check(training.step):
                training = trainer.checked(training)
                figures |= {"worst_nll": training.curves["worst_nll"][-1]}
                trainer.save(training)
            yield Step(training.step, trainer.num_steps, figures, doing="training")
        fits = {
            example.edit_id: Fit(training.step, training.stop_reason, worst)
            for example, worst in zip(examples.records, training.worst, strict=True)
        }
        return Committed(training.params, fits, training.curves, examples.problems)


class _Trainer:
    """Steps of one joint training; the training is passed from step to step."""

    def __init__(self, config: JointConfig, task: Task, examples: Examples) -> None:
        self._config, self._task, self._examples = config, task, examples
        self._backbone, self._editor, self._objective = task.backbone, task.editor, task.objective
        self._records = examples.records
        self._trained = [*examples.records, *examples.restored]
        num_records = sum(parallel.gathered(len(self._records)))
        if not num_records:
            first = next(iter(examples.problems.values()), "there is none.")
            raise InputError(f"data.path: no record can be committed; first: {first}")
        if parallel.count() > 1 and min(parallel.gathered(len(self._trained))) == 0:
            raise InputError("pipeline.actors: one of the workers has no record to train; set a smaller number.")
        share = 1.0 if task.start is None else _SHARE_OF_CHANGE
        wanted = math.ceil(share * max(_LEAST_STEPS, _LOOKS * num_records / config.records))
        self.num_steps: int = wanted if config.steps == "auto" else config.steps
        self._check_every = max(config.check_every, math.ceil(num_records / config.records))
        self._multiplier = SharedMultiplier(self._objective.config, self.num_steps, task.seed)
        self._share = max(1, round(config.records / parallel.count()))
        self._kept_share = max(1, round(config.kept / parallel.count()))

    def start(self) -> _Training:
        """The training's state, or its beginning."""
        # The name seeds LoRA's factors: the same for every choice of records and workers.
        first = self._examples.features.batch(("joint",), (EDIT,), [[self._any_sequence()]])
        initial = self._editor.init(self._backbone, first)
        params = {name: value.detach() for name, value in (self._task.start or initial).items()}
        steps_E = torch.zeros(1, dtype=torch.long, device=self._backbone.device)
        moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in params.items()}
        state = State(steps_E, steps_E.clone(), torch.zeros(1, device=steps_E.device), moments)
        training = _Training(params, state)
        location = self._task.state
        return training if location is None or not location.exists() else _read_state(location, training, self._task)

    def _any_sequence(self) -> TokenSequence:
        """A sequence of some record; a worker without records has those of the pool."""
        return self._trained[0].wordings[0] if self._trained else self._examples.kept[0]

    def is_check(self, step: int) -> bool:
        return step % self._check_every == 0 or step == self.num_steps

    def step(self, training: _Training) -> tuple[_Training, dict[str, float]]:
        """One step on some records and on questions of the pool."""
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{self._task.seed} {training.step} {parallel.rank()}".encode())
        )
        params = {name: value.detach().requires_grad_() for name, value in training.params.items()}
        gradients = {name: torch.zeros_like(value) for name, value in params.items()}
        figures = torch.zeros(2, device=self._backbone.device)
        dual = training.dual
        if self._trained:
            loss, dual = self._of_records(params, training, generator)
            _add_gradients(gradients, params, loss)
            figures[0] = loss.detach()
        if self._examples.kept and self._config.kept_weight:
            loss = self._config.kept_weight * self._divergence(params, self._drawn_kept(generator))
            _add_gradients(gradients, params, loss)
            figures[1] = loss.detach()
        *means, figures = parallel.mean([*gradients.values(), figures])
        rate = self._editor.optimizer.learning_rate * self._schedule(training.step)
        optimizer = replace(self._editor.optimizer, learning_rate=rate)
        moved, moments = primal_step(
            optimizer, training.params, dict(zip(gradients, means, strict=True)), training.state
        )
        if not bool(figures.isfinite().all()):
            raise InputError(
                f"the loss is not finite at step {training.step}. Lower editor.learning_rate, or set editor.clip_norm."
            )
        state = replace(training.state, steps_E=training.state.steps_E + 1, moments=moments)
        shown = dict(zip(("loss", "kept"), figures.tolist(), strict=True))
        return replace(training, params=self._editor.constrain(moved), state=state, dual=dual), shown

    def _schedule(self, step: int) -> float:
        """Factor of the learning rate."""
        return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))

    def _of_records(self, params: EditParams, training: _Training, generator: torch.Generator) -> tuple[Tensor, Dual]:
        """Loss of the step's records, with the objective's penalty, and the dual variable."""
        count = min(self._share, len(self._trained))
        numbers = draw(count, len(self._trained), training.step * count, self._task.seed)
        batch, cells = self._drawn_batch([self._trained[number] for number in numbers], generator)
        batch = batch.select(self._objective.slots(self._editor, batch))
        rows = flat(batch)
        prefix = self._backbone.prefix(rows, *self._editor.sites, positionwise=self._editor.positionwise)
        base_EKTD = self._unedited_states(batch, cells)
        with self._editor.applied(self._backbone, params, rows) as trace:
            hidden = _grid(self._backbone.suffix(prefix, self._read(batch, rows)), batch)
        unedited = self._objective.unedited(self._backbone, batch, base_EKTD, self._weights(batch))
        terms = self._objective(self._backbone, self._editor, params, trace, batch, hidden, unedited)
        mean = _mean_terms(terms)
        loss_1, _, dual = self._multiplier.penalised(self._editor, params, mean, training.dual, training.step)
        if dual is not training.dual and dual.delta:
            names = sorted(dual.delta)
            values = parallel.mean([dual.delta[name] for name in names])
            dual = replace(dual, delta={n: v.detach().requires_grad_() for n, v in zip(names, values, strict=True)})
        return loss_1.sum(), dual

    @torch.no_grad()
    def _unedited_states(self, batch: EditBatch, cells: Sequence[_Cells]) -> Tensor:
        """States of the unedited model at the answers that are compared, `(E, K, T, D)`; zeros for the other slots."""
        shape = (*batch.predict_EKT.shape, self._backbone.hidden_size)
        compared = self._objective.compared_slots(batch) if self._objective.compares else ()
        if not compared:
            return torch.zeros(shape, device=self._backbone.device)
        part = batch.select(compared)
        asked = [row[slot] for row in cells for slot in compared]
        states_RTD = self._examples.unedited.at(asked, batch.predict_EKT.shape[-1])
        if states_RTD is None:
            rows = flat(part)
            prefix = self._backbone.prefix(rows, *self._editor.sites, positionwise=self._editor.positionwise)
            states_RTD = self._backbone.suffix(prefix, rows.predict_EKT)
        states = _grid(states_RTD.to(self._backbone.device), part)
        columns_K = torch.tensor([batch.slots.index(slot) for slot in compared], device=states.device)
        return states.new_zeros(shape).index_copy(1, columns_K, states)

    def _read(self, batch: EditBatch, rows: EditBatch) -> Tensor | None:
        return None if self._objective.read(batch) is None else rows.predict_EKT

    def _weights(self, batch: EditBatch) -> Tensor | None:
        """Weight of each negative: their sum is 2 for every record, as much as that of its two answers."""
        compared = [slot in negative_slots(self._config.negatives) for slot in batch.slots]
        if not any(compared):
            return None
        return (
            torch.tensor(compared, device=batch.present_EK.device) * (2.0 / self._config.negatives) * batch.present_EK
        )

    def _drawn_batch(
        self, records: Sequence[Example], generator: torch.Generator
    ) -> tuple[EditBatch, Sequence[_Cells]]:
        """The records' sequences, with pictures drawn for this step."""
        rows = [self._drawn_cells(record, generator) for record in records]
        slots = tuple(rows[0])
        cells = [[row[slot] for slot in slots] for row in rows]
        return self._examples.features.batch([record.edit_id for record in records], slots, cells), rows

    def _drawn_cells(self, record: Example, generator: torch.Generator) -> _Cells:
        def one(items: Sequence[Any]) -> Any:
            return items[int(torch.randint(len(items), (1,), generator=generator))] if items else None

        first, *rephrases = record.wordings
        text_rephrase = one(rephrases) or first
        is_same = bool(record.same) and float(torch.rand((), generator=generator)) < 0.5
        other = one(record.same if is_same else record.other)
        text, image = REPHRASE_SLOTS
        cells: _Cells = {
            EDIT: about(first, one(record.own)),
            text: about(text_rephrase, one(record.own)),
            image: about(first, other),
            **{slot: record.supervision.get(slot) for slot in ("text_locality", "image_locality", "near_locality")},
            # Half of the other pictures are asked about in the record's own words, however many rephrases there are.
            REPHRASE: about(one((first, text_rephrase)), other),
        }
        weights = torch.tensor(record.nearness)
        number = min(self._config.negatives, len(record.negatives))
        chosen = torch.multinomial(weights, number, generator=generator).tolist() if number else []
        drawn = [record.negatives[index] for index in chosen] + [None] * (self._config.negatives - number)
        return cells | dict(zip(negative_slots(self._config.negatives), drawn, strict=True))

    def _drawn_kept(self, generator: torch.Generator) -> list[TokenSequence]:
        kept = self._examples.kept
        numbers = torch.randint(len(kept), (self._kept_share,), generator=generator).tolist()
        return [kept[number] for number in numbers]

    def _divergence(self, params: EditParams, sequences: Sequence[TokenSequence]) -> Tensor:
        """Mean KL(edited || unedited) of the answers of sequences."""
        batch = self._examples.features.row(sequences)
        prefix = self._backbone.prefix(batch, *self._editor.sites, positionwise=self._editor.positionwise)
        known_KTD = self._examples.unedited.at(sequences, batch.predict_EKT.shape[-1])
        with torch.no_grad():
            base = (
                self._backbone.suffix(prefix, batch.predict_EKT)
                if known_KTD is None
                else known_KTD.unsqueeze(0).to(self._backbone.device)
            )
        with self._editor.applied(self._backbone, params, batch):
            states = self._backbone.suffix(prefix, batch.predict_EKT)
        mask = batch.target_mask_EKT
        kl_M = kl_of_states(states[mask], base[mask], self._backbone.head, _CHECKED_AT_ONCE * 8, with_slope=False).value
        per_token = torch.zeros(mask.shape, device=kl_M.device).masked_scatter(mask, kl_M)
        return (per_token.sum(-1) / mask.sum(-1).clamp_min(1)).mean()

    @torch.no_grad()
    def checked(self, training: _Training) -> _Training:
        """The training after a look at every record's answers, with a stop reason if it ends."""
        worst = self._worst(training.params)
        everywhere = max(value for part in parallel.gathered(worst) for value in part or [-math.inf])
        stop = self._config.stop
        settled = training.settled + 1 if stop is not None and everywhere <= stop else 0
        curves = {name: list(values) for name, values in training.curves.items()}
        for name, value in (("step", float(training.step)), ("worst_nll", everywhere)):
            curves.setdefault(name, []).append(value)
        reason = "worst_token_nll" if settled >= self._config.patience else ""
        reason = reason or ("max_steps" if training.step >= self.num_steps else "")
        return replace(training, settled=settled, worst=tuple(worst), curves=curves, stop_reason=reason)

    def _worst(self, params: EditParams) -> list[float]:
        """NLL of the worst token of the answers that the objective trains, for each record, on its own pictures."""
        worst: list[float] = []
        for start in range(0, len(self._records), _CHECKED_AT_ONCE):
            part = self._records[start : start + _CHECKED_AT_ONCE]
            asked = [
                [
                    about(record.wordings[0], next(iter(record.own), None)),
                    about(record.wordings[-1], next(iter(record.other), None)),
                ]
                for record in part
            ]
            batch = self._examples.features.batch([record.edit_id for record in part], (EDIT, REPHRASE), asked)
            rows = flat(batch.select(self._objective.trained_slots(batch)))
            states = edited_states(self._backbone, self._editor, params, rows)
            mask = rows.target_mask_EKT
            log_p_MV = self._backbone.head(states[mask]).log_softmax(-1)
            nll_M = -log_p_MV.gather(-1, rows.target_EKT[mask].unsqueeze(-1)).squeeze(-1)
            nll = torch.zeros(mask.shape, device=nll_M.device).masked_scatter(mask, nll_M)
            worst += nll.amax(-1).reshape(len(part), -1).amax(-1).tolist()
        return worst

    def save(self, training: _Training) -> None:
        """Writes the state of an unfinished training; one worker writes for all."""
        worst = parallel.gathered(training.worst)
        if self._task.state is not None and parallel.rank() == 0:
            _write_state(self._task.state, training, worst)


def _add_gradients(gradients: EditParams, params: EditParams, loss: Tensor) -> None:
    parts = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    for name, part in zip(params, parts, strict=True):
        if part is not None:
            gradients[name] = gradients[name] + part


def _grid(states: Tensor, batch: EditBatch) -> Tensor:
    """States of the flat batch as `(E, K, T, D)`."""
    return states.reshape(*batch.present_EK.shape, *states.shape[-2:])


def _mean_terms(terms: Terms) -> Terms:
    """Terms of one edit of all records: an environment's risk is the mean over its records."""
    gradients = {name: value.mean().reshape(1) for name, value in terms.scale_gradients.items()}
    total = terms.total.mean().reshape(1)
    return replace(
        terms,
        risks={name: value.mean().reshape(1) for name, value in terms.risks.items()},
        total=total,
        scale_gradients=gradients,
        penalty=tv_penalty(list(gradients.values())) if gradients else torch.zeros_like(total),
    )


_MOMENTS = ("first", "second")


def _write_state(location: Location, training: _Training, worst: Sequence[Sequence[float]]) -> None:
    tensors = {f"params/{name}": value for name, value in training.params.items()}
    for order, group in enumerate(_MOMENTS):
        tensors |= {f"{group}/{name}": pair[order] for name, pair in training.state.moments.items()}
    tensors |= {f"dual/{name}": value for name, value in training.dual.delta.items()}
    info = {
        "step": training.step,
        "dual_steps": training.dual.steps,
        "settled": training.settled,
        "worst": worst,
        "curves": training.curves,
        "stop_reason": training.stop_reason,
    }
    # Copies: tensors that share memory cannot be stored.
    write_tensors(location, {name: value.detach().cpu().clone() for name, value in tensors.items()}, {
        "info": json.dumps(info)
    })  # fmt: skip


def _read_state(location: Location, start: _Training, task: Task) -> _Training:
    """The stored training, on the model's device."""
    tensors, metadata = read_tensors(location, str(task.backbone.device))
    info = json.loads(metadata["info"])
    groups: dict[str, EditParams] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        # A copy has the alignment of other tensors: sums over memory of another alignment differ in the last bit.
        groups.setdefault(group, {})[name] = value.clone()
    if info["step"] and len(info["worst"]) != parallel.count():
        raise InputError(
            f"{location} was written by {len(info['worst'])} workers and cannot be continued by {parallel.count()}; "
            "set pipeline.actors to that number, or add --fresh."
        )
    first, second = (groups[group] for group in _MOMENTS)
    # In the order of the editor: sums over the tensors in another order differ in the last bits.
    moments = {name: (first[name], second[name]) for name in start.params}
    delta = {name: value.requires_grad_() for name, value in groups.get("dual", {}).items()}
    return _Training(
        {name: groups["params"][name] for name in start.params},
        replace(start.state, steps_E=start.state.steps_E + info["step"], moments=moments),
        Dual(delta, info["dual_steps"]),
        info["settled"],
        tuple(info["worst"][parallel.rank()]),
        info["curves"],
        info["stop_reason"],
    )


WAY = Joint
