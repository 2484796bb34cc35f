"""T-Patcher: new neurons beside the feed-forward network of one layer, one for each token to correct.

    FFN_p(h) = FFN(h) + sum_n relu(k_n h + b_n) (a_n * v_n)

The neurons are parallel to the network, so that a gated network (LLaMA) is patched like a plain network (OPT).
The network's input h does not depend on them.

References:
    Transformer-Patcher: One Mistake Worth One Neuron (ICLR 2023, arXiv 2301.09785): patch, activation loss l_a, memory
    losses l_m1 and l_m2, and several neurons for an answer of several tokens (appendix A).

Differs from the paper: the learning rate is constant instead of falling on a plateau; memory states are taken at all
positions of unedited prompts, image positions included; the exponential continues as its tangent above e^30.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, holding
from odedit.editors.base import EditSize, Neurons, OptimizerSettings, Plain, Trace, prefix_of_edit
from odedit.editors.common.hooks import rewritten
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, EditBatch, EditParams, is_locality
from odedit.runtime.gather import gather_positions
from odedit.settings import Settings

KEYS, BIASES, VALUES, SCALES = "k", "b", "v", "a"
STATES = "states"
_ACTIVATION = "activation_EN"
_INPUT = "input_EKSD"
_EXPONENT_LIMIT = 30.0
_CHUNK = 1 << 25
"""Largest number of activations at memory states computed at a time."""


@dataclass(frozen=True)
class TPatcherConfig(Settings):
    """Settings of T-Patcher; the defaults are the published ones.

    Attributes:
        layer: Layer whose feed-forward network is patched; negative: counted from the end.
        max_neurons: Largest number of neurons of one edit; further wrong tokens get none.
        value_scale: Initial value of every entry of a, which multiplies v.
        learning_rate: Step size of Adam.
        weight_decay: Weight decay as in L2.
        clip_norm: Largest gradient norm; null: no clipping.
        max_steps: Largest number of steps.
        label_smoothing: Share of the uniform distribution in the likelihood.
        activation_weight: Weight of l_a, which keeps a neuron active at its own token.
        memory_weight: Weight of l_m = l_m1 + l_m2, which keeps a neuron inactive elsewhere; in the paper's code 5 for
            fact checking and 10 for question answering.
        activation_top: Number of largest terms that l_a averages.
        memory_top: Number of largest terms that l_m1 and l_m2 average, each.
        margin_silent: Margin by which a neuron's input stays below 0 at memory states (l_m1).
        margin_gap: Margin by which it stays below the input at the neuron's own token (l_m2).
        memory_states: Largest number of memory states taken from unedited prompts.
        stop_activation: Value of l_a below which an edit stops once all target tokens are right.
        seed: Seed of the initial v and of the choice of memory states.
    """

    layer: int = -1
    max_neurons: Annotated[int, Ge(1)] = 5
    value_scale: Annotated[float, Gt(0)] = 10.0
    learning_rate: Annotated[float, Gt(0)] = 1e-2
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    clip_norm: Annotated[float, Gt(0)] | None = 5.0
    max_steps: Annotated[int, Ge(1)] = 2000
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    activation_weight: Annotated[float, Ge(0)] = 1.0
    memory_weight: Annotated[float, Ge(0)] = 5.0
    activation_top: Annotated[int, Ge(1)] = 5
    memory_top: Annotated[int, Ge(1)] = 1000
    margin_silent: Annotated[float, Ge(0)] = 3.0
    margin_gap: Annotated[float, Ge(0)] = 3.0
    memory_states: Annotated[int, Ge(1)] = 40000
    stop_activation: Annotated[float, Gt(0)] = 0.1
    seed: int = 0


class TPatcher(Plain):
    """phi_e: `k`, `v`, `a` `(E, N, D)`, `b` `(E, N)`, and `states` `(E, N, D)`, the network's input where a neuron's
    token is predicted. A neuron with state zero is padding: all its entries are zero and stay zero.

    Many edits in one model: `together` puts the neurons of edits side by side. To learn edits one after another,
    `following` returns an editor whose model has the earlier neurons as constants; phi_e holds only the new ones.
    """

    Config: ClassVar[type] = TPatcherConfig
    frozen: frozenset[str] = frozenset({STATES})
    # As published, v starts at random values and its neuron active.
    starts_neutral = False

    def __init__(self, config: TPatcherConfig) -> None:
        self.config = config
        self.sites = (f"layers.{config.layer}.ffn.out",)
        self._entrance = f"layers.{config.layer}.ffn.in"
        # Without `measured`, memory states are those of the record's own locality prompts.
        self.own_slots: tuple[str, ...] = (EDIT, *LOCALITY_SLOTS)
        self.max_steps = config.max_steps
        self.label_smoothing = config.label_smoothing
        self.optimizer = OptimizerSettings("adam", config.learning_rate, config.weight_decay, config.clip_norm)
        self._memory_states_MD: Tensor | None = None
        self._earlier: EditParams | None = None

    def check(self, backbone: Backbone) -> None:
        for site in (holding(backbone, self._entrance), *self.sites):
            backbone.site(site)

    @torch.no_grad()
    def measured(self, backbone: Backbone, batch: EditBatch) -> TPatcher:
        """A copy whose memory states are those of the batch's sequences, at most `memory_states`, drawn with `seed`."""
        states = []
        for slot in batch.slots:  # one slot at a time, to bound the peak memory
            part = batch.select((slot,))
            _, input_EKSD = self._run(backbone, part)
            states.append(input_EKSD[part.real_EKS])
        states_MD = torch.cat(states)
        order = torch.randperm(len(states_MD), generator=torch.Generator().manual_seed(self.config.seed))
        kept = order[: self.config.memory_states].sort().values.to(states_MD.device)
        other = copy.copy(self)
        other._memory_states_MD = states_MD[kept].float()
        other.own_slots = (EDIT,)
        # Only the memory states of a record's own prompts need positions that are not read.
        other.positionwise = True
        return other

    def following(self, model: EditParams) -> TPatcher:
        """A copy for the next edit: earlier neurons act and do not move, and their states are memory states."""
        other = copy.copy(self)
        other._earlier = _joined({name: value.detach().clone() for name, value in model.items()}) if model else None
        return other

    def start(self, backbone: Backbone) -> EditParams:
        return {}

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        """The earlier neurons and the edit's, side by side as those of one edit."""
        parts = self._with_earlier(_joined(params))
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in params}

    def neurons(self, backbone: Backbone, params: EditParams) -> Neurons:
        joined = {name: value[0] for name, value in _joined(params).items()}
        layer = backbone.layer_of(self.sites[0])
        return Neurons(layer, joined[KEYS], joined[BIASES], joined[SCALES] * joined[VALUES])

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        width = self.config.max_neurons * backbone.hidden_size
        return EditSize(3 * width + self.config.max_neurons, fixed=width)

    @torch.no_grad()
    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        """A neuron for each wrong token, or for the least likely token: `k = h / |h|^2`, so that its input is 1."""
        prefix = prefix_of_edit(backbone, self.sites, batch, prefix)
        batch = batch.select((EDIT,))
        target_ET, mask_ET = batch.target_EKT[:, 0], batch.target_mask_EKT[:, 0]
        hidden_EKTD, input_EKND = self._run(backbone, batch, prefix, batch.predict_EKT)
        logits_ETV = backbone.head(hidden_EKTD[:, 0])
        is_whole = input_EKND.shape[2] == batch.tokens_EKS.shape[2]
        states_ETD = (gather_positions(input_EKND, batch.predict_EKT) if is_whole else input_EKND)[:, 0].float()

        states_END = _first(states_ETD, _to_correct(logits_ETV, target_ET, mask_ET), self.config.max_neurons)
        used_EN1 = _used(states_END).unsqueeze(-1)
        norm2_EN1 = states_END.square().sum(dim=-1, keepdim=True)
        draws = [_normal(states_END.shape[1:], self.config.seed, edit_id) for edit_id in batch.edit_ids]
        return {
            KEYS: states_END / norm2_EN1.where(used_EN1, 1.0),
            BIASES: torch.zeros(states_END.shape[:2], device=states_END.device),
            VALUES: torch.stack(draws).to(states_END.device) * used_EN1,
            SCALES: torch.full_like(states_END, self.config.value_scale) * used_EN1,
            STATES: states_END,
        }

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        trace = Trace()
        trace.values[_ACTIVATION] = _own_activation(params)
        with self._patched(backbone, batch, self._with_earlier(params), trace):
            yield trace

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """The neurons of all edits, side by side."""
        trace = Trace()
        with self._patched(backbone, batch, self._with_earlier(_joined(params)), trace):
            yield trace

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        """`activation_weight * l_a + memory_weight * (l_m1 + l_m2)`, `(E,)`; l_m is 0 without memory states."""
        config = self.config
        own_EN = trace.values[_ACTIVATION]
        used_EN = _used(params[STATES])
        memory_ENM, count_E = self._memory_activation(params, trace, batch)
        memory_ENM = memory_ENM.masked_fill(~used_EN.unsqueeze(-1), -torch.inf)
        terms_E = (count_E * used_EN.sum(dim=1)).clamp(max=config.memory_top)
        silent_E = _mean_exp((memory_ENM + config.margin_silent).flatten(1), config.memory_top, terms_E)
        gap_ENM = memory_ENM - own_EN.unsqueeze(-1) + config.margin_gap
        gap_E = _mean_exp(gap_ENM.flatten(1), config.memory_top, terms_E)
        return config.activation_weight * self._activation_loss(own_EN, used_EN) + config.memory_weight * (
            silent_E + gap_E
        )

    def constrain(self, params: EditParams) -> EditParams:
        # The model gives padding no gradient, but a learned multiplier of the penalty, which reads all of phi_e, does.
        used_EN = _used(params[STATES])
        return {
            name: value * used_EN.reshape(*used_EN.shape, *[1] * (value.dim() - 2)) for name, value in params.items()
        }

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        own_EN = trace.values[_ACTIVATION].detach()
        return token_right_E & (self._activation_loss(own_EN, own_EN.isfinite()) < self.config.stop_activation)

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        """phi_e without padding that all edits of the batch share."""
        longest = max(int(_used(params[STATES]).sum(dim=1).max()), 1)
        return {name: value[:, :longest] for name, value in params.items()}

    def _run(
        self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None, read_EKT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states with the earlier neurons only, and the network's input, at all positions or, where the
        last layer allows it, at the positions that are read.
        """
        trace = Trace()
        with self._patched(backbone, batch, self._with_earlier(None), trace):
            hidden = backbone.suffix(prefix or backbone.prefix(batch, *self.sites), read_EKT)
        return hidden, trace.values[_INPUT]

    def _with_earlier(self, params: EditParams | None) -> list[EditParams]:
        return [patch for patch in (self._earlier, params) if patch is not None]

    @contextmanager
    def _patched(
        self, backbone: Backbone, batch: EditBatch, patches: Sequence[EditParams], trace: Trace
    ) -> Iterator[None]:
        """Adds the neurons of every patch, of E edits or shared by all, and records their input in the trace."""

        def read(x: Tensor, y: Tensor) -> Tensor:
            trace.values[_INPUT] = x.detach().reshape(*batch.present_EK.shape, -1, x.shape[-1])
            inputs.append(x)
            return y

        def add(x: Tensor, y: Tensor) -> Tensor:
            h = inputs.pop()
            h_EPD = h.reshape(batch.num_edits, -1, h.shape[-1]).float()
            for patch in patches:
                y = y + _branch(h_EPD, patch).to(y.dtype).reshape(y.shape)
            return y

        inputs: list[Tensor] = []
        entrance = backbone.site(holding(backbone, self._entrance))
        with rewritten({entrance: read, backbone.site(self.sites[0]): add}):
            yield

    def _activation_loss(self, own_EN: Tensor, used_EN: Tensor) -> Tensor:
        """l_a, `(E,)`: mean of the largest `exp(-(k h + b))` at the neurons' own states."""
        terms_E = used_EN.sum(dim=1).clamp(max=self.config.activation_top)
        return _mean_exp((-own_EN).masked_fill(~used_EN, -torch.inf), self.config.activation_top, terms_E)

    def _memory_activation(self, params: EditParams, trace: Trace, batch: EditBatch) -> tuple[Tensor, Tensor]:
        """Each neuron's largest inputs over memory states, `(E, N, M)`, and the number of memory states, `(E,)`.

        Each neuron's largest inputs determine the largest terms, since a margin shifts all inputs of a neuron alike.
        """
        top = self.config.memory_top
        count_E = torch.zeros(batch.num_edits, dtype=torch.long, device=params[KEYS].device)
        shared = [] if self._memory_states_MD is None else [self._memory_states_MD]
        if self._earlier is not None:
            shared.append(self._earlier[STATES].flatten(0, 1))
        largest = []
        if shared:
            shared_MD = torch.cat(shared)
            count_E += len(shared_MD)
            size = max(_CHUNK // (len(shared_MD) * params[KEYS].shape[1] + 1), 1)
            for keys, biases in zip(params[KEYS].split(size), params[BIASES].split(size), strict=True):
                largest.append(_largest(keys @ shared_MD.T + biases.unsqueeze(-1), top))
            largest = [torch.cat(largest)]
        if self._memory_states_MD is None:
            unrelated = batch.answers(tuple(slot for slot in batch.slots if is_locality(slot)))
            states_EMD = unrelated.of(trace.values[_INPUT]).flatten(1, 2).float()
            real_EM = unrelated.of(batch.real_EKS).flatten(1)
            count_E = count_E + real_EM.sum(dim=1)
            inputs_ENM = params[KEYS] @ states_EMD.transpose(1, 2) + params[BIASES].unsqueeze(-1)
            largest.append(_largest(inputs_ENM.masked_fill(~real_EM.unsqueeze(1), -torch.inf), top))
        return torch.cat(largest, dim=-1), count_E


def _branch(h_EPD: Tensor, patch: EditParams) -> Tensor:
    """Output of a patch's neurons, `(E, P, D)`."""
    activation_EPN = (h_EPD @ patch[KEYS].transpose(1, 2) + patch[BIASES].unsqueeze(1)).relu()
    return activation_EPN @ (patch[SCALES] * patch[VALUES])


def _used(states_END: Tensor) -> Tensor:
    """True for neurons, False for padding, `(E, N)`."""
    return states_END.ne(0).any(dim=-1)


def _own_activation(params: EditParams) -> Tensor:
    """Each neuron's input at its own state, `(E, N)`; infinite for padding."""
    input_EN = (params[KEYS] * params[STATES]).sum(dim=-1) + params[BIASES]
    return input_EN.masked_fill(~_used(params[STATES]), torch.inf)


def _joined(params: EditParams) -> EditParams:
    """The neurons of all edits as those of one edit, without padding."""
    used_EN = _used(params[STATES])
    return {name: value[used_EN].unsqueeze(0) for name, value in params.items()}


def _to_correct(logits_ETV: Tensor, target_ET: Tensor, mask_ET: Tensor) -> Tensor:
    """Tokens to correct, `(E, T)` bool: those that are not the model's first choice; without any, the least likely."""
    wrong_ET = (logits_ETV.argmax(dim=-1) != target_ET) & mask_ET
    likely_ET = logits_ETV.log_softmax(dim=-1).gather(-1, target_ET.unsqueeze(-1)).squeeze(-1)
    least_E = likely_ET.masked_fill(~mask_ET, torch.inf).argmin(dim=-1, keepdim=True)
    only_least_ET = torch.zeros_like(wrong_ET).scatter(1, least_E, True) & mask_ET
    return torch.where(wrong_ET.any(dim=1, keepdim=True), wrong_ET, only_least_ET)


def _first(states_ETD: Tensor, wanted_ET: Tensor, count: int) -> Tensor:
    """The first `count` wanted states of every edit, in order, padded with zeros to `(E, count, D)`."""
    order_ET = (~wanted_ET).long().argsort(dim=1, stable=True)[:, :count]
    index = order_ET.unsqueeze(-1).expand(-1, -1, states_ETD.shape[-1])
    kept = states_ETD.gather(1, index) * wanted_ET.gather(1, order_ET).unsqueeze(-1)
    return torch.nn.functional.pad(kept, (0, 0, 0, count - kept.shape[1]))


def _normal(shape: Sequence[int], seed: int, edit_id: str) -> Tensor:
    """Normal draw from seed and edit id; on the CPU, so that batch and device do not change it."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {edit_id}".encode()))
    return torch.randn(*shape, generator=generator)


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, values.shape[-1]), dim=-1).values


def _mean_exp(exponents_EM: Tensor, top: int, terms_E: Tensor) -> Tensor:
    """Mean of the `terms_E` largest exponentials, `(E,)`; exponents of -inf are absent, and without any the mean is 0.

    Above the limit an exponential continues as its tangent: finite, with a gradient.
    """
    largest = _largest(exponents_EM, top)
    exponential = largest.clamp(max=_EXPONENT_LIMIT).exp() * (1 + (largest - _EXPONENT_LIMIT).relu())
    return exponential.sum(dim=1) / terms_E.clamp(min=1)


EDITOR = TPatcher
