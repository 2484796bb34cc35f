"""UniKE: key-value memories inside and outside the last layers, told apart by a semantic and a truthfulness space.

Intrinsic memory: n extra neurons in the feed-forward half of each edited layer,

    FFN(q) + relu(q K^T + b) (V + beta zeta'),                                                    (eq. 3 and 6)

External memory: hidden states M of a demonstration (the question with its new answer), taken once from the unedited
model behind the attention of each edited layer. Every position attends over them and is turned towards what it finds,

    a = softmax(h M^T / sqrt(D)) M,      h <- |h| unit( (1 - alpha) unit(h) + alpha unit(a) ),    (eq. 2 and 7)
    alpha = relu( cos( E_sem(a), E_sem(h) ) ).

The encoders E_sem and E_tru are trained once, before any edit (`odedit train unike`). The truthfulness direction is
`zeta = mean( E_tru(h+) - E_tru(h-) )`, with h+ and h- the states behind the new and the old answer, and
`zeta' = W_zeta zeta`.

References:
    Towards Unified Multimodal Editing with Enhanced Knowledge Collaboration (NeurIPS 2024, arXiv 2409.19872).

Differs from the paper:
    - The external memory holds the demonstration of the edit itself. The paper retrieves from 15 000 demonstrations of
      other facts, which says nothing of what this edit is to change.
    - Queries are the outputs of attention, the space that the memory is in; the norm of a state is kept, as the
      authors' code keeps it. Eq. 7 weighs the memory with 1 - Sim, against the text below it; the text is followed.
    - alpha is computed at every position from that position alone, not from the last of the sequence: it cannot
      depend on an answer that is in the input when it is scored, and is not yet when it is generated.
    - E_sem learns from the same cosine that alpha is: of what a position finds in a record's memory with the position
      itself. Positions of the record's edit, its rephrases and its old answer are positive; those of other records
      and of its own unrelated questions are negative.
    - W_zeta is learned with the encoders, as the linear map from differences of codes to differences of states. Learned
      per edit it could do nothing that the values V beside it cannot. V + beta zeta' is stored as one tensor that
      starts at beta zeta', which plain gradient descent cannot tell from V that starts at 0.
    - Not published, and chosen here: how keys start, beta, the number of steps and the stop rule. The paper states no
      loss beside the likelihood, so there are no own terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from odedit.backbones.base import Backbone, Prefix
from odedit.backbones.common.generation import greedy
from odedit.editors.base import OptimizerSettings, Plain, Trace, TrainingSettings, prefix_of_edit
from odedit.editors.common.contrastive import encode, encoder_weights, info_nce, two_camps
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.editors.common.memories import attend, blend, last_positions, neurons, starting_keys, take
from odedit.editors.common.weights import check_tensors, load_weights
from odedit.errors import InputError
from odedit.inputs.batch import EDIT, REPHRASE, REPHRASE_SLOTS, EditBatch, EditParams
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KeyValues
from odedit.settings import Settings

KEYS, BIAS, VALUES, MEMORY = "keys", "bias", "values", "memory"
SEMANTIC, TRUTH, ZETA, BACK = "semantic", "truth", "zeta", "back"


@dataclass(frozen=True)
class UnikeConfig(Settings):
    """Settings of UniKE; defaults are the published ones where there are any.

    Attributes:
        num_layers: Edited layers, from the last upwards; 4 as published.
        neurons: Key-value pairs per edited layer; 10 as published (up to 20 in the authors' code).
        memory: Hidden states per layer that an edit stores and that a position attends over; 40 as published.
        beta: How far the values start along the truthfulness direction (eq. 6). Not published.
        sharpness: A neuron answers a state of cosine c to the edit's with relu(1 - sharpness (1 - c)), states having
            the same norm. Not published.
        noise: Standard deviation by which the neurons' first answers differ, so that they do not learn alike.
        learning_rate, clip_norm: Of plain SGD, 7e-4 and 1.1 in the authors' code.
        max_steps: Bound of the inner loop. Not published.
        stop_loss: Stops an edit whose tokens are all right when its objective has come below. Not published.
        checkpoint: File that `odedit train unike` wrote.
        encoder_width, code_width: Hidden and output size of the two encoders ("several MLP layers").
        temperature: tau of both contrastive losses.
        train_learning_rate: Of Adam; 1e-4 as published.
        train_batch, train_steps: Records of a training step, and the bound on the steps.
    """

    num_layers: Annotated[int, Ge(1)] = 4
    neurons: Annotated[int, Ge(1)] = 10
    memory: Annotated[int, Ge(1)] = 40
    beta: float = 0.1
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
    """Neurons and remembered states per edit and layer; the encoders are the same for all edits."""

    Config: ClassVar[type] = UnikeConfig
    starts_neutral = False
    positionwise = True
    trains_with_objective = False

    def __init__(self, config: UnikeConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self._weights = weights
        self._layers = tuple(f"layers.{-n}" for n in range(config.num_layers, 0, -1))
        self.sites = tuple(
            f"{layer}.{part}" for layer in self._layers for part in ("attention.out", "ffn.in", "ffn.out")
        )
        self.max_steps = config.max_steps
        self.frozen = frozenset(f"{layer}.{MEMORY}" for layer in self._layers)
        self.optimizer = OptimizerSettings("sgd", config.learning_rate, clip_norm=config.clip_norm)
        self.training = TrainingSettings(
            learning_rate=config.train_learning_rate,
            batch_size=config.train_batch,
            accumulate=1,
            clip_norm=None,
            max_steps=config.train_steps,
            validate_every=100,
            patience=5,
            # zeta and W_zeta are plain averages and have far to go; the encoders do not see them.
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
            with torch.device("meta"):  # shapes alone
                expected = self._drawn(backbone, 0)
            check_tensors(self.config.checkpoint, self._loaded(backbone, "cpu"), expected)

    def fitted(self, num_layers: int) -> Mapping[str, Any]:
        return {"num_layers": num_layers} if self.config.num_layers > num_layers else {}

    # phi_e

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        demonstration = batch.select((EDIT,))
        last_EM, is_there_EM = last_positions(demonstration.real_EKS[:, 0], self.config.memory)
        with torch.no_grad():
            prefix = prefix_of_edit(backbone, self.sites, batch, prefix)
            states = self._states(backbone, demonstration, prefix)
            params: EditParams = {
                f"{layer}.{MEMORY}": take(states[layer][:, 0], last_EM) * is_there_EM.unsqueeze(-1)
                for layer in self._layers
            }
            # Keys are what enters the neurons once the external memory acts.
            with self._acting(backbone, params) as seen:
                backbone.suffix(prefix)
        weights = self._learned(backbone)
        for layer in self._layers:
            entering = seen[f"{layer}.ffn.in"].float()
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
        with self._acting(backbone, params) as seen:
            yield Trace(seen)

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """All neurons side by side; a position attends over the `memory` nearest states of all edits (eq. 2)."""
        concatenated = {name: value.flatten(0, 1).unsqueeze(0) for name, value in params.items()}
        with self._acting(backbone, concatenated) as seen:
            yield Trace(seen)

    @contextmanager
    def _acting(self, backbone: Backbone, params: EditParams) -> Iterator[dict[str, Tensor]]:
        """Inside, the sequences of group g see the memories of row g. Yields what forwards show, by name."""
        weights = self._learned(backbone)
        seen: dict[str, Tensor] = {}
        rewrites: dict[torch.nn.Module, Rewrite] = {}
        for layer in self._layers:
            memory_GMD, semantic = params[f"{layer}.{MEMORY}"], _part(weights, f"{layer}.{SEMANTIC}")
            rewrites[backbone.site(f"{layer}.attention.out")] = self._external(layer, memory_GMD, semantic, seen)
            rewrites[backbone.site(f"{layer}.ffn.in")] = _noting(f"{layer}.ffn.in", seen)
            if f"{layer}.{KEYS}" in params:
                rewrites[backbone.site(f"{layer}.ffn.out")] = _intrinsic(layer, params, seen)
        with rewritten(rewrites):
            yield seen

    def _external(
        self, layer: str, memory_GMD: Tensor, semantic: Mapping[str, Tensor], seen: dict[str, Tensor]
    ) -> Rewrite:
        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            y_GND = y.reshape(memory_GMD.shape[0], -1, y.shape[-1]).float()
            found_GND = attend(y_GND, memory_GMD, self.config.memory)
            alpha_GN = (encode(semantic, found_GND) * encode(semantic, y_GND)).sum(dim=-1).relu()
            # An edit without memory leaves every state as it is.
            alpha_GN = alpha_GN * (memory_GMD != 0).any(dim=-1).any(dim=-1, keepdim=True)
            seen[f"{layer}.alpha"] = alpha_GN
            return blend(y_GND, found_GND, alpha_GN).reshape(y.shape).to(y.dtype)

        return rewrite

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        return token_right_E & (loss_E < self.config.stop_loss)

    # The weights of the encoders

    def initial_weights(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        device = backbone.site(self.sites[0]).weight.device
        return {name: value.to(device) for name, value in self._drawn(backbone, seed).items()}

    def _drawn(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        width, hidden, code = backbone.hidden_size, self.config.encoder_width, self.config.code_width
        weights: dict[str, Tensor] = {}
        for layer in self._layers:
            for encoder in (SEMANTIC, TRUTH):
                made = encoder_weights(width, hidden, code, generator)
                weights |= {f"{layer}.{encoder}.{name}": value for name, value in made.items()}
            weights[f"{layer}.{ZETA}"] = torch.zeros(code)
            weights[f"{layer}.{BACK}"] = torch.zeros(width, code)
        return weights

    def with_weights(self, weights: Mapping[str, Tensor]) -> Unike:
        return Unike(self.config, weights)

    def _learned(self, backbone: Backbone) -> Mapping[str, Tensor]:
        if self._weights is not None:
            return self._weights
        return self._loaded(backbone, str(backbone.site(self.sites[0]).weight.device))

    def _loaded(self, backbone: Backbone, device: str) -> dict[str, Tensor]:
        return load_weights(self.config.checkpoint, "unike", self.weight_settings, backbone.fingerprint, device)

    def native_training_loss(self, backbone: Backbone, batch: EditBatch) -> Tensor:
        """Eq. 4 and 5 at every edited layer, and two squared errors that zeta and W_zeta follow the codes by.

        The old answer is what the unedited model generates. zeta is pulled to the batch's mean difference of codes and
        W_zeta to the map from these differences to those of the states; neither moves the encoders.
        """
        weights = self._learned(backbone)
        with torch.no_grad():
            old = self._with_old_answer(backbone, batch.select((EDIT,)))
            states, old_states = self._states(backbone, batch), self._states(backbone, old)
        loss_E = torch.zeros(batch.num_edits, device=batch.tokens_EKS.device)
        for layer in self._layers:
            here, there = states[layer], old_states[layer]
            loss_E = loss_E + self._semantic_loss(_part(weights, f"{layer}.{SEMANTIC}"), here, there, batch, old)
            loss_E = loss_E + self._truth_loss(layer, weights, here[:, batch.slots.index(EDIT)], there[:, 0], old)
        return loss_E / len(self._layers)

    def _semantic_loss(
        self, semantic: Mapping[str, Tensor], here: Tensor, there: Tensor, batch: EditBatch, old: EditBatch
    ) -> Tensor:
        """Eq. 5: the memory of record e against every state that predicts an answer token in the batch."""
        own = batch.slots.index(EDIT)
        last_EM, is_there_EM = last_positions(batch.real_EKS[:, own], self.config.memory)
        memory_EMD = take(here[:, own], last_EM) * is_there_EM.unsqueeze(-1)
        query_EKTD = torch.cat(
            [gather_positions(here, batch.predict_EKT), gather_positions(there, old.predict_EKT)], dim=1
        )
        valid_EKT = torch.cat([batch.target_mask_EKT, old.target_mask_EKT], dim=1)
        of_edit_K = torch.tensor([slot in (EDIT, *REPHRASE_SLOTS, REPHRASE) for slot in (*batch.slots, EDIT)])
        record_E1 = torch.arange(batch.num_edits, device=valid_EKT.device).unsqueeze(1)
        record_N = record_E1.unsqueeze(1).expand_as(valid_EKT)[valid_EKT]
        is_edit_N = of_edit_K.to(valid_EKT.device)[None, :, None].expand_as(valid_EKT)[valid_EKT]
        positive_EN = (record_N == record_E1) & is_edit_N
        query_ND = query_EKTD[valid_EKT]
        found_END = attend(query_ND.expand(batch.num_edits, -1, -1), memory_EMD, self.config.memory)
        scores_EN = (encode(semantic, found_END) * encode(semantic, query_ND)).sum(dim=-1)
        return info_nce(scores_EN, positive_EN, ~positive_EN, self.config.temperature)

    def _truth_loss(
        self, layer: str, weights: Mapping[str, Tensor], new_ESD: Tensor, old_ESD: Tensor, old: EditBatch
    ) -> Tensor:
        """Eq. 4 at the last token of new and old answer, and what zeta and W_zeta learn."""
        mask_ET, predict_ET = old.target_mask_EKT[:, 0], old.predict_EKT[:, 0]
        last_E1 = predict_ET.masked_fill(~mask_ET, 0).amax(dim=1, keepdim=True) + 1
        true_ED, false_ED = take(new_ESD, last_E1)[:, 0], take(old_ESD, last_E1)[:, 0]
        encoder = _part(weights, f"{layer}.{TRUTH}")
        true_EP, false_EP = encode(encoder, true_ED), encode(encoder, false_ED)
        codes_EP, states_ED = (true_EP - false_EP).detach(), true_ED - false_ED
        missed_E = (weights[f"{layer}.{ZETA}"] - codes_EP).square().sum(dim=-1)
        unmapped_E = (F.linear(codes_EP, weights[f"{layer}.{BACK}"]) - states_ED).square().sum(dim=-1)
        size = states_ED.square().sum(dim=-1).mean().clamp(min=1e-6)
        return two_camps(true_EP, false_EP, self.config.temperature) + missed_E + unmapped_E / size

    def _with_old_answer(self, backbone: Backbone, edit: EditBatch) -> EditBatch:
        """The same prompts, continued by what the unedited model generates."""
        memory = KeyValues()
        prefix = backbone.prefix(edit, *self.sites, positionwise=True, memory=memory)
        first_choice_EKT = backbone.head(backbone.suffix(prefix, edit.predict_EKT, memory)).argmax(dim=-1)
        answer_EKT = greedy(backbone, edit, prefix, memory, first_choice_EKT)
        # Position 0 is never a target's; it takes what the mask leaves out and is then restored.
        tokens_EKS = edit.tokens_EKS.scatter(2, (edit.predict_EKT + 1) * edit.target_mask_EKT, answer_EKT)
        tokens_EKS[..., 0] = edit.tokens_EKS[..., 0]
        return replace(edit, tokens_EKS=tokens_EKS, target_EKT=answer_EKT)

    def _states(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> dict[str, Tensor]:
        """Outputs of attention in the edited layers of the unedited model, `(E, K, S, D)` float32."""
        seen: dict[str, Tensor] = {}
        prefix = prefix or backbone.prefix(batch, *self.sites)
        with rewritten({backbone.site(f"{layer}.attention.out"): _noting(layer, seen, 1) for layer in self._layers}):
            backbone.suffix(prefix)
        return {layer: y.reshape(*batch.tokens_EKS.shape, -1).float() for layer, y in seen.items()}


def _noting(name: str, seen: dict[str, Tensor], which: int = 0) -> Rewrite:
    """Keeps a module's input (0) or output (1) under `name`, and leaves the output as it is."""

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        seen[name] = (x, y)[which]
        return y

    return rewrite


def _intrinsic(layer: str, params: EditParams, seen: Mapping[str, Tensor]) -> Rewrite:
    """Adds the neurons' answer to what entered the feed-forward half."""
    keys_GHD, bias_GH, values_GHD = (params[f"{layer}.{part}"] for part in (KEYS, BIAS, VALUES))

    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        entering_GND = seen[f"{layer}.ffn.in"].reshape(keys_GHD.shape[0], -1, keys_GHD.shape[-1]).float()
        return y + neurons(entering_GND, keys_GHD, bias_GH, values_GHD).reshape(y.shape).to(y.dtype)

    return rewrite


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


EDITOR = Unike
