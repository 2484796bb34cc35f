"""WISE: a side memory beside one feed-forward matrix, and a router that decides which of the two answers.

References:
    WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models (2024, arXiv 2405.14768),
    eq. 2 (routing activation), 3 (margin loss), 4 (masked gradient).
    TIES-Merging: Resolving Interference When Merging Models (2023, arXiv 2306.01708), section 4, for `merged_memories`.

Differs from the paper: the memories of all edits share one mask, where the paper draws one per shard of a stream of
edits. The activation distance is averaged over the positions of the prompt, not of prompt and answer,
so that routing is the same whether the answer is in the input (teacher forcing) or not (generation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from odedit.backbones.base import Backbone
from odedit.editors.base import OptimizerSettings, Plain, Trace, check_range
from odedit.edits import EDIT, LOCALITY_SLOTS, EditBatch, EditParams, is_locality
from odedit.hooks import rewritten

SIDE = "side"
LIVE = "side_live"
THRESHOLD = "threshold"
_DISTANCE, _WINNER = "distance_EK", "winner_EK"


@dataclass(frozen=True)
class WiseConfig:
    """Settings of WISE; the defaults are those published for BLIP2-OPT.

    Attributes:
        site: The matrix that gets a side copy.
        learning_rate: Of plain SGD.
        weight_decay: On the difference between side copy and matrix.
        max_steps: Bound of the inner loop.
        clamp: Largest absolute difference of an entry of the side copy.
        mask_ratio: Share of entries that may change, a fixed random mask (eq. 4).
        mask_seed: Of that mask.
        margin_out: alpha: the distance of an unrelated prompt is pushed below it (eq. 3).
        margin_in: beta: the distance of the edit is pushed above it.
        margin_gap: gamma: the edit's distance exceeds an unrelated prompt's by it.
        routing_ratio: A prompt whose distance exceeds this share of the edit's own goes to the side memory.
        merge_density: Share of a memory's entries, the largest, that take part when memories are merged.
        stop_change, stop_loss: Stops when the loss changes by no more than the first and is no larger than the second.
    """

    site: str = "layers.23.ffn.in"
    learning_rate: float = 1.0
    weight_decay: float = 1e-5
    max_steps: int = 10
    clamp: float = 1.0
    mask_ratio: float = 0.2
    mask_seed: int = 0
    margin_out: float = 5.0
    margin_in: float = 20.0
    margin_gap: float = 10.0
    routing_ratio: float = 0.4
    merge_density: float = 0.53
    stop_change: float = 1e-4
    stop_loss: float = 0.02

    def __post_init__(self) -> None:
        check_range("learning_rate", self.learning_rate, "> 0", lambda v: v > 0)
        for name in ("weight_decay", "margin_out", "margin_in", "margin_gap", "stop_change", "stop_loss"):
            check_range(name, getattr(self, name), ">= 0", lambda v: v >= 0)
        check_range("max_steps", self.max_steps, ">= 1", lambda v: v >= 1)
        check_range("clamp", self.clamp, "> 0", lambda v: v > 0)
        for name in ("mask_ratio", "routing_ratio", "merge_density"):
            check_range(name, getattr(self, name), f"0 < {name} <= 1", lambda v: 0 < v <= 1)


class Wise(Plain):
    """One side memory per edit.

    While it trains, `side` holds `W' - W`. Finished, `side_live` holds only the entries that the mask lets change, a
    fifth of them by default, and `threshold` the distance above which the side memory answers.
    """

    Config: ClassVar[type] = WiseConfig

    def __init__(self, config: WiseConfig) -> None:
        self.config = config
        self.sites = (config.site,)
        self.own_slots = (EDIT, *LOCALITY_SLOTS)
        self.max_steps = config.max_steps
        self.optimizer = OptimizerSettings("sgd", config.learning_rate, config.weight_decay)

    def check(self, backbone: Backbone) -> None:
        backbone.site(self.config.site)
        backbone.activation(self.config.site)

    def init(self, backbone: Backbone, batch: EditBatch) -> EditParams:
        shape = backbone.site(self.config.site).weight.shape
        return {SIDE: torch.zeros(batch.num_edits, *shape, device=batch.tokens_EKS.device)}

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        trace = Trace()
        activation = backbone.activation(self.config.site)
        num_edits, num_slots = batch.present_EK.shape
        side_EOI = self._side(backbone, params)

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            x_ENI = x.reshape(num_edits, -1, x.shape[-1])
            change = torch.bmm(x_ENI, side_EOI.to(x.dtype).transpose(1, 2)).reshape(
                num_edits, num_slots, -1, y.shape[-1]
            )
            main = y.reshape(change.shape)
            side = main + change
            if _is_whole(main, batch):
                # The objective may have no use for it: then it is asked for once, in the end.
                trace.pending[_DISTANCE] = lambda: _activation_distance(activation, main, side, batch.prompt_EKS)
            if THRESHOLD not in params:
                return side.reshape(y.shape)
            to_side_EK = trace.value(_DISTANCE) >= params[THRESHOLD].unsqueeze(1)
            return torch.where(to_side_EK[:, :, None, None], side, main).reshape(y.shape)

        with rewritten({backbone.site(self.config.site): rewrite}):
            yield trace

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """WISE-Retrieve: the memory with the largest distance above its own threshold answers, else the matrix."""
        trace = Trace()
        activation = backbone.activation(self.config.site)
        num_memories = params[THRESHOLD].shape[0]

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            x_EKSI = x.reshape(*batch.present_EK.shape, -1, x.shape[-1])
            main = y.reshape(*x_EKSI.shape[:-1], y.shape[-1])
            is_whole = _is_whole(main, batch)
            best_EK = torch.full(batch.present_EK.shape, -torch.inf, device=y.device)
            winner_EK = torch.full_like(best_EK, -1) if is_whole else trace.values[_WINNER]
            chosen = torch.zeros_like(main)
            for memory in range(num_memories):
                one = {name: value[memory : memory + 1] for name, value in params.items()}
                change = x_EKSI @ self._side(backbone, one)[0].to(x.dtype).T
                if is_whole:
                    distance_EK = _activation_distance(activation, main, main + change, batch.prompt_EKS)
                    wins = (distance_EK >= params[THRESHOLD][memory]) & (distance_EK > best_EK)
                    best_EK = torch.where(wins, distance_EK, best_EK)
                    winner_EK = winner_EK.masked_fill(wins, memory)
                chosen = torch.where((winner_EK == memory)[:, :, None, None], change, chosen)
            if is_whole:
                trace.values |= {_DISTANCE: best_EK, _WINNER: winner_EK}
            return (main + chosen).reshape(y.shape)

        with rewritten({backbone.site(self.config.site): rewrite}):
            yield trace

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        """Eq. 3, averaged over the unrelated prompts that the edit has."""
        distance_EK = trace.value(_DISTANCE)
        inside_E = distance_EK[:, batch.slots.index(EDIT)]
        outside = torch.tensor([is_locality(slot) for slot in batch.slots], device=distance_EK.device)
        valid_EK = batch.present_EK & outside
        gap = (distance_EK - inside_E.unsqueeze(1) + self.config.margin_gap).relu()
        far = (distance_EK - self.config.margin_out).relu()
        count_E = valid_EK.sum(dim=1).clamp(min=1)
        push_out_E = torch.where(valid_EK, gap + far, 0.0).sum(dim=1) / count_E
        return push_out_E + (self.config.margin_in - inside_E).relu()

    def constrain(self, params: EditParams) -> EditParams:
        # Masked here as well: what the multiplier network reads must be what the model computes with.
        return {SIDE: self._masked(params[SIDE]).clamp(-self.config.clamp, self.config.clamp)}

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        settled = (loss_E - previous_E).abs() <= self.config.stop_change
        return settled & (loss_E <= self.config.stop_loss)

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        with torch.no_grad():
            inside_E = trace.value(_DISTANCE)[:, batch.slots.index(EDIT)]
        # An edit that never moved has distance 0 everywhere; the tiniest positive threshold keeps it off the side path.
        threshold = (self.config.routing_ratio * inside_E).clamp(min=torch.finfo(torch.float32).tiny)
        return {
            LIVE: params[SIDE].flatten(1)[:, self._live(params[SIDE].shape[-2:], params[SIDE].device)],
            THRESHOLD: threshold,
        }

    def merged_memories(self, params: EditParams) -> EditParams:
        """One memory (axis 0 has length 1) that stands for those of E finished edits, by TIES.

        It answers what any of the edits would have claimed: its threshold is the smallest of theirs. The density is
        taken of the entries that the mask lets change; of the whole matrix it would trim nothing.
        """
        return {
            LIVE: _ties(params[LIVE], self.config.merge_density).unsqueeze(0),
            THRESHOLD: params[THRESHOLD].amin(dim=0, keepdim=True),
        }

    def _side(self, backbone: Backbone, params: EditParams) -> Tensor:
        """`W' - W` of every edit, `(E, out, in)`, from training or from finished parameters."""
        if SIDE in params:
            return self._masked(params[SIDE])
        live_EN = params[LIVE]
        shape = backbone.site(self.config.site).weight.shape
        flat = live_EN.new_zeros(live_EN.shape[0], shape.numel())
        return flat.index_copy(1, self._live(shape, live_EN.device), live_EN).reshape(-1, *shape)

    def _masked(self, side_EOI: Tensor) -> Tensor:
        return side_EOI * self._mask(side_EOI.shape[-2:], side_EOI.device)

    def _mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        return _bernoulli(tuple(shape), self.config.mask_ratio, self.config.mask_seed, str(device))

    def _live(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Flat indices of the entries that may change."""
        return self._mask(shape, device).flatten().nonzero().squeeze(1)


def _is_whole(main_EKSO: Tensor, batch: EditBatch) -> bool:
    """Whether these are whole sequences; else positions behind them, which go where their prompts went."""
    return main_EKSO.shape[2] == batch.prompt_EKS.shape[2]


def _activation_distance(
    activation: Callable[[Tensor], Tensor], main: Tensor, side: Tensor, prompt_EKS: Tensor
) -> Tensor:
    """Eq. 2: mean over prompt positions of |sigma(W'x) - sigma(Wx)|_2, `(E, K)`."""
    squared_EKS = (activation(side).float() - activation(main).float()).square().sum(dim=-1)
    # The root's gradient is infinite at 0, where every edit starts.
    norm_EKS = (squared_EKS + 1e-12).sqrt() - 1e-6
    weight = prompt_EKS.to(norm_EKS.dtype)
    return (norm_EKS * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1)


def _ties(delta_EN: Tensor, density: float) -> Tensor:
    """Trims each difference to its largest entries, elects a sign per entry, averages those that agree, `(N,)`."""
    kept = max(1, round(density * delta_EN.shape[1]))
    largest = delta_EN.abs().topk(kept, dim=1).indices
    trimmed_EN = torch.zeros_like(delta_EN).scatter(1, largest, delta_EN.gather(1, largest))
    agrees_EN = (trimmed_EN.sign() == trimmed_EN.sum(dim=0).sign()) & (trimmed_EN != 0)
    return torch.where(agrees_EN, trimmed_EN, 0.0).sum(dim=0) / agrees_EN.sum(dim=0).clamp(min=1)


@lru_cache(maxsize=4)
def _bernoulli(shape: tuple[int, ...], ratio: float, seed: int, device: str) -> Tensor:
    """The fixed Bernoulli mask, drawn on the CPU so that every device sees the same one."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < ratio).float().to(device)


EDITOR = Wise
