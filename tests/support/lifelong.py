"""Lifelong editing as published, written again in plain loops over the library's modules: WISE and T-Patcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from odedit import EditRequest
from odedit.inputs.batch import EditBatch
from tests.support.transformers_forward import copy_of, library_nll


def ties(deltas: Sequence[Tensor], kept: int) -> Tensor:
    """TIES-Merging (arXiv 2306.01708, section 4): trims, elects a sign, averages the entries that have it.

    Args:
        kept: Number of entries of each difference that are not trimmed.
    """
    trimmed = []
    for delta in deltas:
        smallest = delta.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(delta.abs() >= smallest, delta, torch.zeros_like(delta)))
    sign = torch.sign(sum(trimmed))
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in trimmed:
        agrees = (torch.sign(delta) == sign) & (delta != 0)
        total, count = total + delta * agrees, count + agrees
    return total / count.clamp(min=1)


def wise(
    backbone: Any, batch: EditBatch, requests: Sequence[EditRequest], config: Any, steps: int
) -> list[tuple[Tensor, float, int]]:
    """WISE (arXiv 2405.14768, section 3) by the likelihood alone: shards, masks, merging, thresholds.

    Returns:
        Difference `W' - W`, threshold and number of edits of every side memory, and of the shards behind them.
    """
    model = copy_of(backbone)
    module = model.language_model.model.decoder.layers[int(config.site.split(".")[1])].fc1
    matrix, seen = module.weight.detach().clone(), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    rows: list[tuple[Tensor, float, int]] = []
    for number, request in enumerate(requests):
        shard, place = divmod(number, config.shard_edits)
        if place == 0:
            side, nearest = matrix.clone(), float("inf")
            generator = torch.Generator().manual_seed(config.mask_seed + shard)
            mask = torch.rand(matrix.shape, generator=generator) < config.mask_ratio
        for _ in range(steps):
            module.weight = torch.nn.Parameter(side.clone())
            (gradient,) = torch.autograd.grad(library_nll(model, backbone, batch, request, number), module.weight)
            moved = side - config.learning_rate * (gradient + config.weight_decay * (side - matrix))
            moved = matrix + (moved - matrix).clamp(-config.clamp, config.clamp)
            side = torch.where(mask, moved, side)
        module.weight = torch.nn.Parameter(side.clone())
        seen.clear()
        library_nll(model, backbone, batch, request, number)
        nearest = min(nearest, _distance(seen[0], side, matrix, module.bias, batch, number))
        row = (side - matrix, config.routing_ratio * nearest, place + 1)
        rows = [*rows[:-1], row] if place else [*rows, row]
        full = [count for *_, count in rows[-config.memory_shards :]] == [config.shard_edits] * config.memory_shards
        if full and config.memory_shards > 1:
            last = rows[-config.memory_shards :]
            kept = round(config.merge_density * config.mask_ratio * matrix.numel())
            memory = ties([delta for delta, *_ in last], kept)
            merged = memory, min(threshold for _, threshold, _ in last), sum(count for *_, count in last)
            rows = [*rows[: -config.memory_shards], merged]
    return rows


def _distance(x: Tensor, side: Tensor, matrix: Tensor, bias: Tensor, batch: EditBatch, number: int) -> float:
    """Activation distance (eq. 2) over the positions of the prompt."""
    norms = [
        float((functional.relu(side @ h + bias) - functional.relu(matrix @ h + bias)).norm())
        for h in x.reshape(-1, x.shape[-1])[: int(batch.prompt_EKS[number, 0].sum())]
    ]
    return sum(norms) / len(norms)


def tpatcher(
    backbone: Any,
    batch: EditBatch,
    memory: Tensor,
    config: Any,
    steps: int,
    draws: Sequence[Tensor],
) -> dict[str, Tensor]:
    """T-Patcher (arXiv 2301.09785): neurons beside the last feed-forward network, earlier ones frozen.

    Args:
        memory: Memory states `(M, D)` of unrelated prompts; the states of earlier edits join them.
        draws: Initial `v` of every edit, `(max_neurons, D)`.

    Returns:
        All neurons: `k`, `v`, `a`, `states` `(N, D)` and `b` `(N,)`.
    """
    decoder = backbone.model.language_model.model.decoder
    layer, norm, head = decoder.layers[-1], decoder.final_layer_norm, backbone.model.language_model.lm_head
    with torch.no_grad():
        prefix = backbone.prefix(batch, "layers.-1.ffn.out")
        residuals = prefix.hidden_RSD.reshape(*batch.tokens_EKS.shape, -1)
    frozen: dict[str, list[Tensor]] = {name: [] for name in ("k", "b", "v", "a", "states")}

    def network(h: Tensor) -> Tensor:
        out = layer.fc2(layer.fc1(h).relu())
        for k, b, v, a in zip(*(frozen[name] for name in ("k", "b", "v", "a")), strict=True):
            out = out + (h @ k.T + b).relu() @ (a * v)
        return out

    for number in range(batch.num_edits):
        mask = batch.target_mask_EKT[number, 0]
        at, target = batch.predict_EKT[number, 0][mask], batch.target_EKT[number, 0][mask]
        before = residuals[number, 0, at]
        h = layer.final_layer_norm(before)
        with torch.no_grad():
            log_p = head(norm(before + network(h))).log_softmax(-1)
        wrong = (log_p.argmax(-1) != target).nonzero().flatten().tolist()
        wrong = wrong or [int(log_p[range(len(target)), target].argmin())]
        own = h[wrong[: config.max_neurons]].detach()
        memories = torch.cat([memory, *frozen["states"]])
        trained = k, b, v, a = [
            (own / own.square().sum(-1, keepdim=True)).requires_grad_(),
            torch.zeros(len(own), requires_grad=True),
            draws[number][: len(own)].clone().requires_grad_(),
            torch.full_like(own, config.value_scale).requires_grad_(),
        ]
        optimizer = torch.optim.Adam(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
        for _ in range(steps):
            logits = head(norm(before + network(h) + (h @ k.T + b).relu() @ (a * v)))
            nll = functional.cross_entropy(logits, target, label_smoothing=config.label_smoothing)
            active, inputs = (k * own).sum(-1) + b, k @ memories.T + b.unsqueeze(-1)
            l_a = _mean_of_largest((-active).exp(), config.activation_top)
            l_m1 = _mean_of_largest((inputs + config.margin_silent).exp(), config.memory_top)
            l_m2 = _mean_of_largest((inputs - active.unsqueeze(-1) + config.margin_gap).exp(), config.memory_top)
            optimizer.zero_grad()
            (nll + config.activation_weight * l_a + config.memory_weight * (l_m1 + l_m2)).backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
            optimizer.step()
        for name, value in zip(("k", "b", "v", "a", "states"), (*trained, own), strict=True):
            frozen[name].append(value.detach())
    return {name: torch.cat(values) for name, values in frozen.items()}


def _mean_of_largest(values: Tensor, top: int) -> Tensor:
    return values.flatten().sort(descending=True).values[:top].mean()
