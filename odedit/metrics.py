"""What an edit did, before against after: rel, t_gen, m_gen, t_loc, m_loc, and how sure the figures are.

Token figures are teacher-forced shares of target tokens; `_exact` asks for the whole target; `_generated` compares
with greedy generation, which sees neither the answer's content nor its errors corrected (teacher forcing flatters,
arXiv 2502.11177).

Locality compares the edited model with the unedited one, which is always run without any edit. `answer` reads only the
positions that predict the answer; `mmedit` reads every position, as the MMEdit benchmark does (arXiv 2310.08475),
where prompt positions that an edit hardly reaches dilute the figure.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.brief import brief
from odedit.editors.base import Editor
from odedit.edits import RELIABILITY, EditBatch, EditParams, is_locality
from odedit.key_values import KeyValues
from odedit.selecting import gather_positions

MAIN = ("rel", "t_gen", "m_gen", "t_loc", "m_loc")
TOP_K = 10
_LOGITS_AT_ONCE = {"cpu": 3 * 2**21, "cuda": 2**26}
"""Rows enough for a fast product, and on a CPU a result that finds its memory again: a larger one gets new pages."""
_VALUES_AT_ONCE = {"cpu": 2**21}
"""Of a batch's states: what a layer makes of more of them has left a processor's cache when the next one reads it."""
_ROUNDING = 1e-12
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
        top_EKSR: The same at every position of the probes of locality; None unless asked for.
        greedy_EKT: Greedily generated tokens, as many as the target has; None unless asked for.
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
        params: As `Editor.finished` made them, stacked over the edits of `batch`; on any device.

    Returns:
        One row per edit: `rel`, `<probe>` and, for each, `_exact`, `_generated` and `_before` variants; for locality
        `_whole`, `_generated` and `_mmedit` (where all of an answer must agree: `_whole`). `t_loc` and `m_loc` average
        the record's own probe and its near one where there is one; `_far` and `_near` then tell them apart.
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
                    scores[e][name] = score(name, part, before, after, e, k)
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
    read_EKT = None if config.mmedit else batch.predict_EKT
    memory = KeyValues() if config.generate else None
    prefix = backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise, memory=memory)
    # Every position of what is compared, and wherever a target's token is predicted.
    compared_K = torch.tensor([is_locality(name) for name in batch.slots], device=batch.real_EKS.device)
    mask_EKS = (batch.real_EKS & compared_K[:, None]).int()
    mask_EKS = mask_EKS.scatter_reduce(-1, batch.predict_EKT, batch.target_mask_EKT.int(), "amax").bool()

    def read() -> _Readout:
        own = None if memory is None else memory.branch()
        hidden = backbone.suffix(prefix, read_EKT, own)
        everywhere = _top(backbone, hidden, mask_EKS) if config.mmedit else None
        if everywhere is None:
            top_EKTR = _top(backbone, hidden, batch.target_mask_EKT)
        else:
            top_EKTR = gather_positions(everywhere, batch.predict_EKT)
        greedy_EKT = None if own is None else greedy(backbone, batch, prefix, own, top_EKTR[..., 0])
        return _Readout(top_EKTR, everywhere, greedy_EKT)

    before = read()
    with editor.applied(backbone, params, batch):
        return before, read()


def _edits_at_once(backbone: Backbone, batch: EditBatch) -> int:
    most = _VALUES_AT_ONCE.get(batch.tokens_EKS.device.type)
    if most is None:
        return batch.num_edits
    return max(1, most // (batch.tokens_EKS[0].numel() * backbone.hidden_size))


def _on_host(batch: EditBatch) -> EditBatch:
    """With what figures are made from on the CPU."""
    names = ("present_EK", "real_EKS", "target_EKT", "target_mask_EKT")
    return replace(batch, **{name: getattr(batch, name).cpu() for name in names})


def _top(backbone: Backbone, hidden: Tensor, mask: Tensor) -> Tensor:
    """First choices `(..., TOP_K)` at the positions of the mask, zeros elsewhere."""
    states_MD = hidden[mask]
    # Logits of all positions at once would not fit a large vocabulary.
    at_once = _LOGITS_AT_ONCE.get(hidden.device.type, _LOGITS_AT_ONCE["cuda"]) // backbone.vocabulary_size
    parts = [backbone.head(part).topk(TOP_K, dim=-1).indices for part in states_MD.split(max(1, at_once))]
    top = torch.zeros(*mask.shape, TOP_K, dtype=torch.long, device=hidden.device)
    top[mask] = torch.cat(parts) if parts else top[mask]
    return top


@torch.no_grad()
def greedy(backbone: Backbone, batch: EditBatch, prefix: Prefix, memory: KeyValues, first_choice_EKT: Tensor) -> Tensor:
    """Greedily generated tokens for every probe, as many as its target has, `(E, K, T)`.

    By fixed-point iteration: feed a draft, replace it by the model's first choices, repeat. A token is final as soon
    as all before it are, so T rounds give exactly the tokens of one-by-one decoding, and mostly two or three do. A
    round computes the target's positions alone, which attend to the prompt's keys and values.

    Args:
        memory: Of a forward of `prefix` and suffix, under the edit if there is one; this must be called inside the same
            `applied` block.
        first_choice_EKT: The model's choices given the target, which is the first draft.
    """
    mask_EKT = batch.target_mask_EKT
    draft_EKT, choice_EKT, has_run = batch.target_EKT, first_choice_EKT, False
    for _ in range(batch.target_EKT.shape[-1]):
        changed = (choice_EKT != draft_EKT) & mask_EKT
        # The last token is never fed back, so a change there alone needs no further round.
        fed_back = changed & mask_EKT.roll(-1, dims=-1)
        fed_back[..., -1] = False
        draft_EKT = torch.where(changed, choice_EKT, draft_EKT)
        columns = fed_back.flatten(0, -2).any(dim=0).tolist()
        if True not in columns:
            break
        # A choice depends on what was fed before it and on nothing else, and so do keys and values. The first round
        # has none yet.
        first = columns.index(True) if has_run else 0
        states = backbone.behind(prefix, batch, draft_EKT, memory, first)
        has_run = True
        anew = (fed_back.cumsum(dim=-1) > 0)[..., first:-1] & mask_EKT[..., 1 + first :]
        choice_EKT = choice_EKT.clone()
        choice_EKT[..., 1 + first :][anew] = backbone.head(states[anew]).argmax(dim=-1)
    return draft_EKT


def _answer_columns(name: str, batch: EditBatch, before: _Readout, after: _Readout, e: int, k: int) -> Row:
    mask_T = batch.target_mask_EKT[e, k]
    target_T = batch.target_EKT[e, k][mask_T]
    row: Row = {}
    for suffix, readout in (("", after), ("_before", before)):
        right_T = readout.top_EKTR[e, k, :, 0][mask_T] == target_T
        row[name + suffix] = _share(right_T)
        row[f"{name}_exact{suffix}"] = float(right_T.all())
        if readout.greedy_EKT is not None:
            row[f"{name}_generated{suffix}"] = _share(readout.greedy_EKT[e, k][mask_T] == target_T)
    return row


def _answers(backbone: Backbone, batch: EditBatch, before: _Readout, after: _Readout, e: int) -> Row:
    """What is generated for the edit itself, in words."""
    k, row = batch.slots.index(RELIABILITY), Row()
    for column, readout in (("answer_before", before), ("answer_after", after)):
        if readout.greedy_EKT is not None:
            tokens = readout.greedy_EKT[e, k][batch.target_mask_EKT[e, k]].tolist()
            row[column] = backbone.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return row


def _locality_columns(name: str, batch: EditBatch, before: _Readout, after: _Readout, e: int, k: int) -> Row:
    mask_T = batch.target_mask_EKT[e, k]
    same_TR = before.top_EKTR[e, k][mask_T] == after.top_EKTR[e, k][mask_T]
    row: Row = {
        name: _share(same_TR[:, 0]),
        f"{name}_whole": float(same_TR[:, 0].all()),
        f"{name}_top10": _share(same_TR),
    }
    if before.top_EKSR is not None and after.top_EKSR is not None:
        real_S = batch.real_EKS[e, k]
        same_SR = before.top_EKSR[e, k][real_S] == after.top_EKSR[e, k][real_S]
        # Published: the first choice for text probes, ten choices rank by rank for probes with a picture.
        row[f"{name}_mmedit"] = _share(same_SR if name.startswith("m_") else same_SR[:, 0])
    if before.greedy_EKT is not None and after.greedy_EKT is not None:
        row[f"{name}_generated"] = _share(before.greedy_EKT[e, k][mask_T] == after.greedy_EKT[e, k][mask_T])
    return row


def _average_near_and_far(row: Row) -> None:
    """Where a record has a near locality probe, its own probe is the far one and the metric is their mean."""
    for metric in ("t_loc", "m_loc"):
        if f"{metric}_near" not in row or metric not in row:
            continue
        for variant in ("", "_whole", "_top10", "_mmedit", "_generated"):
            far, near = row.get(metric + variant), row.get(f"{metric}_near{variant}")
            if isinstance(far, float) and isinstance(near, float):
                row[f"{metric}_far{variant}"] = far
                row[metric + variant] = (far + near) / 2


def _share(right: Tensor) -> float:
    return float(right.double().mean())


@dataclass(frozen=True)
class Estimate:
    """A mean over n values with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of b - a over the n records that both have, its 95% interval, and the paired t-test's p."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean and interval; the interval is the mean itself for one value, or when all are equal.

    Args:
        clusters: What each value belongs to. Edits of one fact are not independent, so the interval is made from the
            facts: cluster-robust variance, degrees of freedom one less than clusters. None: every value is its own.

    References:
        Cameron and Miller (2015), A Practitioner's Guide to Cluster-Robust Inference, for the mean alone.

    >>> estimate([1.0, 1.0]).low
    1.0
    """
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    half = _standard_error(values, mean, clusters) * _t_quantile(_num_clusters(values, clusters))
    return Estimate(mean, mean - half, mean + half, n)


def _standard_error(values: Sequence[float], mean: float, clusters: Sequence[Hashable] | None) -> float:
    """Of the mean; with every value its own cluster it is the ordinary one."""
    groups = range(len(values)) if clusters is None else clusters
    sums: dict[Any, float] = {}
    for group, value in zip(groups, values, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    error = math.sqrt(math.fsum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)) / len(values)
    # Equal values are off their mean by rounding: no spread, and no ground for a tiny p.
    return error if error > _ROUNDING * max(map(abs, values)) else 0.0


def _num_clusters(values: Sequence[float], clusters: Sequence[Hashable] | None) -> int:
    return len(values) if clusters is None else len(set(clusters))


def _t_quantile(num_clusters: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, num_clusters - 1)) if num_clusters > 1 else 0.0


def summarize(rows: Sequence[Mapping[str, Any]], facts: Sequence[str] | None = None) -> dict[str, Estimate]:
    """An `Estimate` of every numeric column over the rows that have it.

    A share lies between 0 and 1, and so does its interval.

    Args:
        facts: What each row's edit is about; the intervals are clustered by it.
    """
    columns: dict[str, tuple[list[float], list[str]]] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                values, clusters = columns.setdefault(name, ([], []))
                values.append(float(value))
                clusters.append(str(number) if facts is None else facts[number])
    return {name: estimate_column(values, clusters) for name, (values, clusters) in columns.items()}


def estimate_column(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """As `estimate`, of finite values; of shares, whose interval lies between 0 and 1 as they do."""
    return _within_its_range(estimate(values, clusters), values)


def _within_its_range(found: Estimate, values: Sequence[float]) -> Estimate:
    if min(values) < 0.0 or max(values) > 1.0:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def paired(
    a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = MAIN
) -> dict[str, PairedDifference]:
    """b - a for every metric, over the edits that both runs have, by edit id.

    The test is the paired t-test, clustered by the column `fact` where rows have it: then the facts are what is
    compared, not their edits.
    """
    from scipy import stats

    result = {}
    for metric in metrics:
        shared = [
            k for k in sorted(a.keys() & b.keys()) if _is_number(a[k].get(metric)) and _is_number(b[k].get(metric))
        ]
        if not shared:
            continue
        differences = [float(b[key][metric]) - float(a[key][metric]) for key in shared]
        clusters = [str(a[key].get("fact") or key) for key in shared]
        summary = estimate(differences, clusters)
        error = _standard_error(differences, summary.mean, clusters)
        # Without any spread the t statistic is 0/0: no difference, or the same one everywhere.
        if error == 0.0:
            p = 1.0 if summary.mean == 0 else math.nan
        else:
            p = float(2 * stats.t.sf(abs(summary.mean) / error, len(set(clusters)) - 1))
        result[metric] = PairedDifference(summary.mean, summary.low, summary.high, p, summary.n)
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
