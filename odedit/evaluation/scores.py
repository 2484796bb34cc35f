"""What an edit did, before against after: rel, t_gen, m_gen, t_loc, m_loc.

Token figures are teacher-forced shares of target tokens; `_exact` asks for the whole target. White space in front of an
answer that is a token of its own, as LLaMA's tokenizer makes one in front of a digit, is not counted: it is almost
always right.

`_generated` compares with greedy generation, which sees neither the answer's content nor its errors corrected (teacher
forcing flatters, arXiv 2502.11177). It starts where a served model starts, so that uncounted white space is generated,
too. A generated answer goes on to its end, or `LONGEST_REST` tokens beyond the target: `_generated` is the share of
target tokens that it has in their places, `_generated_exact` asks that it is the target and ends there.

Locality compares the edited model with the unedited one, which is always run without any edit. `answer` reads only the
positions that predict the answer; `mmedit` reads every position, as the MMEdit benchmark does (arXiv 2310.08475),
where prompt positions that an edit hardly reaches dilute the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, ends_of
from odedit.backbones.common.generation import generate, until_end
from odedit.editors.base import Editor
from odedit.inputs.batch import RELIABILITY, EditBatch, EditParams, Variant, column, is_locality
from odedit.runtime.brief import brief
from odedit.runtime.budgets import budgets
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

TOP_K = 10

Row = dict[str, float | str | None]


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured beside the teacher-forced token figures.

    Attributes:
        generate: Greedy generation for every probe, before and after.
        mmedit: The published locality over all positions, beside the stricter one over answer positions.
    """

    generate: bool = True
    mmedit: bool = True


@dataclass(frozen=True)
class _Readout:
    """One model's answers to every probe of a batch.

    Attributes:
        top_EKTR: The first `TOP_K` choices at the positions that predict the target; anything where there is none.
        top_EKSR: First `TOP_K` choices at every position of the locality probes; None unless asked for.
        greedy_EKT: Answers as `generate` returns them; None unless asked for.
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
        near one where there is one; `_far` and `_near` then tell them apart.
    """
    at_once = _edits_at_once(backbone, batch)
    if batch.num_edits > at_once:
        rows: list[Row] = []
        for part_E in torch.arange(batch.num_edits, device=batch.tokens_EKS.device).split(at_once):
            of_part = {name: value[part_E.to(value.device)] for name, value in params.items()}
            rows += evaluate(backbone, editor, of_part, batch.take(part_E), config)
        return rows

    params = {name: value.to(batch.tokens_EKS.device) for name, value in params.items()}
    scores: list[dict[str, Row]] = [{} for _ in batch.edit_ids]
    answers: list[Row] = [{} for _ in batch.edit_ids]
    for part in batch.parts():
        before, after = _before_and_after(backbone, editor, params, part, config)
        # What follows reads single numbers, each of which would wait for a GPU.
        before, after, part = before.on_host(), after.on_host(), _on_host(part)
        for e in range(part.num_edits):
            for k, name in enumerate(part.slots):
                if bool(part.present_EK[e, k]):
                    score = _locality_columns if is_locality(name) else _answer_columns
                    scores[e][name] = score(backbone, name, part, before, after, e, k)
            if RELIABILITY in part.slots:
                answers[e] = _answers(backbone, part, before, after, e)
    rows = []
    for e, of_edit in enumerate(scores):
        row: Row = {}
        for name in batch.slots:
            row |= of_edit.get(name, {})
        _average_near_and_far(row)
        rows.append(row | answers[e])
    return rows


def _before_and_after(
    backbone: Backbone, editor: Editor, params: EditParams, batch: EditBatch, config: EvaluationConfig
) -> tuple[_Readout, _Readout]:
    """What the unedited and the edited model say to the probes."""
    kv_cache = KVCache() if config.generate else None
    prefix = backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise, kv_cache=kv_cache)
    # Every position of what is compared, and wherever a target's token is predicted, or what follows the last one.
    behind = batch.with_room(int(config.generate), 0, backbone.max_positions)
    num_targets, read_EKT = batch.target_EKT.shape[-1], behind.predict_EKT
    compared_K = torch.tensor([is_locality(name) for name in batch.slots], device=batch.real_EKS.device)
    mask_EKS = (batch.real_EKS & compared_K[:, None]).int()
    mask_EKS = mask_EKS.scatter_reduce(-1, read_EKT, behind.target_mask_EKT.int(), "amax").bool()

    def read() -> _Readout:
        own = None if kv_cache is None else kv_cache.branch()
        hidden = backbone.suffix(prefix, None if config.mmedit else read_EKT, own)
        everywhere = _top(backbone, hidden, mask_EKS) if config.mmedit else None
        if everywhere is None:
            top_EKTR = _top(backbone, hidden, behind.target_mask_EKT)
        else:
            top_EKTR = gather_positions(everywhere, read_EKT)
        greedy_EKT = None if own is None else generate(backbone, batch, prefix, own, top_EKTR[..., 0])
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
    """With what figures are made from on the CPU."""
    names = ("present_EK", "real_EKS", "target_EKT", "target_mask_EKT", "white_EK")
    return replace(batch, **{name: getattr(batch, name).cpu() for name in names})


def _top(backbone: Backbone, hidden: Tensor, mask: Tensor) -> Tensor:
    """First choices `(..., TOP_K)` at the positions of the mask, zeros elsewhere."""
    states_MD = hidden[mask]
    # Logits of all positions at once would not fit a large vocabulary.
    at_once = budgets(hidden.device).evaluated_logits // backbone.vocabulary_size
    parts = [backbone.head(part).topk(TOP_K, dim=-1).indices for part in states_MD.split(max(1, at_once))]
    top = torch.zeros(*mask.shape, TOP_K, dtype=torch.long, device=hidden.device)
    top[mask] = torch.cat(parts) if parts else top[mask]
    return top


def said(backbone: Backbone, tokens: Sequence[int]) -> str:
    """A generated answer in words, up to its end; with dots if it was cut off."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return in_words(backbone, answer) + ("" if has_ended else " ...")


def is_said(backbone: Backbone, tokens: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a generated answer is the target, in tokens or in words, and ends there."""
    answer, has_ended = until_end(tokens, ends_of(backbone))
    return has_ended and (answer == list(target) or in_words(backbone, answer) == in_words(backbone, target))


def in_words(backbone: Backbone, tokens: Sequence[int]) -> str:
    """The text of an answer's tokens."""
    return str(backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _generated(readout: _Readout, e: int, k: int) -> list[int] | None:
    """The tokens that were generated for a probe, its end and what follows included; None if none were."""
    return None if readout.greedy_EKT is None else list(readout.greedy_EKT[e, k].tolist())


def _answer_columns(
    backbone: Backbone, name: str, batch: EditBatch, before: _Readout, after: _Readout, e: int, k: int
) -> Row:
    counted_T = batch.counted_EKT[e, k]
    target = batch.target_EKT[e, k][batch.target_mask_EKT[e, k]].tolist()
    row: Row = {}
    for readout, when in ((after, ()), (before, (Variant.BEFORE,))):
        right_T = readout.top_EKTR[e, k, :, 0][counted_T] == batch.target_EKT[e, k][counted_T]
        row[column(name, *when)] = _share(right_T)
        row[column(name, Variant.EXACT, *when)] = float(right_T.all())
        tokens = _generated(readout, e, k)
        if tokens is not None:
            answer, _ = until_end(tokens, ends_of(backbone))
            row[column(name, Variant.GENERATED, *when)] = _share_alike(answer, target, counted_T)
            row[column(name, Variant.GENERATED, Variant.EXACT, *when)] = float(is_said(backbone, tokens, target))
    return row


def _answers(backbone: Backbone, batch: EditBatch, before: _Readout, after: _Readout, e: int) -> Row:
    """What is generated for the edit itself, in words; with dots if it was cut off."""
    k, row = batch.slots.index(RELIABILITY), Row()
    for name, readout in (("answer_before", before), ("answer_after", after)):
        tokens = _generated(readout, e, k)
        if tokens is not None:
            row[name] = said(backbone, tokens)
    return row


def _locality_columns(
    backbone: Backbone, name: str, batch: EditBatch, before: _Readout, after: _Readout, e: int, k: int
) -> Row:
    counted_T = batch.counted_EKT[e, k]
    same_TR = before.top_EKTR[e, k][counted_T] == after.top_EKTR[e, k][counted_T]
    row: Row = {
        column(name): _share(same_TR[:, 0]),
        column(name, Variant.WHOLE): float(same_TR[:, 0].all()),
        column(name, Variant.TOP10): _share(same_TR),
    }
    if before.top_EKSR is not None and after.top_EKSR is not None:
        real_S = batch.real_EKS[e, k]
        same_SR = before.top_EKSR[e, k][real_S] == after.top_EKSR[e, k][real_S]
        # Published: the first choice for text probes, ten choices rank by rank for probes with a picture.
        row[column(name, Variant.MMEDIT)] = _share(same_SR if name.startswith("m_") else same_SR[:, 0])
    tokens_before, tokens = (_generated(readout, e, k) for readout in (before, after))
    if tokens_before is not None and tokens is not None:
        answer_before, answer = (until_end(one, ends_of(backbone)) for one in (tokens_before, tokens))
        row[column(name, Variant.GENERATED)] = _share_alike(answer_before[0], answer[0], counted_T)
        row[column(name, Variant.GENERATED, Variant.EXACT)] = float(answer_before == answer)
    return row


def _average_near_and_far(row: Row) -> None:
    """Where a record has a near locality probe, its own probe is the far one and the metric is their mean."""
    for metric in ("t_loc", "m_loc"):
        endings = [name.removeprefix(f"{metric}_near") for name in row if name.startswith(f"{metric}_near")]
        for ending in endings:
            far, near = row.get(metric + ending), row[f"{metric}_near{ending}"]
            if isinstance(far, float) and isinstance(near, float):
                row[column(metric, Variant.FAR) + ending] = far
                row[metric + ending] = (far + near) / 2


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _share_alike(one: Sequence[int], other: Sequence[int], counted_T: Tensor) -> float:
    """Share of the counted places at which two answers have the same token, or have both ended."""
    places = counted_T.nonzero().flatten().tolist()
    return sum(one[place : place + 1] == other[place : place + 1] for place in places) / len(places)
