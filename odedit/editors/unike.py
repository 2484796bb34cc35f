"""UniKE: intrinsic knowledge (neurons) and external knowledge (stored states) in the last layers.

Intrinsic knowledge: n extra neurons in the feed-forward network of each edited layer,

    FFN(q) + relu(q K^T + b) (V + beta zeta'),                                                    (eq. 3 and 6)

External knowledge: hidden states M of a demonstration (the question with its new answer), taken once from the unedited
model at the output of attention in each edited layer. Every position attends over them and is turned towards the
result,

    a = softmax(h M^T / sqrt(D)) M,      h <- |h| unit( (1 - alpha) unit(h) + alpha unit(a) ),    (eq. 2 and 7)
    alpha = relu( cos( E_sem(a), E_sem(h) ) ).

The encoders E_sem (semantics) and E_tru (truthfulness) are trained once, before any edit (`odedit train unike`). The
truthfulness direction is `zeta = mean( E_tru(h+) - E_tru(h-) )`, with h+ and h- the states after the new and the old
answer, and `zeta' = W_zeta zeta`.

References:
    Towards Unified Multimodal Editing with Enhanced Knowledge Collaboration (NeurIPS 2024, arXiv 2409.19872).

Differs from the paper:
    - M holds the demonstration of the edit itself. The paper retrieves from 15 000 demonstrations of other facts,
      which do not show what this edit changes.
    - Queries are outputs of attention, the space of M. Eq. 7 weighs a with 1 - Sim, against the text below it; the text
      is followed.
    - alpha at a position depends on this position alone, not on the sequence's last position. So it does not depend on
      the answer, which is in the input when it is scored and not yet when it is generated.
    - E_sem is trained on the cosine that defines alpha, between a position and its attended state. Positives are
      positions of the record's edit, rephrases and old answer; negatives those of other records and of the record's
      unrelated questions.
    - W_zeta is trained with the encoders, as the linear map from differences of codes to differences of states.
      Trained per edit, it would be redundant beside V. V + beta zeta' is one tensor that starts at beta zeta', which
      for plain gradient descent is the same as V starting at 0.
    - Not in the paper, and our choice: initial keys, the number of steps and the stop rule. The paper has no loss
      beside the likelihood, so there are no own terms. beta is that of the public code.
Differs from the public code (github.com/beepkh/UniKE), which the paper takes precedence over:
    - The code does not keep a state's norm: it returns `(1 - alpha) unit(h) + alpha unit(a)` (`keep_norm: false`).
    - The code adds beta W zeta to the neurons' keys, with beta 0.1; here it is the start of their values. Its own shift
      of the values is overwritten before it is used.
    - The code takes 1 to 10 steps per edit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from odedit.backbones.base import Backbone, Prefix, holding
from odedit.backbones.common.generation import greedy
from odedit.editors.base import OptimizerSettings, Plain, Trace, TrainingSettings, prefix_of_edit
from odedit.editors.common.contrastive import encode, encoder_weights, info_nce, truthfulness_loss
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.editors.common.knowledge import attend, blend, last_positions, neurons, starting_keys, take
from odedit.editors.common.weights import check_tensors, load_weights
from odedit.errors import InputError
from odedit.inputs.batch import EDIT, REPHRASE, REPHRASE_SLOTS, EditBatch, EditParams, unnumbered
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache
from odedit.settings import Settings

KEYS, BIAS, VALUES, STATES = "keys", "bias", "values", "memory"
SEMANTIC, TRUTH, ZETA, BACK = "semantic", "truth", "zeta", "back"


@dataclass(frozen=True)
class UnikeConfig(Settings):
    """Settings of UniKE; defaults are the published values, or ours where none is published.

    Attributes:
        num_layers: Number of edited layers, counted from the last; 4 as published.
        neurons: Neurons per edited layer; 10 as published (up to 20 in the authors' code).
        memory: Stored states per edited layer, which a position attends over; 40 as published.
        beta: Initial length of the values along the truthfulness direction (eq. 6); 0.1 in the authors' code.
        keep_norm: Whether a state keeps its norm when it is turned (eq. 7). If not, as in the authors' code, every
            state has a norm of 1 or less, also where alpha is 0.
        sharpness: Slope s of a neuron's initial activation relu(1 - s (1 - c)) at a state of cosine c to the edit's
            and of the same norm. Our choice.
        noise: Standard deviation of the neurons' initial activations, so that they learn differently.
        learning_rate: Step size of plain SGD; 7e-4 in the authors' code.
        clip_norm: Largest gradient norm of an edit; 1.1 in the authors' code; null: no clipping.
        max_steps: Largest number of steps. Our choice.
        stop_loss: Objective below which an edit stops once all its tokens are right. Our choice.
        checkpoint: File of the encoders' weights, written by `odedit train unike`; required to edit.
        encoder_width: Hidden size of the two encoders ("several MLP layers").
        code_width: Output size of the two encoders.
        temperature: Temperature tau of both contrastive losses.
        train_learning_rate: Step size of Adam in training; 1e-4 as published.
        train_batch: Records per training step; the losses contrast at least 2.
        train_steps: Largest number of training steps.
    """

    num_layers: Annotated[int, Ge(1)] = 4
    neurons: Annotated[int, Ge(1)] = 10
    memory: Annotated[int, Ge(1)] = 40
    beta: float = 0.1
    keep_norm: bool = True
    sharpness: Annotated[float, Gt(0)] = 1.0
    noise: Annotated[float, Ge(0)] = 0.1
    learning_rate: Annotated[float, Gt(0)] = 7e-4
    clip_norm: Annotated[float, Gt(0)] | None = 1.1
    max_steps: Annotated[int, Ge(1)] = 100
    stop_loss: Annotated[float, Ge(0)] = 0.1
    checkpoint: str | None = None
    encoder_width: Annotated[int, Ge(1)] = 512
    code_width: Annotated[int, Ge(1)] = 128
    temperature: Annotated[float, Gt(0)] = 0.1
    train_learning_rate: Annotated[float, Gt(0)] = 1e-4
    train_batch: Annotated[int, Ge(2)] = 16
    train_steps: Annotated[int, Ge(1)] = 4000


class Unike(Plain):
    """Neurons and stored states per edit and layer; all edits share the encoders."""

    Config: ClassVar[type] = UnikeConfig
    starts_neutral = False
    positionwise = True
    trains_with_objective = False

    def __init__(self, config: UnikeConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self._weights = weights
        self._earlier: EditParams = {}
        self._layers = tuple(f"layers.{-n}" for n in range(config.num_layers, 0, -1))
        self.sites = tuple(f"{layer}.{part}" for layer in self._layers for part in ("attention.out", "ffn.out"))
        self.max_steps = config.max_steps
        self.frozen = frozenset(f"{layer}.{STATES}" for layer in self._layers)
        self.optimizer = OptimizerSettings("sgd", config.learning_rate, clip_norm=config.clip_norm)
        self.training = TrainingSettings(
            learning_rate=config.train_learning_rate,
            batch_size=config.train_batch,
            accumulate=1,
            clip_norm=None,
            max_steps=config.train_steps,
            validate_every=100,
            patience=5,
            # zeta and W_zeta are averages that start at 0, and give the encoders no gradient.
            rates={
                f"{layer}.{name}": 10 * config.train_learning_rate for layer in self._layers for name in (ZETA, BACK)
            },
        )
        names = ("num_layers", "memory", "encoder_width", "code_width", "temperature")
        self.weight_settings: dict[str, Any] = {name: getattr(config, name) for name in names}

    def check(self, backbone: Backbone) -> None:
        if self.config.num_layers > backbone.num_layers:
            raise InputError(
                f"editor.num_layers: got {self.config.num_layers}, the text model has {backbone.num_layers} layers."
            )
        for site in self.sites:
            backbone.site(site)
        if self._weights is None:
            with torch.device("meta"):  # shapes only
                expected = self._drawn(backbone, 0)
            check_tensors(self.config.checkpoint, self._loaded(backbone, "cpu"), expected)

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        return {"num_layers": backbone.num_layers} if self.config.num_layers > backbone.num_layers else {}

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        demonstration = batch.select((EDIT,))
        last_EM, is_present_EM = last_positions(demonstration.real_EKS[:, 0], self.config.memory)
        with torch.no_grad():
            prefix = prefix_of_edit(backbone, self.sites, batch, prefix)
            states = self._states(backbone, demonstration, prefix)
            params: EditParams = {
                f"{layer}.{STATES}": take(states[layer][:, 0], last_EM) * is_present_EM.unsqueeze(-1)
                for layer in self._layers
            }
            # Keys are made from inputs of the neurons that external knowledge has already changed.
            with self._acting(backbone, self._with_earlier(params)) as recorded:
                backbone.suffix(prefix)
        weights = self._learned(backbone)
        for layer in self._layers:
            entering = recorded[f"{layer}.ffn.in"].float()
            entering_EKSD = entering.reshape(batch.num_edits, 1, -1, entering.shape[-1])
            params[f"{layer}.{KEYS}"] = starting_keys(
                gather_positions(entering_EKSD, demonstration.predict_EKT)[:, 0],
                demonstration.target_mask_EKT[:, 0],
                self.config.neurons,
                self.config.sharpness,
                self.config.noise,
            )
            params[f"{layer}.{BIAS}"] = torch.full(
                (batch.num_edits, self.config.neurons), 1.0 - self.config.sharpness, device=last_EM.device
            )
            shift_D = weights[f"{layer}.{BACK}"] @ weights[f"{layer}.{ZETA}"]
            params[f"{layer}.{VALUES}"] = (self.config.beta * shift_D).repeat(batch.num_edits, self.config.neurons, 1)
        return params

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        with self._acting(backbone, self._with_earlier(params)) as recorded:
            yield Trace(recorded)

    def following(self, model: EditParams) -> Unike:
        """A copy for the next edit: earlier neurons and stored states act and do not move."""
        other = copy.copy(self)
        other._earlier = {name: value.detach() for name, value in model.items()}
        return other

    def start(self, backbone: Backbone) -> EditParams:
        return {}

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        """Earlier neurons and states and the edit's, side by side as those of one edit."""
        return self._with_earlier({name: value.flatten(0, 1).unsqueeze(0) for name, value in params.items()})

    def _with_earlier(self, params: EditParams) -> EditParams:
        """Every edit's parameters beside those of the earlier edits."""
        if not self._earlier:
            return params
        num_edits = len(next(iter(params.values())))
        earlier = {name: value.expand(num_edits, *value.shape[1:]) for name, value in self._earlier.items()}
        own = {name: torch.cat([earlier[name], value], dim=1) for name, value in params.items()}
        return {**earlier, **own}

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """All neurons side by side; a position attends over the `memory` nearest states of all edits (eq. 2)."""
        concatenated = {name: value.flatten(0, 1).unsqueeze(0) for name, value in params.items()}
        with self._acting(backbone, self._with_earlier(concatenated)) as recorded:
            yield Trace(recorded)

    @contextmanager
    def _acting(self, backbone: Backbone, params: EditParams) -> Iterator[dict[str, Tensor]]:
        """Applies row g of the parameters to the sequences of group g. Yields values that forwards record, by name."""
        weights = self._learned(backbone)
        recorded: dict[str, Tensor] = {}
        rewrites: dict[torch.nn.Module, Rewrite] = {}
        for layer in self._layers:
            stored_GMD, semantic = params[f"{layer}.{STATES}"], _part(weights, f"{layer}.{SEMANTIC}")
            rewrites[backbone.site(f"{layer}.attention.out")] = self._external(layer, stored_GMD, semantic, recorded)
            entrance = backbone.site(holding(backbone, f"{layer}.ffn.in"))
            rewrites[entrance] = _recording(f"{layer}.ffn.in", recorded)
            if f"{layer}.{KEYS}" in params:
                rewrites[backbone.site(f"{layer}.ffn.out")] = _intrinsic(layer, params, recorded)
        with rewritten(rewrites):
            yield recorded

    def _external(
        self, layer: str, stored_GMD: Tensor, semantic: Mapping[str, Tensor], recorded: dict[str, Tensor]
    ) -> Rewrite:
        """Turns states by alpha towards the stored states that they attend over."""

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            y_GND = y.reshape(stored_GMD.shape[0], -1, y.shape[-1]).float()
            attended_GND = attend(y_GND, stored_GMD, self.config.memory)
            alpha_GN = (encode(semantic, attended_GND) * encode(semantic, y_GND)).sum(dim=-1).relu()
            # An edit without stored states changes no state.
            is_stored_G1 = (stored_GMD != 0).any(dim=-1).any(dim=-1, keepdim=True)
            alpha_GN = alpha_GN * is_stored_G1
            recorded[f"{layer}.alpha"] = alpha_GN
            blended_GND = blend(y_GND, attended_GND, alpha_GN, keeps_norm=self.config.keep_norm)
            if not self.config.keep_norm:
                blended_GND = torch.where(is_stored_G1.unsqueeze(-1), blended_GND, y_GND)
            return blended_GND.reshape(y.shape).to(y.dtype)

        return rewrite

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        return token_right_E & (loss_E < self.config.stop_loss)

    def initial_weights(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        device = backbone.device
        return {name: value.to(device) for name, value in self._drawn(backbone, seed).items()}

    def _drawn(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        width, hidden, code = backbone.hidden_size, self.config.encoder_width, self.config.code_width
        weights: dict[str, Tensor] = {}
        for layer in self._layers:
            for encoder in (SEMANTIC, TRUTH):
                drawn = encoder_weights(width, hidden, code, generator)
                weights |= {f"{layer}.{encoder}.{name}": value for name, value in drawn.items()}
            weights[f"{layer}.{ZETA}"] = torch.zeros(code)
            weights[f"{layer}.{BACK}"] = torch.zeros(width, code)
        return weights

    def with_weights(self, weights: Mapping[str, Tensor]) -> Unike:
        return Unike(self.config, weights)

    def _learned(self, backbone: Backbone) -> Mapping[str, Tensor]:
        if self._weights is not None:
            return self._weights
        return self._loaded(backbone, str(backbone.device))

    def _loaded(self, backbone: Backbone, device: str) -> dict[str, Tensor]:
        return load_weights(self.config.checkpoint, "unike", self.weight_settings, backbone.fingerprint, device)

    def native_training_loss(self, backbone: Backbone, batch: EditBatch) -> Tensor:
        """Eq. 4 and 5 at every edited layer, and two squared errors that train zeta and W_zeta, `(E,)`.

        The old answer is the one that the unedited model generates. zeta is fitted to the mean difference of codes and
        W_zeta to the map from these to the differences of states; neither gives the encoders a gradient.
        """
        weights = self._learned(backbone)
        with torch.no_grad():
            old = self._with_old_answer(backbone, batch.select((EDIT,)))
            states, old_states = self._states(backbone, batch), self._states(backbone, old)
        loss_E = torch.zeros(batch.num_edits, device=batch.tokens_EKS.device)
        for layer in self._layers:
            new, previous = states[layer], old_states[layer]
            loss_E = loss_E + self._semantic_loss(_part(weights, f"{layer}.{SEMANTIC}"), new, previous, batch, old)
            loss_E = loss_E + self._truth_loss(layer, weights, new[:, batch.slots.index(EDIT)], previous[:, 0], old)
        return loss_E / len(self._layers)

    def _semantic_loss(
        self, semantic: Mapping[str, Tensor], new_EKSD: Tensor, old_EKSD: Tensor, batch: EditBatch, old: EditBatch
    ) -> Tensor:
        """Eq. 5: stored states of record e against every state of the batch that predicts an answer token."""
        own = batch.slots.index(EDIT)
        last_EM, is_present_EM = last_positions(batch.real_EKS[:, own], self.config.memory)
        stored_EMD = take(new_EKSD[:, own], last_EM) * is_present_EM.unsqueeze(-1)
        query_EKTD = torch.cat(
            [gather_positions(new_EKSD, batch.predict_EKT), gather_positions(old_EKSD, old.predict_EKT)], dim=1
        )
        valid_EKT = torch.cat([batch.target_mask_EKT, old.target_mask_EKT], dim=1)
        is_edit_K = torch.tensor(
            [unnumbered(slot) in (EDIT, *REPHRASE_SLOTS, REPHRASE) for slot in (*batch.slots, EDIT)]
        )
        record_E1 = torch.arange(batch.num_edits, device=valid_EKT.device).unsqueeze(1)
        record_N = record_E1.unsqueeze(1).expand_as(valid_EKT)[valid_EKT]
        is_edit_N = is_edit_K.to(valid_EKT.device)[None, :, None].expand_as(valid_EKT)[valid_EKT]
        own_EN = record_N == record_E1
        positive_EN = own_EN & is_edit_N
        # A batch that goes on in the next epoch may hold a record twice, which is no other record.
        same_EE = torch.tensor([[own_id == other_id for other_id in batch.edit_ids] for own_id in batch.edit_ids])
        negative_EN = ~same_EE.to(own_EN.device)[:, record_N] | (own_EN & ~is_edit_N)
        query_ND = query_EKTD[valid_EKT]
        attended_END = attend(query_ND.expand(batch.num_edits, -1, -1), stored_EMD, self.config.memory)
        scores_EN = (encode(semantic, attended_END) * encode(semantic, query_ND)).sum(dim=-1)
        return info_nce(scores_EN, positive_EN, negative_EN, self.config.temperature)

    def _truth_loss(
        self, layer: str, weights: Mapping[str, Tensor], new_ESD: Tensor, old_ESD: Tensor, old: EditBatch
    ) -> Tensor:
        """Eq. 4 at the last token of new and old answer, and the squared errors of zeta and W_zeta, `(E,)`."""
        mask_ET, predict_ET = old.target_mask_EKT[:, 0], old.predict_EKT[:, 0]
        last_E1 = predict_ET.masked_fill(~mask_ET, 0).amax(dim=1, keepdim=True) + 1
        true_ED, false_ED = take(new_ESD, last_E1)[:, 0], take(old_ESD, last_E1)[:, 0]
        encoder = _part(weights, f"{layer}.{TRUTH}")
        true_EP, false_EP = encode(encoder, true_ED), encode(encoder, false_ED)
        codes_EP, states_ED = (true_EP - false_EP).detach(), true_ED - false_ED
        zeta_error_E = (weights[f"{layer}.{ZETA}"] - codes_EP).square().sum(dim=-1)
        map_error_E = (F.linear(codes_EP, weights[f"{layer}.{BACK}"]) - states_ED).square().sum(dim=-1)
        size = states_ED.square().sum(dim=-1).mean().clamp(min=1e-6)
        return truthfulness_loss(true_EP, false_EP, self.config.temperature) + zeta_error_E + map_error_E / size

    def _with_old_answer(self, backbone: Backbone, edit: EditBatch) -> EditBatch:
        """The same prompts with the answers that the unedited model generates."""
        kv_cache = KVCache()
        prefix = backbone.prefix(edit, *self.sites, positionwise=True, kv_cache=kv_cache)
        first_choice_EKT = backbone.head(backbone.suffix(prefix, edit.predict_EKT, kv_cache)).argmax(dim=-1)
        answer_EKT = greedy(backbone, edit, prefix, kv_cache, first_choice_EKT)
        # Position 0 is never a target: padding is scattered there, and its token restored.
        tokens_EKS = edit.tokens_EKS.scatter(2, (edit.predict_EKT + 1) * edit.target_mask_EKT, answer_EKT)
        tokens_EKS[..., 0] = edit.tokens_EKS[..., 0]
        return replace(edit, tokens_EKS=tokens_EKS, target_EKT=answer_EKT)

    def _states(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> dict[str, Tensor]:
        """Outputs of attention in the edited layers of the unedited model, `(E, K, S, D)` float32."""
        recorded: dict[str, Tensor] = {}
        prefix = prefix or backbone.prefix(batch, *self.sites)
        rewrites: dict[torch.nn.Module, Rewrite] = {
            backbone.site(f"{layer}.attention.out"): _recording(layer, recorded, 1) for layer in self._layers
        }
        with rewritten(rewrites):
            backbone.suffix(prefix)
        return {layer: y.reshape(*batch.tokens_EKS.shape, -1).float() for layer, y in recorded.items()}


def _recording(name: str, recorded: dict[str, Tensor], which: int = 0) -> Rewrite:
    """Records a module's input (0) or output (1) under `name`; the output does not change."""

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        recorded[name] = (x, y)[which]
        return y

    return rewrite


def _intrinsic(layer: str, params: EditParams, recorded: Mapping[str, Tensor]) -> Rewrite:
    """Adds the output of the extra neurons to that of the feed-forward network."""
    keys_GHD, bias_GH, values_GHD = (params[f"{layer}.{part}"] for part in (KEYS, BIAS, VALUES))

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        entering_GND = recorded[f"{layer}.ffn.in"].reshape(keys_GHD.shape[0], -1, keys_GHD.shape[-1]).float()
        return y + neurons(entering_GND, keys_GHD, bias_GH, values_GHD).reshape(y.shape).to(y.dtype)

    return rewrite


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights whose names start with `name.`, without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


EDITOR = Unike
