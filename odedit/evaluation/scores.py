"""What an edit did, before against after: rel, t_gen, m_gen, t_loc, m_loc, and how sure the figures are.

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

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, ends_of
from odedit.editors.base import Editor
from odedit.inputs.batch import RELIABILITY, EditBatch, EditParams, Variant, column, is_locality
from odedit.runtime.brief import brief
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KeyValues

MAIN = ("rel", "t_gen", "m_gen", "t_loc", "m_loc")
TOP_K = 10
LONGEST_REST = 8
"""Tokens beyond its target's length after which a generated answer that has not ended is cut off."""
NO_TOKEN = -1
"""Stands for a token that was not generated, since the model takes no more positions or the answer is cut off there."""
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
        params: As `Editor.finished` made them, stacked over the edits of `batch`; on any device.

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
    memory = KeyValues() if config.generate else None
    prefix = backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise, memory=memory)
    # Every position of what is compared, and wherever a target's token is predicted, or what follows the last one.
    behind = batch.with_room(int(config.generate), 0, backbone.max_positions)
    num_targets, read_EKT = batch.target_EKT.shape[-1], behind.predict_EKT
    compared_K = torch.tensor([is_locality(name) for name in batch.slots], device=batch.real_EKS.device)
    mask_EKS = (batch.real_EKS & compared_K[:, None]).int()
    mask_EKS = mask_EKS.scatter_reduce(-1, read_EKT, behind.target_mask_EKT.int(), "amax").bool()

    def read() -> _Readout:
        own = None if memory is None else memory.branch()
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
    most = _VALUES_AT_ONCE.get(batch.tokens_EKS.device.type)
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
    at_once = _LOGITS_AT_ONCE.get(hidden.device.type, _LOGITS_AT_ONCE["cuda"]) // backbone.vocabulary_size
    parts = [backbone.head(part).topk(TOP_K, dim=-1).indices for part in states_MD.split(max(1, at_once))]
    top = torch.zeros(*mask.shape, TOP_K, dtype=torch.long, device=hidden.device)
    top[mask] = torch.cat(parts) if parts else top[mask]
    return top


def generate(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    memory: KeyValues,
    first_choice_EKT: Tensor,
    longest_rest: int = LONGEST_REST,
) -> Tensor:
    """Greedily generated answers for every probe, `(E, K, T + longest_rest)`, with `NO_TOKEN` behind the last token.

    `until_end` says where each ends.

    Args:
        memory: As for `greedy`.
        first_choice_EKT: The model's choices given the target, and the one behind it, `(E, K, T + 1)`.
        longest_rest: Tokens beyond its target's length after which an answer that has not ended is cut off.
    """
    ends = ends_of(backbone)
    end = min(ends)
    roomy = batch.with_room(longest_rest, end, backbone.max_positions)
    count_EK1 = batch.target_mask_EKT.sum(dim=-1, keepdim=True)
    places_N = torch.arange(roomy.target_EKT.shape[-1], device=count_EK1.device)
    choice_EKN = torch.nn.functional.pad(first_choice_EKT, (0, longest_rest - 1)).where(places_N <= count_EK1, end)
    tokens_EKN = greedy(backbone, roomy, backbone.with_room(prefix, roomy), memory, choice_EKN, ends)
    return tokens_EKN.where(roomy.target_mask_EKT, NO_TOKEN)


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """A generated answer without its end and what follows, and whether it has ended."""
    found = next((place for place, token in enumerate(tokens) if token in ends or token == NO_TOKEN), None)
    return list(tokens[:found]), found is not None and tokens[found] != NO_TOKEN


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


@torch.no_grad()
def greedy(
    backbone: Backbone,
    batch: EditBatch,
    prefix: Prefix,
    memory: KeyValues,
    first_choice_EKT: Tensor,
    ends: Collection[int] = (),
) -> Tensor:
    """Greedily generated tokens for every probe, as many as its target has, `(E, K, T)`.

    By fixed-point iteration: feed a draft, replace it by the model's first choices, repeat. A token is final as soon
    as all before it are, so T rounds give exactly the tokens of one-by-one decoding, and mostly two or three do. A
    round computes the target's positions alone, which attend to the prompt's keys and values.

    Args:
        memory: Of a forward of `prefix` and suffix, under the edit if there is one; this must be called inside the same
            `applied` block.
        first_choice_EKT: The model's choices given the target, which is the first draft.
        ends: Tokens that end an answer: what stands behind the first of them is not generated and has no meaning.
    """
    mask_EKT, num_targets = batch.target_mask_EKT, batch.target_EKT.shape[-1]
    end_N = torch.tensor(sorted(ends), dtype=torch.long, device=mask_EKT.device)
    draft_EKT, choice_EKT, has_run = batch.target_EKT, first_choice_EKT, False
    for _ in range(num_targets):
        changed = (choice_EKT != draft_EKT) & mask_EKT & _goes_on(draft_EKT, end_N)
        draft_EKT = torch.where(changed, choice_EKT, draft_EKT)
        # Whether a token is to be chosen anew: one in front of it has changed, and the answer goes on to it.
        anew = torch.zeros_like(mask_EKT)
        anew[..., 1:] = (changed.cumsum(dim=-1) > 0)[..., :-1]
        anew &= mask_EKT & _goes_on(draft_EKT, end_N)
        columns = anew.flatten(0, -2).any(dim=0).tolist()
        if True not in columns:
            break
        # A choice depends on what was fed before it and on nothing else, and so do keys and values. The first round
        # has none yet.
        first = columns.index(True) - 1 if has_run else 0
        behind_last = num_targets - columns[::-1].index(True)
        states = backbone.behind(prefix, batch, draft_EKT[..., :behind_last], memory, first)
        has_run = True
        chosen = anew[..., 1 + first : behind_last]
        choice_EKT = choice_EKT.clone()
        choice_EKT[..., 1 + first : behind_last][chosen] = backbone.head(states[chosen]).argmax(dim=-1)
    return draft_EKT


def _goes_on(tokens_EKT: Tensor, end_N: Tensor) -> Tensor:
    """Whether no token in front is an end."""
    if not len(end_N):
        return torch.ones_like(tokens_EKT, dtype=torch.bool)
    is_end = torch.isin(tokens_EKT, end_N).int()
    return is_end.cumsum(dim=-1) - is_end == 0


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
