"""Scores of an edit or of a whole model, before against after: rel, t_gen, m_gen, t_loc, m_loc, and their variants.

Token scores are teacher-forced shares of target tokens; `_exact` asks for the whole target. A separate token of
white space before the answer, such as LLaMA's before a digit, is not counted: it is almost always right.

`_generated` compares with greedy generation, which sees neither the target nor a correction of its errors (teacher
forcing flatters, arXiv 2502.11177). It starts where a served model starts, so uncounted white space is generated too. A
generated answer ends by itself, or `EXTRA_TOKENS` tokens beyond the target's length: `_generated` is the share of
target tokens at their positions, `_generated_exact` asks that it is the target and ends there.

Locality compares the edited model with the unedited one, which runs without any edit. `answer` reads only the positions
that predict the answer; `mmedit` reads every position, as the MMEdit benchmark does (arXiv 2310.08475), where prompt
positions that an edit hardly reaches dilute the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, ends_of
from odedit.backbones.common.generation import EXTRA_TOKENS, generate, until_end
from odedit.editors.base import Editor, Trace
from odedit.evaluation.columns import (
    ANSWER_COLUMNS,
    BEFORE,
    FAR,
    LOCALITY_COLUMNS,
    METRICS,
    PORTABILITY,
    Answer,
    column,
    groups,
)
from odedit.evaluation.readout import Readout, UneditedAnswers
from odedit.inputs.batch import RELIABILITY, EditBatch, EditParams, is_locality
from odedit.runtime.brief import brief
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

TOP_K = 10
_NUMBER = re.compile(r"_\d+$")
"""Number of a probe among several of one kind."""

MAX_ANSWER = 300
"""Longest answer in a row's `answers`, in characters."""

Answers = dict[str, dict[str, str]]
"""Generated answers by probe: `{"before": ..., "after": ...}`."""
Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements besides the teacher-forced token scores.

    Attributes:
        generate: Whether to generate answers to every probe greedily, before and after.
        mmedit: Whether to measure the published locality over all positions, besides that over answers.
    """

    generate: bool = True
    mmedit: bool = True


@dataclass(frozen=True)
class _Asked:
    """Probes of a batch at one model, computed up to the lowest edited site.

    Attributes:
        prefix: Everything below the sites, see `Backbone.prefix`.
        kv_cache: Keys and values of the prefix; None: nothing is generated.
        mmedit: Whether the locality over all positions is measured.
    """

    backbone: Backbone
    batch: EditBatch
    prefix: Prefix
    kv_cache: KVCache | None
    mmedit: bool

    __repr__ = brief

    @classmethod
    def at(
        cls, backbone: Backbone, batch: EditBatch, config: EvaluationConfig, sites: Sequence[str], positionwise: bool
    ) -> _Asked:
        kv_cache = KVCache(batch.target_EKT.shape[-1] + EXTRA_TOKENS) if config.generate else None
        prefix = backbone.prefix(batch, *sites, positionwise=positionwise, kv_cache=kv_cache)
        return cls(backbone, batch, prefix, kv_cache, config.mmedit)

    def answers(self) -> Readout:
        """Answers of the model with the currently applied edits."""
        backbone, batch = self.backbone, self.batch
        branch = None if self.kv_cache is None else self.kv_cache.branch()
        # The head reads all positions of locality probes, and those that predict a target token or the one after it.
        extended = batch.with_room(int(branch is not None), 0, backbone.max_positions)
        num_targets, read_EKT = batch.target_EKT.shape[-1], extended.predict_EKT
        hidden = backbone.suffix(self.prefix, None if self.mmedit else read_EKT, branch)
        everywhere = _top(backbone, hidden, _read_everywhere(batch, extended)) if self.mmedit else None
        if everywhere is None:
            top_EKTR = _top(backbone, hidden, extended.target_mask_EKT)
        else:
            top_EKTR = gather_positions(everywhere, read_EKT)
        greedy_EKT = None if branch is None else generate(backbone, batch, self.prefix, branch, top_EKTR[..., 0])
        return Readout(top_EKTR[..., :num_targets, :], everywhere, greedy_EKT)


def _read_everywhere(batch: EditBatch, extended: EditBatch) -> Tensor:
    """True at all positions of locality probes, and at those that predict a target token, `(E, K, S)`."""
    compared_K = torch.tensor([is_locality(name) for name in batch.slots], device=batch.real_EKS.device)
    mask_EKS = (batch.real_EKS & compared_K[:, None]).int()
    return mask_EKS.scatter_reduce(-1, extended.predict_EKT, extended.target_mask_EKT.int(), "amax").bool()


_Readouts = tuple[Readout, Readout]
"""Answers of the unedited and of the edited model."""


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    editor: Editor,
    params: EditParams,
    batch: EditBatch,
    config: EvaluationConfig = EvaluationConfig(),
    known: UneditedAnswers | None = None,
) -> list[Row]:
    """Scores E finished edits on the probes of an evaluation batch, before and after.

    Args:
        params: Results of `Editor.finished`, stacked over the edits of `batch`; on any device.
        known: Store of the unedited model's answers; None: they are computed.

    Returns:
        One row per edit: `rel`, `<probe>` and, for each, `_exact`, `_generated`, `_generated_exact` and `_before`
        variants; for locality `_whole`, `_generated`, `_generated_exact` and `_mmedit` (where all of an answer must
        agree: `_whole`; to its end: `_generated_exact`). `answers` has the generated texts of every probe, see
        `Answers`, each cut to `MAX_ANSWER` characters; without generation there is none. `t_loc` and `m_loc` average
        the record's own (far) and near probe where it has both; `_far` and `_near` are then the single scores. All
        endings: `odedit.evaluation.columns`.
    """
    rows: list[Row] = []
    for rows_E, part in _fitting(backbone, batch):
        own = params if part is batch else {name: value[rows_E.to(value.device)] for name, value in params.items()}
        rows += _rows(backbone, part, _around(backbone, editor, editor.applied, own, config, known))
    return rows


@torch.no_grad()
def evaluate_together(
    backbone: Backbone,
    editor: Editor,
    params: EditParams,
    batch: EditBatch,
    config: EvaluationConfig = EvaluationConfig(),
    known: UneditedAnswers | None = None,
    before: EditParams | None = None,
) -> list[Row]:
    """Scores one committed model, all of whose edits are applied at once, on the probes of any requests.

    Args:
        editor: Editor that serves the model, see `odedit.ways.base.Way.serving`.
        params: Parameters of the model, not one row per request.
        known: See `evaluate`.
        before: Parameters of the model that it is compared with; None: the unedited model.

    Returns:
        Rows as of `evaluate`, one per request.
    """
    rows: list[Row] = []
    for _, part in _fitting(backbone, batch):
        around = _around(backbone, editor, editor.together, params, config, known, before)
        rows += _rows(backbone, part, around)
    return rows


@torch.no_grad()
def evaluate_model(
    unedited: Backbone,
    edited: Backbone,
    batch: EditBatch,
    features_NLD: Tensor | None = None,
    config: EvaluationConfig = EvaluationConfig(),
    known: UneditedAnswers | None = None,
) -> list[Row]:
    """Scores another checkpoint of the same architecture against the unedited model.

    Args:
        batch: Evaluation batch of any requests, encoded by `unedited`.
        features_NLD: Image features of the batch's pictures by `edited`, in the batch's order; None: the same as those
            of `unedited`, see `Backbone.has_features_of`.
        known: See `evaluate`.

    Returns:
        Rows as of `evaluate`, one per request.
    """

    def both(part: EditBatch) -> _Readouts:
        other = part if features_NLD is None else replace(part, features_NLD=features_NLD)

        def answers(model: Backbone, sequences: EditBatch) -> Readout:
            return _Asked.at(model, sequences, config, TOP_SITE, positionwise=True).answers()

        return _before(known, part, config, lambda: answers(unedited, part)), answers(edited, other)

    return [row for _, part in _fitting(unedited, batch) for row in _rows(unedited, part, both)]


TOP_SITE = ("layers.-1.ffn.out",)
"""Site above everything that positions exchange, from which a forward without edits goes on."""


def _fitting(backbone: Backbone, batch: EditBatch) -> Iterator[tuple[Tensor, EditBatch]]:
    """The batch in parts that the device takes at once, with their row numbers; unchanged if it fits."""
    rows_E = torch.arange(batch.num_edits, device=batch.tokens_EKS.device)
    at_once = _edits_at_once(backbone, batch)
    if batch.num_edits <= at_once:
        yield rows_E, batch
        return
    # Parts of like size, since a small rest costs as many steps as a whole part.
    for part_E in rows_E.tensor_split(-(-batch.num_edits // at_once)):
        yield part_E, batch.take(part_E)


def _around(
    backbone: Backbone,
    editor: Editor,
    apply: Callable[[Backbone, EditParams, EditBatch], AbstractContextManager[Trace]],
    params: EditParams,
    config: EvaluationConfig,
    known: UneditedAnswers | None,
    before: EditParams | None = None,
) -> Callable[[EditBatch], _Readouts]:
    """Function that answers a batch without and with edits.

    Args:
        apply: `Editor.applied` or `Editor.together`.
        before: Parameters of the edits that the first answers are given with; None: without any.
    """

    def both(part: EditBatch) -> _Readouts:
        asked = _Asked.at(backbone, part, config, editor.sites, editor.positionwise)

        def answers(edits: EditParams | None) -> Readout:
            if edits is None:
                return asked.answers()
            own = {name: value.to(part.tokens_EKS.device) for name, value in edits.items()}
            with apply(backbone, own, part):
                return asked.answers()

        first = _before(known, part, config, asked.answers) if before is None else answers(before)
        return first, answers(params)

    return both


def _before(
    known: UneditedAnswers | None, batch: EditBatch, config: EvaluationConfig, ask: Callable[[], Readout]
) -> Readout:
    """Answers of the unedited model, from the store if it has them."""
    return ask() if known is None else known.readout(batch, config, ask)


def _rows(backbone: Backbone, batch: EditBatch, before_and_after: Callable[[EditBatch], _Readouts]) -> list[Row]:
    by_probe: list[dict[str, Row]] = [{} for _ in batch.edit_ids]
    answers: list[Answers] = [{} for _ in batch.edit_ids]
    for part in batch.parts():
        before, after = before_and_after(part)
        # Scores read single numbers, each of which would synchronise with a GPU.
        before, after, part = before.on_host(), after.on_host(), _on_host(part)
        for e in range(part.num_edits):
            for k, name in enumerate(part.slots):
                if bool(part.present_EK[e, k]):
                    by_probe[e][name] = _columns(backbone, part, before, after, e, k)
                    answers[e] |= _answers(backbone, part, before, after, e, k)
    rows = []
    for e, columns in enumerate(by_probe):
        row: Row = {}
        in_order = {name: columns[name] for name in batch.slots if name in columns}
        for scores in _averaged(in_order).values():
            row |= scores
        _average_near_and_far(row)
        rows.append(row | _answer_columns(answers[e]))
    return rows


def _edits_at_once(backbone: Backbone, batch: EditBatch) -> int:
    max_values = budgets(batch.tokens_EKS.device).evaluated_values
    if max_values is None:
        return batch.num_edits
    return max(1, max_values // (batch.tokens_EKS[0].numel() * backbone.hidden_size))


def _on_host(batch: EditBatch) -> EditBatch:
    """The batch with the tensors that scores are computed from on the CPU."""
    names = ("present_EK", "real_EKS", "target_EKT", "target_mask_EKT", "white_EK")
    return replace(batch, **{name: getattr(batch, name).cpu() for name in names})


def _top(backbone: Backbone, hidden: Tensor, mask: Tensor) -> Tensor:
    """First choices `(..., TOP_K)` at the positions of the mask, zeros elsewhere."""
    states_MD = hidden[mask]
    # Logits of all positions would not fit into memory with a large vocabulary.
    at_once = budgets(hidden.device).evaluated_logits // backbone.vocabulary_size
    parts = [backbone.head(part).topk(TOP_K, dim=-1).indices for part in states_MD.split(max(1, at_once))]
    top = torch.zeros(*mask.shape, TOP_K, dtype=torch.long, device=hidden.device)
    top[mask] = torch.cat(parts) if parts else top[mask]
    return top


def answer_text(backbone: Backbone, tokens: Sequence[int]) -> str:
    """Text of a generated answer up to its end, followed by dots if it was cut off."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return decoded(backbone, answer) + ("" if has_ended else " ...")


def answers_target(backbone: Backbone, tokens: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a generated answer is the target, in tokens or in words, and ends there."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return has_ended and (answer == list(target) or decoded(backbone, answer) == decoded(backbone, target))


def decoded(backbone: Backbone, tokens: Sequence[int]) -> str:
    """Text of an answer's tokens."""
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _generated(readout: Readout, e: int, k: int) -> list[int] | None:
    """Tokens generated for a probe, its end and the tokens after it included; None: not generated."""
    return None if readout.greedy_EKT is None else list(readout.greedy_EKT[e, k].tolist())


def _columns(backbone: Backbone, batch: EditBatch, before: Readout, after: Readout, e: int, k: int) -> Row:
    """Columns of one probe of one edit."""
    name = batch.slots[k]
    unedited, edited = (_answer(backbone, batch, readout, e, k) for readout in (before, after))
    if is_locality(name):
        scores = {column(name, ending): score(unedited, edited) for ending, score in LOCALITY_COLUMNS.items()}
    else:
        scores = {column(name, ending): score(edited) for ending, score in ANSWER_COLUMNS.items()}
        scores |= {column(name, ending, BEFORE): score(unedited) for ending, score in ANSWER_COLUMNS.items()}
    return {name: value for name, value in scores.items() if value is not None}


def _answer(backbone: Backbone, batch: EditBatch, readout: Readout, e: int, k: int) -> Answer:
    probe, target_T = batch.slots[k], batch.target_EKT[e, k]
    top_SR = None if readout.top_EKSR is None else readout.top_EKSR[e, k][batch.real_EKS[e, k]]
    answer = Answer(probe, readout.top_EKTR[e, k], target_T, batch.counted_EKT[e, k], top_SR)
    tokens = _generated(readout, e, k)
    if tokens is None:
        return answer
    generated, has_ended = until_end(tokens, ends_of(backbone))
    target = target_T[batch.target_mask_EKT[e, k]].tolist()
    is_target = not is_locality(probe) and answers_target(backbone, tokens, target)
    return replace(answer, generated=generated, has_ended=has_ended, is_target=is_target)


def _answers(backbone: Backbone, batch: EditBatch, before: Readout, after: Readout, e: int, k: int) -> Answers:
    """Texts generated for one probe of one edit; empty if nothing was generated."""
    texts = {
        name: answer_text(backbone, tokens)
        for name, readout in (("before", before), ("after", after))
        if (tokens := _generated(readout, e, k)) is not None
    }
    return {batch.slots[k]: texts} if texts else {}


def _answer_columns(answers: Answers) -> Row:
    """The answers to the edit itself, whole, and those to every probe, each cut to `MAX_ANSWER` characters."""
    if not answers:
        return {}
    own = {f"answer_{name}": text for name, text in answers.get(RELIABILITY, {}).items()}
    return own | {
        "answers": {probe: {name: _cut(text) for name, text in texts.items()} for probe, texts in answers.items()}
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_ANSWER else f"{text[: MAX_ANSWER - 4]} ..."


def _averaged(by_probe: dict[str, Row]) -> dict[str, Row]:
    """Columns by probe, with the mean of numbered probes (`port_gen_1hop_2`) in their place, and of all portability."""
    members: dict[str, list[str]] = {}
    for name in by_probe:
        members.setdefault(_without_number(name), []).append(name)
        if name.startswith(f"{PORTABILITY}_"):
            members.setdefault(PORTABILITY, []).append(name)
    return {base: _mean_columns(base, {name: by_probe[name] for name in names}) for base, names in members.items()}


def _without_number(probe: str) -> str:
    """Name of a probe without its number. The main metrics are no means."""
    base = _NUMBER.sub("", probe)
    return probe if base in METRICS else base


def _mean_columns(base: str, by_probe: dict[str, Row]) -> Row:
    """Mean over probes of each column, under the name `base` with the column's ending."""
    values: dict[str, list[float]] = {}
    for name, row in by_probe.items():
        for key, value in row.items():
            if isinstance(value, float):
                values.setdefault(base + key.removeprefix(name), []).append(value)
    return {key: sum(each) / len(each) for key, each in values.items()}


def _average_near_and_far(row: Row) -> None:
    """Replaces a locality metric by the mean over the record's own (far) and near probe, or by the only one it has."""
    for metric in groups()["locality"]:
        for ending in LOCALITY_COLUMNS:
            name, near = column(metric, ending), row.get(column(f"{metric}_near", ending))
            far = row.get(name)
            if near is None:
                continue
            if far is None:
                row[name] = near
            else:
                row[column(metric, FAR, ending)] = far
                row[name] = (far + near) / 2
