"""Bulk: the vectors of many edits (editor `residual`), written into feed-forward matrices in one solve per layer.

Each record's vector is optimised alone, with all others at once. A matrix then gets the difference D that minimises

    sum_n w_n |D k_n - v_n|^2 + sum_m u_m |D k_m|^2 + tr(D C D^T) + rho |D|^2

k_n are its inputs where an answer of a record is predicted: its wordings about its own pictures, varied copies, and
pool pictures of the same thing. v_n is the record's vector, or 0 where the answer ends. k_m are inputs whose output
stays: the record's question about other pictures, and the questions of the pool. C holds second moments of unedited
inputs, at image and at text positions. Lower layers are written first; each takes an equal share of what is missing.

Every record costs the same. Memory is that of the sums and of the pool, and a vector and an answer per record. A
model without a record is solved anew from the vectors of the others: it equals one that never had the record.

References:
    MEMIT (arXiv 2210.07229): vectors first, then ridge regression with C over several layers (eq. 14, algorithm 1).
    AlphaEdit (arXiv 2410.02355): null space of unedited inputs.
    UltraEdit (arXiv 2505.14679): one solve without iterations for many edits.

Differs from them: keys at several wordings and pictures; kept keys; image and text positions weighed apart.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import Editor
from odedit.editors.common.fine_tuning import FineTuningConfig, WeightDifferences
from odedit.editors.common.vectors import VECTOR, Vectors
from odedit.errors import InputError
from odedit.inputs.batch import EditParams
from odedit.inputs.encoding import TokenSequence
from odedit.runtime import parallel
from odedit.runtime.brief import brief
from odedit.storage.location import Location
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.ways.base import Committed, Fit, PlainWay, Step, Task, WayConfig
from odedit.ways.common.activations import IMAGE, SEQUENCES_AT_ONCE, TEXT, Moments, Written, batches, keys_of, measured
from odedit.ways.common.examples import Example, Reading
from odedit.ways.common.in_parts import InParts
from odedit.ways.common.normal_equations import NormalEquations, null_space
from odedit.ways.common.sequences import about
from odedit.ways.common.stacked import edits_of

_SAME = 16
"""Largest number of pool pictures of the same thing that a record is asked about."""


@dataclass(frozen=True)
class BulkConfig(WayConfig):
    """Settings of the solve; the defaults were chosen on the validation split of the embedded world, BLIP-2 and LLaVA.

    Attributes:
        layers: Layers that share the change: that of `editor.site`, and those directly below it.
        near_weight: Weight of a record's questions about other pictures, and of its answer's end, relative to the 1 of
            its answer.
        kept_weight: Weight of the pool's questions, all together, relative to that of all records' answers.
        image_weight: Weight of the second moments of unedited inputs at image positions, relative to the same.
        text_weight: Weight of the second moments of unedited inputs at text positions, relative to the same.
        ridge: rho, relative to the mean diagonal entry of the other terms' matrix.
        null_space: Largest strength of a direction that may change, relative to the strongest direction of the unedited
            inputs; null: all may.
        copies: Varied copies of each of a record's two pictures.
        pool_copies: Altered copies of each of the pool's pictures.
        candidates: Pool pictures, the nearest ones, about which each record's question is asked.
    """

    layers: Annotated[int, Ge(1)] = 2
    near_weight: Annotated[float, Ge(0)] = 0.1
    kept_weight: Annotated[float, Ge(0)] = 0.1
    image_weight: Annotated[float, Ge(0)] = 0.002
    text_weight: Annotated[float, Ge(0)] = 0.01
    ridge: Annotated[float, Gt(0)] = 1e-6
    null_space: Annotated[float, Gt(0), Lt(1)] | None = None
    copies: Annotated[int, Ge(0)] = 12
    pool_copies: Annotated[int, Ge(0)] = 4
    candidates: Annotated[int, Ge(0)] = 128


class Bulk(PlainWay):
    """Differences of matrices by site, and the records' vectors `residual` `(N, D)`, from which they can be solved."""

    Config: ClassVar[type] = BulkConfig
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "editor": {"name": "residual"},
        "objective": {"name": "rephrase"},
        "stopping": {"worst_token_nll": 0.1},
        "supervision": {"rephrases": 4},
    }
    uses_edits: ClassVar[bool] = True
    is_parallel: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    def check(self, editor: Editor, name: str) -> None:
        if not isinstance(editor, Vectors):
            raise InputError(
                f"editor.name: got {name!r}, but commit.way 'bulk' writes the vectors of the editor residual; leave "
                "editor out, or choose another way."
            )

    def serving(self, editor: Editor) -> WrittenMatrices:
        return WrittenMatrices()

    def measured_sites(self, backbone: Backbone, editor: Editor) -> tuple[str, ...]:
        """Sites that are written, the lowest first; the highest is the editor's.

        Raises:
            InputError: The editor's site is no feed-forward output, or has too few layers below it.
        """
        site = editor.sites[0]
        top, part = backbone.layer_of(site), site.split(".", 2)[2]
        if part != "ffn.out":
            raise InputError(f"editor.site: got {site!r}; commit.way 'bulk' writes matrices layers.<n>.ffn.out.")
        if top + 1 < self.config.layers:
            raise InputError(
                f"commit.layers: got {self.config.layers}, but {site!r} has {top} layers below it; set at most "
                f"{top + 1}, or a higher editor.site."
            )
        return tuple(f"layers.{layer}.{part}" for layer in range(top + 1 - self.config.layers, top + 1))

    def commit(self, task: Task) -> Generator[Step, None, Committed]:
        sites = self.measured_sites(task.backbone, task.editor)
        moments = task.moments
        if moments is None:
            moments = yield from _measured(task, sites)
        with TemporaryDirectory() as folder:
            reading = Reading(self.config.copies, self.config.candidates, task.seed, self.config.pool_copies)
            examples = InParts(task.backbone, task.template, reading, Path(folder))
            for doing, number, total in examples.survey(task.requests, task.pool):
                yield Step(number, total, doing=doing)
            vectors = _vectors(task, examples)
            written = yield from self._written(task, sites, moments, examples, vectors)
        return Committed(
            {site: matrix_DI.float().cpu().unsqueeze(0) for site, matrix_DI in written.items()}
            | {VECTOR: torch.cat(parallel.gathered(_stacked(vectors)))},
            {edit_id: Fit(0, "written") for edit_id in vectors},
            problems=examples.problems,
        )

    def _written(
        self,
        task: Task,
        sites: Sequence[str],
        moments: Moments,
        examples: InParts,
        vectors: Mapping[str, Tensor],
    ) -> Generator[Step, None, dict[str, Tensor]]:
        """Difference of every site's matrix, float64; those of an interrupted attempt are not solved again."""
        written = {} if task.state is None else _read_state(task.state, task.backbone.device)
        records = sum(parallel.gathered(len(vectors)))
        for number, site in enumerate(sites):
            if site in written:
                continue
            backbone = task.backbone
            width_out, width_in = backbone.site(site).weight.shape
            equations = NormalEquations.empty(width_in, width_out, backbone.device)
            share = 1 / (len(sites) - number)
            done = Written(WrittenMatrices(), {name: value.float().unsqueeze(0) for name, value in written.items()})
            for step, asked in self._asked(examples, task, vectors, records):
                yield replace(step, doing=f"keys of {site}, {step.doing}")
                _add(equations, backbone, examples, asked, share, (site, sites[-1]), done)
            yield Step(number + 1, len(sites), doing=f"solving {site}")
            written[site] = self._solved(equations.summed(), moments, site, records)
            if task.state is not None and parallel.rank() == 0:
                write_tensors(task.state, written, {})
        return written

    def _solved(self, equations: NormalEquations, moments: Moments, site: str, records: int) -> Tensor:
        config = self.config
        image_II, text_II = (moments.mean(site, kind).to(equations.gram_II) for kind in (IMAGE, TEXT))
        basis_IM = None if config.null_space is None else null_space(image_II + text_II, config.null_space)
        cost_II = records * (config.image_weight * image_II + config.text_weight * text_II)
        return equations.solved(cost_II, config.ridge, basis_IM)

    def _asked(
        self, examples: InParts, task: Task, vectors: Mapping[str, Tensor], records: int
    ) -> Iterator[tuple[Step, list[_Asked]]]:
        """Questions in parts, each with the step that it is: those of the records, then of the pool."""
        config, count = self.config, 0
        for part in examples.parts(task.requests):
            asked: list[_Asked] = []
            for example in part:
                asked += _of_record(example, vectors[example.edit_id], config.near_weight, examples.has_end)
            yield Step(count, len(task.requests), doing="records"), asked
            count += len(part)
        if parallel.rank() == 0 and config.kept_weight:
            kept = examples.kept
            weight = config.kept_weight * records / max(1, len(kept))
            for start in range(0, len(kept), SEQUENCES_AT_ONCE):
                some = kept[start : start + SEQUENCES_AT_ONCE]
                step = Step(start, len(kept), doing="questions of the pool")
                yield step, [_Asked(sequence, weight / _length(sequence)) for sequence in some]


class WrittenMatrices(WeightDifferences):
    """The editor of a committed model: differences of `ffn.out` matrices; the vectors are not applied."""

    Config: ClassVar[type] = FineTuningConfig

    def __init__(self) -> None:
        super().__init__(FineTuningConfig(sites=("layers.*.ffn.out",), learning_rate=1.0))

    def sites_of(self, params: EditParams) -> list[str]:
        return [name for name in params if name != VECTOR]

    def pooled(self, params: EditParams) -> EditParams:
        return {site: params[site] for site in self.sites_of(params)}


@dataclass(frozen=True)
class _Asked:
    """A question, and what its answer's positions add to the sums.

    Attributes:
        weight: Weight of each position before the answer's end.
        vector_D: Value at these positions; None: zeros.
        end_weight: Weight of the position that predicts the answer's end, whose value is 0; None: it is one like the
            others.
    """

    sequence: TokenSequence
    weight: float
    vector_D: Tensor | None = None
    end_weight: float | None = None

    __repr__ = brief


def _length(sequence: TokenSequence) -> int:
    return len(sequence.tokens) - sequence.first_target


def _of_record(example: Example, vector_D: Tensor, near_weight: float, has_end: bool) -> Iterator[_Asked]:
    """A record's questions: weights of positions with its vector sum to 1, those of ends and of negatives to
    `near_weight` each.

    Args:
        has_end: Whether the last token of its answers is the token that ends them.
    """
    first, *rephrases = example.wordings
    pictures = (*example.own, *example.other, *example.same[:_SAME]) or (None,)
    few = (*example.own[:2], *example.other[:4], *example.same[:2]) or (None,)
    positives = [about(first, key) for key in pictures]
    positives += [about(wording, key) for wording in rephrases for key in few]
    total = sum(_length(sequence) - has_end for sequence in positives)
    for sequence in positives:
        yield _Asked(sequence, 1 / total, vector_D, near_weight / len(positives) if has_end else None)
    sum_of_nearness = sum(example.nearness)
    for sequence, nearness in zip(example.negatives, example.nearness, strict=True):
        if near_weight:
            yield _Asked(sequence, near_weight * nearness / sum_of_nearness / _length(sequence))


def _add(
    equations: NormalEquations,
    backbone: Backbone,
    examples: InParts,
    asked: Sequence[_Asked],
    share: float,
    sites: tuple[str, str],
    written: Written,
) -> None:
    """Adds questions to the sums of a site: their values are a share of what is missing at the highest site."""
    start = 0
    for batch in batches(examples.features, [one.sequence for one in asked]):
        part = asked[start : start + len(batch.slots)]
        start += len(part)
        keys_RTI, added_RTD = keys_of(backbone, batch, *sites, written)
        mask_RT = batch.target_mask_EKT[0]
        values_RTD = torch.zeros_like(added_RTD, dtype=torch.float64)
        weights_RT = torch.zeros(mask_RT.shape, dtype=torch.float64, device=mask_RT.device)
        for row, one in enumerate(part):
            length = _length(one.sequence)
            weights_RT[row, :length] = one.weight
            if one.vector_D is not None:
                values_RTD[row, :length] = one.vector_D.to(values_RTD)
            if one.end_weight is not None:
                weights_RT[row, length - 1] = one.end_weight
                values_RTD[row, length - 1] = 0.0
        missing_RTD = share * (values_RTD - added_RTD)
        equations.add(keys_RTI[mask_RT], missing_RTD[mask_RT], weights_RT[mask_RT])


def _measured(task: Task, sites: Sequence[str]) -> Generator[Step, None, Moments]:
    """Moments of the pool's sequences."""
    for progress in measured(task.backbone, task.template, sites, task.pool):
        if isinstance(progress, Moments):
            return progress
        yield Step(progress, len(task.pool), doing="second moments of the pool")
    raise AssertionError("the moments come last")


def _vectors(task: Task, examples: InParts) -> dict[str, Tensor]:
    """Vector of every record that the model takes, by edit id.

    Raises:
        InputError: There is none.
    """
    start = None if task.start is None else {VECTOR: task.start[VECTOR]}
    stacked = edits_of(replace(task, start=start))[VECTOR]
    ids = [request.edit_id for request in task.requests]
    vectors = {
        edit_id: vector_D for edit_id, vector_D in zip(ids, stacked, strict=True) if edit_id not in examples.problems
    }
    if not any(parallel.gathered(len(vectors))):
        raise InputError(
            f"data.path: no record can be committed; first: {next(iter(examples.problems.values()), 'there is none.')}"
        )
    return vectors


def _stacked(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(vectors.values())) if vectors else torch.zeros(0)


def _read_state(location: Location, device: torch.device) -> dict[str, Tensor]:
    """Matrices that an interrupted attempt has solved."""
    return read_tensors(location, str(device))[0] if location.exists() else {}


WAY = Bulk
