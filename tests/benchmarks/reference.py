"""The reference implementation: one edit at a time, one sequence at a time, the whole model in every step.

Without caches: scale gradients come from autograd through an explicit w and are differentiated once more, and answers
are generated token by token with a whole forward each. `odedit` must agree with it in its results and is compared to it
in speed. The optimiser is `odedit`'s own, tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from odedit.backbones import encode_requests
from odedit.editing.primal_dual import PrimalDual
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, REPHRASE_SLOTS, EditParams, EditRequest, Probe, is_locality
from odedit.inputs.encoding import TokenSequence
from odedit.inputs.prompts import find_template
from odedit.objectives.base import Objective
from odedit.objectives.common.penalty import tv_penalty
from odedit.objectives.common.terms import Terms
from odedit.risks import mmd
from tests.support import primal_dual

TEMPLATE = find_template("mmedit")


class Reference:
    """ODEdit on a BLIP-2 with WISE or T-Patcher, `objective.name: odedit` with the RBF kernel and regions.

    Args:
        backbone: Backbone whose `transformers` model runs unchanged, with hooks.
        editor: Editor whose phi_0 and settings are read; T-Patcher needs `own_weight` 0.
    """

    def __init__(self, backbone: Any, editor: Any, objective: Objective) -> None:
        self._backbone, self._editor, self._objective = backbone, editor, objective
        self._model = backbone.model

    def edit(self, request: EditRequest, steps: int) -> tuple[EditParams, list[Terms]]:
        """phi_e after `steps` steps, and the terms before every step and at phi_e."""
        config = self._objective.config
        supervision, _ = encode_requests(self._backbone, [request], TEMPLATE)
        params = {
            name: value.requires_grad_() for name, value in self._editor.init(self._backbone, supervision).items()
        }
        origin = {name: value.detach().clone() for name, value in params.items()}
        optimizer = PrimalDual(self._editor, config, steps)
        state = optimizer.init(params)
        curve = []
        probes = {EDIT: request.edit, **request.supervision}
        with torch.no_grad():
            unedited = {slot: self._answer(probe)[0] for slot, probe in probes.items() if slot in LOCALITY_SLOTS}
        for step in range(steps + 1):
            with self._edited(params):
                terms = self._terms(probes, unedited)
            curve.append(terms)
            params, state, _ = primal_dual.step(optimizer, params, origin, state, terms, torch.tensor([step < steps]))
        return params, curve

    def _terms(self, probes: dict[str, Probe], unedited: dict[str, Tensor]) -> Terms:
        w = torch.ones((), requires_grad=True)
        answers = {slot: self._answer(probe, w) for slot, probe in probes.items()}
        logits, states, targets = answers[EDIT]
        rel = functional.cross_entropy(logits, targets)
        loc = torch.stack(
            [
                functional.kl_div(
                    unedited[slot].log_softmax(-1), answers[slot][0].log_softmax(-1), reduction="none", log_target=True
                ).sum(-1).mean()
                for slot in unedited
            ]
        ).mean()  # fmt: skip
        gen = torch.stack([self._mmd(states, answers[slot][1]) for slot in REPHRASE_SLOTS]).mean()
        risks = {"rel": rel, "loc": loc, "gen": gen}
        slopes = {name: torch.autograd.grad(risk, w, create_graph=True)[0][None] for name, risk in risks.items()}
        nll_T = functional.cross_entropy(logits, targets, reduction="none")
        values = {name: risk[None] for name, risk in risks.items()} | {"own": torch.zeros(1)}
        return Terms(
            risks=values,
            total=(rel + loc + gen)[None],
            scale_gradients=slopes,
            penalty=tv_penalty(list(slopes.values())),
            worst_nll=nll_T.amax()[None],
            worst_trained_nll=nll_T.amax()[None],
            all_right=(logits.argmax(-1) == targets).all()[None],
        )

    def _mmd(self, x_TD: Tensor, y_SD: Tensor) -> Tensor:
        sigma2_Q = mmd.bandwidths(self._objective.config.sigma2_0 or 1.0, self._objective.config.bandwidths)

        def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
            distance = (a[:, None] - b[None]).square().sum(-1)
            return sum((-distance / (2 * s)).exp().mean() for s in sigma2_Q)  # type: ignore[return-value]

        return mean_kernel(x_TD, x_TD) + mean_kernel(y_SD, y_SD) - 2 * mean_kernel(x_TD, y_SD)

    def _answer(self, probe: Probe, w: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and states at the positions that predict the target `(T, ...)`, and the target."""
        cell = self._backbone.sequence(probe, TEMPLATE)
        logits, states = self._forward(cell.tokens, probe, w)
        at = slice(cell.first_target - 1, len(cell.tokens) - 1)
        return logits[at], states[at], torch.tensor(cell.tokens[cell.first_target :])

    def _forward(self, tokens: list[int], probe: Probe, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Forward of transformers with its image tower: logits `(S, V)` and states `(S, D)`, which w scales."""
        seen = {}

        def scale(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            seen["states"] = args[0] if w is None else args[0] * w
            return (seen["states"],)

        text = self._model.language_model
        handle = text.lm_head.register_forward_pre_hook(scale)
        try:
            ids = torch.tensor([tokens])
            if probe.picture is None:
                logits = text(input_ids=ids).logits
            else:
                pixels = torch.from_numpy(self._backbone.processor.process(probe.picture).pixels)[None]
                logits = self._model(pixel_values=pixels, input_ids=ids).logits
        finally:
            handle.remove()
        return logits[0].float(), seen["states"][0]

    @contextmanager
    def _edited(self, params: EditParams, side: bool = True) -> Iterator[None]:
        """Context with phi_e in the model: WISE's side matrix, or T-Patcher's neurons in the last layer."""
        if not side:
            yield
            return
        site = self._backbone.site(self._editor.sites[0])
        if "side_live" in params:
            side = self._side(params)
            hook = lambda module, args, out: out + functional.linear(args[0], side)  # noqa: E731
            handles = [site.register_forward_hook(hook)]
        else:
            inputs: list[Tensor] = []

            def patch(module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
                active = (inputs.pop() @ params["k"][0].T + params["b"][0]).relu()
                return out + active @ (params["a"][0] * params["v"][0])

            entrance = self._backbone.site(self._editor.sites[0].removesuffix("out") + "in")
            handles = [
                entrance.register_forward_hook(lambda module, args, out: inputs.append(args[0])),
                site.register_forward_hook(patch),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _side(self, params: EditParams) -> Tensor:
        """WISE's `W' - W`, `(out, in)`: the trained entries at the mask's positions."""
        shape = self._backbone.site(self._editor.sites[0]).weight.shape
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < self._editor.config.mask_ratio
        return torch.zeros(shape).masked_scatter(mask, params["side_live"][0])

    @torch.no_grad()
    def score(self, request: EditRequest, params: EditParams) -> dict[str, float]:
        """Teacher-forced, generated and published scores of every probe, named as in `odedit.evaluation.scores`."""
        threshold = (
            self._distance(request.edit, params) * self._editor.config.routing_ratio if "side_live" in params else 0
        )
        row: dict[str, float] = {}
        for name, probe in {"rel": request.edit, **request.probes}.items():
            is_edited = "side_live" not in params or self._distance(probe, params) >= threshold
            cell = self._backbone.sequence(probe, TEMPLATE)
            # A token of white space alone is generated and not counted.
            first = self._first_counted(cell)
            at, target = slice(first - 1, len(cell.tokens) - 1), torch.tensor(cell.tokens[first:])
            before, _ = self._forward(cell.tokens, probe)
            with self._edited(params, is_edited):
                after, _ = self._forward(cell.tokens, probe)
                said = self._generated(probe)
            said_before = self._generated(probe)
            if is_locality(name):
                row[name] = share(before[at].argmax(-1) == after[at].argmax(-1))
                ten = before.topk(10).indices == after.topk(10).indices
                row[f"{name}_mmedit"] = share(ten if name.startswith("m_") else ten[:, 0])
                row[f"{name}_generated"] = share(torch.tensor(said_before) == torch.tensor(said))
            else:
                row[name], row[f"{name}_before"] = (
                    share(after[at].argmax(-1) == target),
                    share(before[at].argmax(-1) == target),
                )
                row[f"{name}_generated"] = share(torch.tensor(said) == target)
        return row

    def _generated(self, probe: Probe) -> list[int]:
        """Generated tokens, as many as the target has; -1 behind the end of the answer."""
        cell = self._backbone.sequence(probe, TEMPLATE)
        tokens, said = cell.tokens[: cell.first_target], []
        while len(tokens) < len(cell.tokens):
            tokens = [*tokens, int(self._forward(tokens, probe)[0][-1].argmax())]
            if tokens[-1] in self._backbone.ends:
                break
            said.append(tokens[-1])
        said += [-1] * (len(cell.tokens) - cell.first_target - len(said))
        return said[self._first_counted(cell) - cell.first_target :]

    def _first_counted(self, cell: TokenSequence) -> int:
        decode = self._backbone.processor.tokenizer.decode
        return next(at for at in range(cell.first_target, len(cell.tokens)) if decode([cell.tokens[at]]).strip())

    def _distance(self, probe: Probe, params: EditParams) -> float:
        """WISE's routing activation (its eq. 2), averaged over the prompt."""
        site, activation = self._backbone.site(self._editor.sites[0]), self._backbone.activation(self._editor.sites[0])
        seen = {}
        handle = site.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
        cell = self._backbone.sequence(probe, TEMPLATE)
        try:
            self._forward(cell.tokens, probe)
        finally:
            handle.remove()
        x, y = (value.reshape(-1, value.shape[-1])[: cell.first_target] for value in (seen["x"], seen["y"]))
        side = y + functional.linear(x, self._side(params))
        return float(torch.linalg.vector_norm(activation(side) - activation(y), dim=-1).mean())


def share(right: Tensor) -> float:
    return float(right.double().mean())
