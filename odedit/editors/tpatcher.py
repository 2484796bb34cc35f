"""T-Patcher: a few new neurons beside the feed-forward network of one layer, one for each token to be corrected.

    FFN_p(h) = FFN(h) + sum_n relu(k_n h + b_n) (a_n * v_n)

The neurons stand beside the network rather than inside it, so that a gated network (LLaMA) is patched as a plain one
(OPT) is. Its input does not depend on them, hence neither do the states that they must answer or ignore.

References:
    Transformer-Patcher: One Mistake Worth One Neuron (ICLR 2023, arXiv 2301.09785): patch, activation loss l_a, memory
    losses l_m1 and l_m2, and several neurons for an answer of several tokens (appendix A).

Differs from the paper: the learning rate stays what it is instead of falling on a plateau; memory states are those of
whole unedited prompts, image positions included; an exponential above e^30 goes on as its tangent.
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

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import OptimizerSettings, Plain, Trace, prefix_of_edit
from odedit.editors.common.hooks import rewritten
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, EditBatch, EditParams, is_locality
from odedit.runtime.gather import gather_positions
from odedit.settings import Settings

KEYS, BIASES, VALUES, SCALES = "k", "b", "v", "a"
STATES = "states"
_ACTIVATION = "activation_EN"
_INPUT = "input_EKSD"
_EXPONENT_LIMIT = 30.0
# Largest number of memory activations that are held at a time.
_CHUNK = 1 << 25


@dataclass(frozen=True)
class TPatcherConfig(Settings):
    """Settings of T-Patcher; the defaults are the published ones.

    Attributes:
        layer: Whose feed-forward network is patched; negative: from the end.
        max_neurons: Most neurons of one edit; wrong tokens beyond get none.
        value_scale: Start of every entry of a, which multiplies v.
        learning_rate: Of Adam.
        weight_decay: As in L2.
        clip_norm: Largest gradient norm; None for no clipping.
        max_steps: Bound of the inner loop.
        label_smoothing: Share of a uniform draw from the vocabulary in the likelihood.
        activation_weight: Of l_a, which keeps a neuron active at its own token.
        memory_weight: Of l_m = l_m1 + l_m2, which keeps it silent elsewhere; 5 for fact checking, 10 for question
            answering in the paper's code.
        activation_top, memory_top: How many of the largest terms l_a and l_m average.
        margin_silent: How far below 0 a neuron's input stays at memory states (l_m1).
        margin_gap: How far it stays below the input at its own token (l_m2).
        memory_states: Most states taken from unedited prompts.
        stop_activation: Stops when all target tokens are right and l_a is below this.
        seed: Of the start of v and of the choice of memory states.
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
    """phi_e: `k`, `v`, `a` `(E, N, D)`, `b` `(E, N)`, and `states` `(E, N, D)`: what enters the network where a
    neuron's token is predicted. A neuron whose state is zero does not exist; all of it is zero and stays so.

    Edits one after another: `following` gives an editor whose model already has the earlier neurons. They are constants
    there: only the new ones are in phi_e, and edit files hold each edit's own. `together` with all of them is the model
    after the last edit.
    """

    Config: ClassVar[type] = TPatcherConfig
    frozen: frozenset[str] = frozenset({STATES})
    # The published start: v is drawn at random and its neuron is active.
    starts_neutral = False

    def __init__(self, config: TPatcherConfig) -> None:
        self.config = config
        self.sites = (f"layers.{config.layer}.ffn.in", f"layers.{config.layer}.ffn.out")
        # Unless `measured`, the memory is the record's own locality prompts.
        self.own_slots: tuple[str, ...] = (EDIT, *LOCALITY_SLOTS)
        self.max_steps = config.max_steps
        self.label_smoothing = config.label_smoothing
        self.optimizer = OptimizerSettings("adam", config.learning_rate, config.weight_decay, config.clip_norm)
        self._memory_MD: Tensor | None = None
        self._earlier: EditParams | None = None

    def check(self, backbone: Backbone) -> None:
        for site in self.sites:
            backbone.site(site)

    @torch.no_grad()
    def measured(self, backbone: Backbone, batch: EditBatch) -> TPatcher:
        """A copy whose l_m reads states of the batch's sequences, at most `memory_states`, drawn with `seed`."""
        states = []
        for slot in batch.slots:  # All at once need not fit.
            part = batch.select((slot,))
            _, input_EKSD = self._run(backbone, part)
            states.append(input_EKSD[part.real_EKS])
        memory_MD = torch.cat(states)
        chosen = torch.randperm(len(memory_MD), generator=torch.Generator().manual_seed(self.config.seed))
        kept = chosen[: self.config.memory_states].sort().values.to(memory_MD.device)
        other = copy.copy(self)
        other._memory_MD = memory_MD[kept].float()
        other.own_slots = (EDIT,)
        # Nothing but the record's own memory looks at other positions than those that are read.
        other.positionwise = True
        return other

    def following(self, params: EditParams) -> TPatcher:
        """A copy for the next edit: earlier edits' neurons act in every forward, and their states are memory.

        What an objective or a score calls the unedited model is still the one without any neuron.

        Args:
            params: As `finished` made them, of one or more edits; added to those that the editor follows already.
        """
        earlier = _joined({name: value.detach().clone() for name, value in params.items()})
        if self._earlier is not None:
            earlier = {name: torch.cat([self._earlier[name], value], dim=1) for name, value in earlier.items()}
        other = copy.copy(self)
        other._earlier = earlier
        return other

    @torch.no_grad()
    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        """A neuron for each wrong token, or for the least likely one: `k = h / |h|^2`, so that its input is 1."""
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
        """`activation_weight * l_a + memory_weight * (l_m1 + l_m2)`; no l_m for an edit without any memory state."""
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
        # The model has no gradient for a neuron that does not exist, but a learned multiplier of the penalty reads all
        # of phi_e.
        used_EN = _used(params[STATES])
        return {
            name: value * used_EN.reshape(*used_EN.shape, *[1] * (value.dim() - 2)) for name, value in params.items()
        }

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        own_EN = trace.values[_ACTIVATION].detach()
        return token_right_E & (self._activation_loss(own_EN, own_EN.isfinite()) < self.config.stop_activation)

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        """Without the neurons that no edit of the batch has."""
        longest = max(int(_used(params[STATES]).sum(dim=1).max()), 1)
        return {name: value[:, :longest] for name, value in params.items()}

    def _run(
        self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None, read_EKT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states with the earlier neurons only, and the states that enter the network: at all positions,
        or, where no other need run, at those that are read.
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
        """Adds the branch of every patch, of E edits or of one that all share; the trace gets the branch's input."""

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
        with rewritten({backbone.site(self.sites[0]): read, backbone.site(self.sites[1]): add}):
            yield

    def _activation_loss(self, own_EN: Tensor, used_EN: Tensor) -> Tensor:
        """l_a: mean of the largest `exp(-(k h + b))` at the neurons' own states."""
        terms_E = used_EN.sum(dim=1).clamp(max=self.config.activation_top)
        return _mean_exp((-own_EN).masked_fill(~used_EN, -torch.inf), self.config.activation_top, terms_E)

    def _memory_activation(self, params: EditParams, trace: Trace, batch: EditBatch) -> tuple[Tensor, Tensor]:
        """Each neuron's largest inputs over memory states, `(E, N, at most memory_top each)`, and how many states.

        Each neuron's largest are enough for the largest of all: a margin shifts all of a neuron's inputs alike.
        """
        top = self.config.memory_top
        count_E = torch.zeros(batch.num_edits, dtype=torch.long, device=params[KEYS].device)
        shared = [self._memory_MD] if self._memory_MD is not None else []
        if self._earlier is not None:
            shared.append(self._earlier[STATES].flatten(0, 1))
        largest = []
        if shared:
            memory_MD = torch.cat(shared)
            count_E += len(memory_MD)
            size = max(_CHUNK // (len(memory_MD) * params[KEYS].shape[1] + 1), 1)
            for keys, biases in zip(params[KEYS].split(size), params[BIASES].split(size), strict=True):
                largest.append(_largest(keys @ memory_MD.T + biases.unsqueeze(-1), top))
            largest = [torch.cat(largest)]
        if self._memory_MD is None:
            unrelated = batch.answers(tuple(slot for slot in batch.slots if is_locality(slot)))
            states_EMD = unrelated.of(trace.values[_INPUT]).flatten(1, 2).float()
            real_EM = unrelated.of(batch.real_EKS).flatten(1)
            count_E = count_E + real_EM.sum(dim=1)
            inputs_ENM = params[KEYS] @ states_EMD.transpose(1, 2) + params[BIASES].unsqueeze(-1)
            largest.append(_largest(inputs_ENM.masked_fill(~real_EM.unsqueeze(1), -torch.inf), top))
        return torch.cat(largest, dim=-1), count_E


def _branch(h_EPD: Tensor, patch: EditParams) -> Tensor:
    """What the neurons of a patch add, `(E, P, D)`."""
    activation_EPN = (h_EPD @ patch[KEYS].transpose(1, 2) + patch[BIASES].unsqueeze(1)).relu()
    return activation_EPN @ (patch[SCALES] * patch[VALUES])


def _used(states_END: Tensor) -> Tensor:
    """Which neurons exist, `(E, N)`."""
    return states_END.ne(0).any(dim=-1)


def _own_activation(params: EditParams) -> Tensor:
    """A neuron's input at its own state, `(E, N)`; infinite for one that does not exist."""
    input_EN = (params[KEYS] * params[STATES]).sum(dim=-1) + params[BIASES]
    return input_EN.masked_fill(~_used(params[STATES]), torch.inf)


def _joined(params: EditParams) -> EditParams:
    """The neurons of all edits as those of one, without those that do not exist."""
    used_EN = _used(params[STATES])
    return {name: value[used_EN].unsqueeze(0) for name, value in params.items()}


def _to_correct(logits_ETV: Tensor, target_ET: Tensor, mask_ET: Tensor) -> Tensor:
    """`(E, T)`: tokens that are not the model's choice; where all are, the least likely one."""
    wrong_ET = (logits_ETV.argmax(dim=-1) != target_ET) & mask_ET
    likely_ET = logits_ETV.log_softmax(dim=-1).gather(-1, target_ET.unsqueeze(-1)).squeeze(-1)
    least_E = likely_ET.masked_fill(~mask_ET, torch.inf).argmin(dim=-1, keepdim=True)
    only_least_ET = torch.zeros_like(wrong_ET).scatter(1, least_E, True) & mask_ET
    return torch.where(wrong_ET.any(dim=1, keepdim=True), wrong_ET, only_least_ET)


def _first(states_ETD: Tensor, wanted_ET: Tensor, count: int) -> Tensor:
    """The first `count` wanted states of every edit, in order, `(E, count, D)`; zeros behind them."""
    order_ET = (~wanted_ET).long().argsort(dim=1, stable=True)[:, :count]
    index = order_ET.unsqueeze(-1).expand(-1, -1, states_ETD.shape[-1])
    kept = states_ETD.gather(1, index) * wanted_ET.gather(1, order_ET).unsqueeze(-1)
    return torch.nn.functional.pad(kept, (0, 0, 0, count - kept.shape[1]))


def _normal(shape: Sequence[int], seed: int, edit_id: str) -> Tensor:
    """Drawn for this edit alone, on the CPU: whatever batch it is in, wherever it runs."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {edit_id}".encode()))
    return torch.randn(*shape, generator=generator)


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(min(count, values.shape[-1]), dim=-1).values


def _mean_exp(exponents_EM: Tensor, top: int, terms_E: Tensor) -> Tensor:
    """Mean of the `terms_E` largest exponentials, `(E,)`; -inf stands for an absent one, 0 for none at all.

    Beyond the limit the tangent goes on, so that the value stays finite and the gradient does not vanish.
    """
    largest = _largest(exponents_EM, top)
    exponential = largest.clamp(max=_EXPONENT_LIMIT).exp() * (1 + (largest - _EXPONENT_LIMIT).relu())
    return exponential.sum(dim=1) / terms_E.clamp(min=1)


EDITOR = TPatcher
