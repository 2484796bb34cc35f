"""Scores of an edit, before against after: rel, t_gen, m_gen, t_loc, m_loc, and their variants.

Token scores are teacher-forced shares of target tokens; `_exact` asks for the whole target. White space in front of an
answer that is a token of its own, as LLaMA's tokenizer makes one in front of a digit, is not counted: it is almost
always right.

`_generated` compares with greedy generation, which sees neither the target nor a correction of its errors (teacher
forcing flatters, arXiv 2502.11177). It starts where a served model starts, so uncounted white space is generated too. A
generated answer ends by itself, or `LONGEST_REST` tokens beyond the target's length: `_generated` is the share of
target tokens at their positions, `_generated_exact` asks that it is the target and ends there.

Locality compares the edited model with the unedited one, which runs without any edit. `answer` reads only the positions
that predict the answer; `mmedit` reads every position, as the MMEdit benchmark does (arXiv 2310.08475), where prompt
positions that an edit hardly reaches dilute the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.editors.base import Editor
from odedit.evaluation.columns import ANSWER_COLUMNS, BEFORE, FAR, LOCALITY_COLUMNS, Answer, column, groups
from odedit.inputs.batch import RELIABILITY, EditBatch, EditParams, is_locality
from odedit.runtime.brief import brief
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

TOP_K = 10

Row = dict[str, float | str | None]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured beside the teacher-forced token scores.

    Attributes:
        generate: Greedy generation for every probe, before and after.
        mmedit: The published locality over all positions, beside the stricter one over answer positions.
    """

    generate: bool = True
    mmedit: bool = True


@dataclass(frozen=True)
class _Readout:
    """Answers of one model to every probe of a batch.

    Attributes:
        top_EKTR: First `TOP_K` choices at the positions that predict the target; undefined at padding.
        top_EKSR: First `TOP_K` choices at every position of the locality probes; None: not measured.
        greedy_EKT: Answers as `generate` returns them; None: not measured.
    """

    top_EKTR: Tensor
    top_EKSR: Tensor | None
    greedy_EKT: Tensor | None

    __repr__ = brief

    def on_host(self) -> _Readout:
        everywhere, generated = (None if value is None else value.cpu() for value in (self.top_EKSR, self.greedy_EKT))
        return _Readout(self.top_EKTR.cpu(), everywhere, generated)


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    editor: Editor,
    params: EditParams,
    batch: EditBatch,
    config: EvaluationConfig = EvaluationConfig(),
) -> list[Row]:
    """Scores E finished edits on the probes of an evaluation batch, before and after.

    Args:
        params: Results of `Editor.finished`, stacked over the edits of `batch`; on any device.

    Returns:
        One row per edit: `rel`, `<probe>` and, for each, `_exact`, `_generated`, `_generated_exact` and `_before`
        variants; for locality `_whole`, `_generated`, `_generated_exact` and `_mmedit` (where all of an answer must
        agree: `_whole`; to its end: `_generated_exact`). `t_loc` and `m_loc` average the record's own probe and its
        near one where there is one; `_far` and `_near` then tell them apart. All endings: `odedit.evaluation.columns`.
    """
    most = _edits_at_once(backbone, batch)
    if batch.num_edits <= most:
        params = {name: value.to(batch.tokens_EKS.device) for name, value in params.items()}
        return _rows(backbone, editor, params, batch, config)
    rows: list[Row] = []
    for part_E in torch.arange(batch.num_edits, device=batch.tokens_EKS.device).split(most):
        part_params = {name: value[part_E.to(value.device)] for name, value in params.items()}
        rows += evaluate(backbone, editor, part_params, batch.take(part_E), config)
    return rows


def _rows(
    backbone: Backbone, editor: Editor, params: EditParams, batch: EditBatch, config: EvaluationConfig
) -> list[Row]:
    by_probe: list[dict[str, Row]] = [{} for _ in batch.edit_ids]
    answers: list[Row] = [{} for _ in batch.edit_ids]
    for part in batch.parts():
        before, after = _before_and_after(backbone, editor, params, part, config)
        # Scores read single numbers, each of which would synchronise with a GPU.
        before, after, part = before.on_host(), after.on_host(), _on_host(part)
        for e in range(part.num_edits):
            for k, name in enumerate(part.slots):
                if bool(part.present_EK[e, k]):
                    by_probe[e][name] = _columns(backbone, part, before, after, e, k)
            if RELIABILITY in part.slots:
                answers[e] = _answers(backbone, part, before, after, e)
    rows = []
    for e, columns in enumerate(by_probe):
        row: Row = {}
        for name in batch.slots:
            row |= columns.get(name, {})
        _average_near_and_far(row)
        rows.append(row | answers[e])
    return rows


def _before_and_after(
    backbone: Backbone, editor: Editor, params: EditParams, batch: EditBatch, config: EvaluationConfig
) -> tuple[_Readout, _Readout]:
    """Answers of the unedited and of the edited model."""
    kv_cache = KVCache() if config.generate else None
    prefix = backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise, kv_cache=kv_cache)
    # The head reads all positions of locality probes, and those that predict a target token or the token after it.
    behind = batch.with_room(int(config.generate), 0, backbone.max_positions)
    num_targets, read_EKT = batch.target_EKT.shape[-1], behind.predict_EKT
    compared_K = torch.tensor([is_locality(name) for name in batch.slots], device=batch.real_EKS.device)
    mask_EKS = (batch.real_EKS & compared_K[:, None]).int()
    mask_EKS = mask_EKS.scatter_reduce(-1, read_EKT, behind.target_mask_EKT.int(), "amax").bool()

    def read() -> _Readout:
        branch = None if kv_cache is None else kv_cache.branch()
        hidden = backbone.suffix(prefix, None if config.mmedit else read_EKT, branch)
        everywhere = _top(backbone, hidden, mask_EKS) if config.mmedit else None
        if everywhere is None:
            top_EKTR = _top(backbone, hidden, behind.target_mask_EKT)
        else:
            top_EKTR = gather_positions(everywhere, read_EKT)
        greedy_EKT = None if branch is None else generate(backbone, batch, prefix, branch, top_EKTR[..., 0])
        return _Readout(top_EKTR[..., :num_targets, :], everywhere, greedy_EKT)

    before = read()
    with editor.applied(backbone, params, batch):
        return before, read()


def _edits_at_once(backbone: Backbone, batch: EditBatch) -> int:
    most = budgets(batch.tokens_EKS.device).evaluated_values
    if most is None:
        return batch.num_edits
    return max(1, most // (batch.tokens_EKS[0].numel() * backbone.hidden_size))


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


def said(backbone: Backbone, tokens: Sequence[int]) -> str:
    """Text of a generated answer up to its end, followed by dots if it was cut off."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return in_words(backbone, answer) + ("" if has_ended else " ...")


def is_said(backbone: Backbone, tokens: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a generated answer is the target, in tokens or in words, and ends there."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return has_ended and (answer == list(target) or in_words(backbone, answer) == in_words(backbone, target))


def in_words(backbone: Backbone, tokens: Sequence[int]) -> str:
    """Text of an answer's tokens."""
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _generated(readout: _Readout, e: int, k: int) -> list[int] | None:
    """Tokens generated for a probe, its end and the tokens behind it included; None: not generated."""
    return None if readout.greedy_EKT is None else list(readout.greedy_EKT[e, k].tolist())


def _columns(backbone: Backbone, batch: EditBatch, before: _Readout, after: _Readout, e: int, k: int) -> Row:
    """Columns of one probe of one edit."""
    name = batch.slots[k]
    unedited, edited = (_answer(backbone, batch, readout, e, k) for readout in (before, after))
    if is_locality(name):
        scores = {column(name, ending): score(unedited, edited) for ending, score in LOCALITY_COLUMNS.items()}
    else:
        scores = {column(name, ending): score(edited) for ending, score in ANSWER_COLUMNS.items()}
        scores |= {column(name, ending, BEFORE): score(unedited) for ending, score in ANSWER_COLUMNS.items()}
    return {name: value for name, value in scores.items() if value is not None}


def _answer(backbone: Backbone, batch: EditBatch, readout: _Readout, e: int, k: int) -> Answer:
    probe, target_T = batch.slots[k], batch.target_EKT[e, k]
    top_SR = None if readout.top_EKSR is None else readout.top_EKSR[e, k][batch.real_EKS[e, k]]
    answer = Answer(probe, readout.top_EKTR[e, k], target_T, batch.counted_EKT[e, k], top_SR)
    tokens = _generated(readout, e, k)
    if tokens is None:
        return answer
    generated, has_ended = until_end(tokens, ends_of(backbone))
    target = target_T[batch.target_mask_EKT[e, k]].tolist()
    is_target = not is_locality(probe) and is_said(backbone, tokens, target)
    return replace(answer, generated=generated, has_ended=has_ended, is_target=is_target)


def _answers(backbone: Backbone, batch: EditBatch, before: _Readout, after: _Readout, e: int) -> Row:
    """Text generated for the edit itself, before and after."""
    k, row = batch.slots.index(RELIABILITY), Row()
    for name, readout in (("answer_before", before), ("answer_after", after)):
        tokens = _generated(readout, e, k)
        if tokens is not None:
            row[name] = said(backbone, tokens)
    return row


def _average_near_and_far(row: Row) -> None:
    """Replaces a locality metric by the mean of the record's own (far) probe and its near one, where it has both."""
    for metric in groups()["locality"]:
        endings = [name.removeprefix(f"{metric}_near") for name in row if name.startswith(f"{metric}_near")]
        for ending in endings:
            far, near = row.get(metric + ending), row[f"{metric}_near{ending}"]
            if isinstance(far, float) and isinstance(near, float):
                row[column(metric, FAR) + ending] = far
                row[metric + ending] = (far + near) / 2
