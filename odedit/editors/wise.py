"""WISE: a side matrix W' beside one feed-forward matrix W, and a router that chooses one of them per prompt.

References:
    WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models (2024, arXiv 2405.14768),
    eq. 2 (routing activation), 3 (margin loss), 4 (masked gradient); sections 3.2 and 3.3 for the edits of a stream.
    TIES-Merging: Resolving Interference When Merging Models (2023, arXiv 2306.01708), section 4, for merging shards.

A stream of edits (`commit.way: sequential`) is divided into shards, as published. The edits of a shard move one side
matrix after another, under a random mask of its own; the next shard starts at W. Full shards are merged into one side
memory, and prompts are routed among memories and shards that are not merged yet (WISE-Retrieve).

Differs from the paper: single edits, which are not of a stream, share one mask. The activation distance is averaged
over the prompt's positions, not over prompt and answer, so that routing is the same with the answer in the input
(teacher forcing) and without (generation).

Differs from the public code (github.com/zjunlp/EasyEdit): when it answers, that code takes the largest distance of a
token instead of the mean for sequences of more than 100 positions, as LLaVA's with their pictures are, against a
threshold that is still a mean (`routing: public_code`).

Factored form, used without clamp and with a mask of whole columns or none: the matrix's input X is frozen and a step of
SGD moves `W' - W` by a product with X, so that only the factor A is trained,

    W' - W = A^T (X m),  Y = X W^T + K A,  K = (X m) X^T,  A <- (1 - lr wd) A - lr dL/dY.

This is the same edit in less memory and time when positions are fewer than columns: some 10 MB instead of 105 MB for
BLIP2-OPT-2.7B. The multiplier network then reads A.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import EditSize, OptimizerSettings, Plain, Trace, fitting_sites
from odedit.editors.common.hooks import rewritten
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, EditBatch, EditParams, is_locality
from odedit.runtime.gather import inverse_index, spread
from odedit.settings import Settings

ROWS, INPUTS, PRESENT = "side_rows", "side_inputs", "side_there"
LIVE = "side_live"
THRESHOLD = "threshold"
EDITS = "side_edits"
_DISTANCE, _WINNER = "distance_EK", "winner_EK"
_LONGEST_MEAN = 100
"""Number of positions above which the public code routes by the largest distance of a position."""


@dataclass(frozen=True)
class WiseConfig(Settings):
    """Settings of WISE; the defaults are those published for BLIP2-OPT.

    Attributes:
        site: Matrix W that gets a side matrix.
        learning_rate: Step size of plain SGD.
        weight_decay: Decay of the difference W' - W.
        max_steps: Largest number of steps.
        clamp: Largest absolute entry of W' - W; null: not bounded.
        mask: Unit of the random mask, `entries` as published or whole input `columns`. Without clamp, columns (or a
            `mask_ratio` of 1) give a factored edit, which is smaller.
        mask_ratio: Share of entries or columns that may change (eq. 4).
        mask_seed: Seed of the mask, which is the same for all edits.
        margin_out: Margin alpha (eq. 3): upper bound that the loss sets on the distance of an unrelated prompt.
        margin_in: Margin beta: lower bound that the loss sets on the distance of the edit.
        margin_gap: Margin gamma, by which the edit's distance exceeds an unrelated prompt's.
        routing: Distance of a prompt when a finished edit answers: mean over its positions as in the `paper`, or as in
            the `public_code`, which takes the largest of a position for prompts of more than 100 positions.
        routing_ratio: Share of the edit's own distance above which a prompt uses the side matrix.
        shard_edits: Edits of a stream that move one side matrix, under one mask.
        memory_shards: Full shards that are merged into one side memory; 1: none is merged.
        merge_density: Share of the entries that a shard's mask lets change, the largest, that take part in merging.
        stop_change: Largest change of the loss since the last step for an edit to stop.
        stop_loss: Largest loss for an edit to stop; both conditions must hold.
    """

    site: str = "layers.23.ffn.in"
    learning_rate: Annotated[float, Gt(0)] = 1.0
    weight_decay: Annotated[float, Ge(0)] = 1e-5
    max_steps: Annotated[int, Ge(1)] = 10
    clamp: Annotated[float, Gt(0)] | None = 1.0
    mask: Literal["entries", "columns"] = "entries"
    mask_ratio: Annotated[float, Gt(0), Le(1)] = 0.2
    mask_seed: int = 0
    margin_out: Annotated[float, Ge(0)] = 5.0
    margin_in: Annotated[float, Ge(0)] = 20.0
    margin_gap: Annotated[float, Ge(0)] = 10.0
    routing: Literal["paper", "public_code"] = "paper"
    routing_ratio: Annotated[float, Gt(0), Le(1)] = 0.4
    shard_edits: Annotated[int, Ge(1)] = 500
    memory_shards: Annotated[int, Ge(1)] = 2
    merge_density: Annotated[float, Gt(0), Le(1)] = 0.53
    stop_change: Annotated[float, Ge(0)] = 1e-4
    stop_loss: Annotated[float, Ge(0)] = 0.02


class Wise(Plain):
    """One side matrix per edit.

    phi_e is `side_live`: the entries of `W' - W` that the mask lets change, in the order of the matrix; all others are
    0. A finished edit adds `threshold`, the distance above which the side matrix is used.

    Factored, phi_e is `side_rows`, the factor A, and `side_there`, True at real positions. A finished edit has the rows
    of A that are not zero, and in `side_inputs` the masked inputs X m of these positions.

    The model of a stream has whole differences `W' - W` in `side_live`, a row per side memory and shard, and in
    `side_edits` the number of edits in each.
    """

    Config: ClassVar[type] = WiseConfig

    def __init__(self, config: WiseConfig) -> None:
        self.config = config
        self.sites = (config.site,)
        self.own_slots = (EDIT, *LOCALITY_SLOTS)
        self.max_steps = config.max_steps
        self.optimizer = OptimizerSettings("sgd", config.learning_rate, config.weight_decay)
        self.is_factored = config.clamp is None and (config.mask == "columns" or config.mask_ratio == 1.0)
        self.length_varies = self.is_factored
        self.frozen = frozenset({PRESENT}) if self.is_factored else frozenset()
        self._mask_seed = config.mask_seed
        self._model: EditParams = {}

    def check(self, backbone: Backbone) -> None:
        backbone.site(self.config.site)
        backbone.activation(self.config.site)

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        (site,) = fitting_sites(backbone, self.sites)
        return {} if site == self.config.site else {"site": site}

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        shape, device = backbone.site(self.config.site).weight.shape, batch.tokens_EKS.device
        if not self.is_factored:
            return {LIVE: torch.zeros(batch.num_edits, len(self._live(shape, device)), device=device)}
        # Ordered by position first, so that a longer batch only appends padding.
        _, slots, positions = batch.tokens_EKS.shape
        return {
            ROWS: torch.zeros(batch.num_edits, positions, slots * shape[0], device=device),
            PRESENT: batch.real_EKS.transpose(1, 2).float(),
        }

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        weight = backbone.site(self.config.site).weight
        if self.is_factored:
            return EditSize(positions * len(weight), fixed=positions * weight.shape[1])
        return EditSize(round(self.config.mask_ratio * weight.numel()), dense=weight.numel())

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        trace = Trace()
        activation = backbone.activation(self.config.site)
        num_edits, num_slots = batch.present_EK.shape
        change_of = self._change(backbone, params, num_slots, trace)

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            change = change_of(x.reshape(num_edits, -1, x.shape[-1])).reshape(num_edits, num_slots, -1, y.shape[-1])
            main = y.reshape(change.shape)
            side = main + change
            if _is_whole(main, batch):
                # Pending: objectives without the margin loss read the distance only once, in `finished`.
                distance = self._routing_distance if THRESHOLD in params else _activation_distance
                trace.pending[_DISTANCE] = lambda: distance(activation, main, side, batch.prompt_EKS)
            if THRESHOLD not in params:
                return side.reshape(y.shape)
            to_side_EK = trace.value(_DISTANCE) >= params[THRESHOLD].unsqueeze(1)
            return torch.where(to_side_EK[:, :, None, None], side, main).reshape(y.shape)

        with rewritten({backbone.site(self.config.site): rewrite}):
            yield trace

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """WISE-Retrieve: uses the side matrix with the largest distance above its own threshold, else the matrix W."""
        trace = Trace()
        activation = backbone.activation(self.config.site)
        num_sides = params[THRESHOLD].shape[0]

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            x_EKSI = x.reshape(*batch.present_EK.shape, -1, x.shape[-1])
            main = y.reshape(*x_EKSI.shape[:-1], y.shape[-1])
            is_whole = _is_whole(main, batch)
            best_EK = torch.full(batch.present_EK.shape, -torch.inf, device=y.device)
            winner_EK = torch.full_like(best_EK, -1) if is_whole else trace.values[_WINNER]
            chosen = torch.zeros_like(main)
            for index in range(num_sides):
                # One side matrix at a time: all of them together may exceed the memory.
                change_of = self._change(
                    backbone, {name: value[index : index + 1] for name, value in params.items()}, 1, trace
                )
                change = change_of(x_EKSI.reshape(1, -1, x.shape[-1])).reshape(main.shape)
                if is_whole:
                    distance_EK = self._routing_distance(activation, main, main + change, batch.prompt_EKS)
                    wins = (distance_EK >= params[THRESHOLD][index]) & (distance_EK > best_EK)
                    best_EK = torch.where(wins, distance_EK, best_EK)
                    winner_EK = winner_EK.masked_fill(wins, index)
                chosen = torch.where((winner_EK == index)[:, :, None, None], change, chosen)
            if is_whole:
                trace.values |= {_DISTANCE: best_EK, _WINNER: winner_EK}
            return (main + chosen).reshape(y.shape)

        with rewritten({backbone.site(self.config.site): rewrite}):
            yield trace

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        """Margin loss (eq. 3), `(E,)`, averaged over the edit's unrelated prompts."""
        distance_EK = trace.value(_DISTANCE)
        inside_E = distance_EK[:, batch.slots.index(EDIT)]
        unrelated = batch.answers(tuple(slot for slot in batch.slots if is_locality(slot)))
        outside_EK = unrelated.of(distance_EK)
        gap = (outside_EK - inside_E.unsqueeze(1) + self.config.margin_gap).relu()
        far = (outside_EK - self.config.margin_out).relu()
        count_E = unrelated.present_EK.sum(dim=1).clamp(min=1)
        push_out_E = torch.where(unrelated.present_EK, gap + far, 0.0).sum(dim=1) / count_E
        return push_out_E + (self.config.margin_in - inside_E).relu()

    def constrain(self, params: EditParams) -> EditParams:
        if self.is_factored:
            # The model gives padding no gradient, but a learned multiplier of the penalty, which reads all of A, does.
            present_ESK1 = params[PRESENT].unsqueeze(-1)
            rows_ESKO = params[ROWS].unflatten(2, (present_ESK1.shape[2], -1)) * present_ESK1
            return params | {ROWS: rows_ESKO.flatten(2)}
        clamp = self.config.clamp
        return params if clamp is None else {LIVE: params[LIVE].clamp(-clamp, clamp)}

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        settled = (loss_E - previous_E).abs() <= self.config.stop_change
        return settled & (loss_E <= self.config.stop_loss)

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        with torch.no_grad():
            inside_E = trace.value(_DISTANCE)[:, batch.slots.index(EDIT)]
        # An edit that did not move has distance 0 everywhere; a threshold above 0 keeps all prompts on the matrix W.
        threshold = (self.config.routing_ratio * inside_E).clamp(min=torch.finfo(torch.float32).tiny)
        if self.is_factored:
            rows_ENO = _by_slot(params[ROWS], batch.present_EK.shape[1])
            return _nonzero_rows(rows_ENO, trace.values[INPUTS]) | {THRESHOLD: threshold}
        return {LIVE: params[LIVE], THRESHOLD: threshold}

    def following(self, model: EditParams) -> Wise:
        """A copy for the next edit: it goes on with the last shard, or begins a new one if that is full."""
        other = copy.copy(self)
        other._model = dict(model)
        other.is_factored = other.length_varies = False
        other.frozen = frozenset()
        num_edits = int(model[EDITS].sum()) if model else 0
        other._mask_seed = self.config.mask_seed + num_edits // self.config.shard_edits
        return other

    @property
    def _continues_shard(self) -> bool:
        """Whether the next edit moves the model's last row."""
        return bool(self._model) and int(self._model[EDITS].sum()) % self.config.shard_edits > 0

    def start(self, backbone: Backbone) -> EditParams:
        if not self._continues_shard:
            return {}
        live_N = self._live(backbone.site(self.config.site).weight.shape, self._model[LIVE].device)
        return {LIVE: self._model[LIVE][-1:].index_select(1, live_N)}

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        """The model with the moved shard; with its last shards merged once there are enough full ones.

        The threshold of a row is the smallest of its edits' (WISE, section 3.3).
        """
        added = {
            LIVE: self._side(backbone, params[LIVE]).flatten(1),
            THRESHOLD: params[THRESHOLD],
            EDITS: torch.ones(1, dtype=torch.long, device=params[LIVE].device),
        }
        if not self._model:
            return added
        model = self._model
        if self._continues_shard:
            added[THRESHOLD] = torch.minimum(added[THRESHOLD], model[THRESHOLD][-1:])
            added[EDITS] = model[EDITS][-1:] + 1
            model = {name: value[:-1] for name, value in model.items()}
        model = {name: torch.cat([model[name], value]) for name, value in added.items()}
        return self._with_merged_shards(model)

    def _with_merged_shards(self, model: EditParams) -> EditParams:
        """The model with its last rows as one, if they are as many full shards as make a side memory."""
        count = self.config.memory_shards
        shards = {name: value[-count:] for name, value in model.items()}
        if count == 1 or len(shards[EDITS]) < count or bool((shards[EDITS] != self.config.shard_edits).any()):
            return model
        memory = {
            LIVE: _ties(shards[LIVE], self.config.merge_density * self.config.mask_ratio).unsqueeze(0),
            THRESHOLD: shards[THRESHOLD].amin(dim=0, keepdim=True),
            EDITS: shards[EDITS].sum(dim=0, keepdim=True),
        }
        return {name: torch.cat([value[:-count], memory[name]]) for name, value in model.items()}

    def _routing_distance(
        self, activation: Callable[[Tensor], Tensor], main: Tensor, side: Tensor, prompt_EKS: Tensor
    ) -> Tensor:
        """Distance that a finished edit compares with its threshold, `(E, K)`; see `WiseConfig.routing`."""
        longest = _LONGEST_MEAN if self.config.routing == "public_code" else None
        return _activation_distance(activation, main, side, prompt_EKS, longest)

    def _change(
        self, backbone: Backbone, params: EditParams, num_slots: int, trace: Trace
    ) -> Callable[[Tensor], Tensor]:
        """Function from inputs `(E, N, in)` to the side matrix's change of the output, `(E, N, out)`."""
        if INPUTS in params:
            return lambda x_ENI: torch.bmm(
                torch.bmm(x_ENI, params[INPUTS].to(x_ENI.dtype).transpose(1, 2)), params[ROWS].to(x_ENI.dtype)
            )
        if ROWS in params:
            width = backbone.site(self.config.site).weight.shape[1]
            mask_I = _live_columns(width, self.config.mask_ratio, self.config.mask_seed, str(params[ROWS].device))
            rows_ENO = _by_slot(params[ROWS], num_slots)

            def factored(x_ENI: Tensor) -> Tensor:
                masked_ENI = x_ENI * mask_I.to(x_ENI.dtype)
                trace.values[INPUTS] = masked_ENI.detach()
                change: Tensor = _Factored.apply(rows_ENO, torch.bmm(x_ENI, masked_ENI.transpose(1, 2)))
                return change

            return factored
        # Cast before scattering: fewer values. With the matrix as first factor, its gradient needs no transposition.
        side_EOI = self._side(backbone, params[LIVE].to(backbone.site(self.config.site).weight.dtype))
        return lambda x_ENI: torch.bmm(side_EOI.expand(len(x_ENI), -1, -1), x_ENI.transpose(1, 2)).transpose(1, 2)

    def _side(self, backbone: Backbone, live_EN: Tensor) -> Tensor:
        """`W' - W` of every edit, `(E, out, in)`, in the dtype of `live_EN`."""
        shape = backbone.site(self.config.site).weight.shape
        if live_EN.shape[1] == shape.numel():
            return live_EN.unflatten(1, shape)
        live_N = self._live(shape, live_EN.device)
        if live_EN.is_cuda:
            return spread(live_EN, live_N, _live_ranks(*self._mask(shape, live_EN.device))).unflatten(1, shape)
        # On a CPU, writing the few entries is faster than looking up all.
        flat_EM = live_EN.new_zeros(len(live_EN), shape.numel())
        return flat_EM.index_copy_(1, live_N, live_EN).unflatten(1, shape)

    def _live(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Flat indices of the entries that the mask lets change."""
        return _live_entries(*self._mask(shape, device))

    def _mask(self, shape: torch.Size, device: torch.device) -> tuple[tuple[int, ...], bool, float, int, str]:
        """Arguments that determine the mask: shape, whole columns or not, ratio, seed, device."""
        columns = self.config.mask == "columns"
        return tuple(shape), columns, self.config.mask_ratio, self._mask_seed, str(device)


class _Factored(torch.autograd.Function):
    """`K A`, with the gradient of K A passed to A: SGD on A then moves `W' - W` like SGD on the matrix itself."""

    @staticmethod
    def forward(ctx: Any, rows_ENO: Tensor, gram_ENN: Tensor) -> Tensor:
        ctx.dtype = rows_ENO.dtype
        return torch.bmm(gram_ENN, rows_ENO.to(gram_ENN.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def _by_slot(rows: Tensor, num_slots: int) -> Tensor:
    """A from `(E, S, K * O)`, as it is trained, to the order of the sequences, `(E, K * S, O)`."""
    return rows.unflatten(2, (num_slots, -1)).transpose(1, 2).flatten(1, 2)


def _nonzero_rows(rows_ENO: Tensor, inputs_ENI: Tensor) -> EditParams:
    """Non-zero rows of A and their inputs, in order, padded to the longest edit."""
    nonzero_EN = (rows_ENO != 0).any(-1)
    length = max(1, int(nonzero_EN.sum(1).max()))
    order_ET1 = torch.sort((~nonzero_EN).long(), dim=1, stable=True).indices[:, :length, None]
    is_present_ET1 = nonzero_EN.unsqueeze(-1).gather(1, order_ET1)
    return {
        name: value.float().gather(1, order_ET1.expand(-1, -1, value.shape[-1])) * is_present_ET1
        for name, value in ((ROWS, rows_ENO), (INPUTS, inputs_ENI))
    }


def _is_whole(main_EKSO: Tensor, batch: EditBatch) -> bool:
    """True for whole sequences; False for positions after them, which are routed as their prompt was."""
    return main_EKSO.shape[2] == batch.prompt_EKS.shape[2]


def _activation_distance(
    activation: Callable[[Tensor], Tensor],
    main: Tensor,
    side: Tensor,
    prompt_EKS: Tensor,
    longest_mean: int | None = None,
) -> Tensor:
    """Activation distance (eq. 2), `(E, K)`: mean over prompt positions of |sigma(W'x) - sigma(Wx)|_2.

    Args:
        longest_mean: Largest number of prompt positions that are averaged; of a longer prompt the largest distance of a
            position is taken. None: no bound.
    """
    squared_EKS = (activation(side).float() - activation(main).float()).square().sum(dim=-1)
    # The gradient of the root is infinite at 0, where every edit starts.
    norm_EKS = (squared_EKS + 1e-12).sqrt() - 1e-6
    weight = prompt_EKS.to(norm_EKS.dtype)
    length_EK = weight.sum(dim=-1)
    mean_EK = (norm_EKS * weight).sum(dim=-1) / length_EK.clamp(min=1)
    if longest_mean is None:
        return mean_EK
    return torch.where(length_EK > longest_mean, (norm_EKS * weight).amax(dim=-1), mean_EK)


def _ties(delta_EN: Tensor, density: float) -> Tensor:
    """TIES, `(N,)`: keeps each difference's largest entries, elects a sign per entry, averages those that agree."""
    kept = max(1, round(density * delta_EN.shape[1]))
    largest = delta_EN.abs().topk(kept, dim=1).indices
    trimmed_EN = torch.zeros_like(delta_EN).scatter(1, largest, delta_EN.gather(1, largest))
    agrees_EN = (trimmed_EN.sign() == trimmed_EN.sum(dim=0).sign()) & (trimmed_EN != 0)
    return torch.where(agrees_EN, trimmed_EN, 0.0).sum(dim=0) / agrees_EN.sum(dim=0).clamp(min=1)


def _draw(shape: tuple[int, ...], ratio: float, seed: int) -> Tensor:
    """The fixed Bernoulli mask; drawn on the CPU, so that it is the same on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < ratio


@lru_cache(maxsize=4)
def _live_columns(width: int, ratio: float, seed: int, device: str) -> Tensor:
    """Mask of input columns, `(in,)`: 1 where the column may change, else 0."""
    return _draw((width,), ratio, seed).float().to(device)


@lru_cache(maxsize=4)
def _live_entries(shape: tuple[int, ...], columns: bool, ratio: float, seed: int, device: str) -> Tensor:
    """Flat indices of the entries that may change, ascending."""
    mask = _draw(shape[1:] if columns else shape, ratio, seed).expand(shape)
    return mask.flatten().nonzero().squeeze(1).to(device)


@lru_cache(maxsize=4)
def _live_ranks(shape: tuple[int, ...], columns: bool, ratio: float, seed: int, device: str) -> Tensor:
    """Rank of every entry among those that may change, as `spread` reads it; the inverse of `_live_entries`."""
    return inverse_index(_live_entries(shape, columns, ratio, seed, device), math.prod(shape)).int()


EDITOR = Wise
