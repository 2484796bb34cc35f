"""MEND: a hypernetwork, trained before any edit, turns the gradient of one edit into the edit.

For one token, the gradient of a linear module's weight is the outer product of the module's input x and the gradient
delta of the edit's NLL with respect to its output. The hypernetwork maps (x, delta) to (x~, delta~), and the weights
move by `-rate * sum_t delta~_t x~_t^T`. An edit is stored as these factors: two vectors per token, no matrix.

References:
    "Fast Model Editing at Scale", arXiv 2110.11309, section 3: the network (eq. 3), its start as the identity, and the
    losses. Loss weights, step sizes and layers are those of the MMEdit benchmark (arXiv 2310.08475).

Start of the hypernetwork (`start`): `paper` draws the first factor by Glorot's uniform distribution, with one bias, in
the first block, as described. The public code (github.com/eric-mitchell/mend) draws it from N(0, 1) and has a bias in
both blocks (`public_code`). Its factor is sqrt((rank + width) / 2) times larger, 86 times for BLIP2-OPT-2.7B, and so is
what a training step changes in the network's output: the published learning rate belongs to that start.

Differs from the paper:
    The statistics that normalise x and delta are measured on training records before the first step; the paper keeps
    running statistics. A feature that hardly varies there is divided by a tenth of the average deviation instead of
    its own: a ReLU unit inactive in all of them would otherwise be scaled up without bound when an edit activates it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.editors.base import (
    OptimizerSettings,
    Plain,
    Trace,
    TrainingSettings,
    fitting_sites,
    prefix_of_edit,
)
from odedit.editors.common.hooks import Rewrite, rewritten
from odedit.editors.common.weights import check_tensors, load_weights
from odedit.errors import InputError
from odedit.inputs.batch import EDIT, LOCALITY_SLOTS, REPHRASE_SLOTS, EditBatch, EditParams
from odedit.risks import risks
from odedit.settings import Settings

_SMALLEST_DEVIATION = 0.1
"""Lower bound of a feature's deviation, as a share of the root mean square of all features' deviations."""
_BLOCKS = ("first", "second")
_RATE = "rate"


@dataclass(frozen=True)
class MENDConfig(Settings):
    """Settings of MEND; the defaults are those published for BLIP2-OPT.

    Attributes:
        checkpoint: File of the hypernetwork's weights, written by `odedit train mend`; required to edit.
        sites: Edited matrices; `layers.-1` is the last layer.
        rank: Rank of the hypernetwork's blocks, capped at the width of a site's input and output together.
        start: Initial factors and biases of the hypernetwork, as in the `paper` or in the `public_code`.
        edit_rate: Initial step size of an edit; training learns one for each site.
        text_rephrase_weight: Training weight of the NLL of the edit's answer to the text rephrase.
        image_rephrase_weight: Training weight of the NLL of the edit's answer to the image rephrase.
        text_locality_weight: Training weight of KL(unedited || edited) on an unrelated question without a picture.
        image_locality_weight: Training weight of KL(unedited || edited) on an unrelated question about a picture.
        near_locality_weight: Training weight of KL(unedited || edited) on the edit's own question about another
            picture. Not part of the published loss.
        learning_rate: Step size of Adam for the hypernetwork.
        rate_learning_rate: Step size of Adam for the edit's step sizes.
        batch_size: Records per forward in training.
        accumulate: Forwards per training step.
        clip_norm: Largest gradient norm of a training step; null: no clipping.
        training_steps: Largest number of training steps.
        validate_every: Training steps between two validations. Our choice.
        patience: Validations without improvement after which training stops. Our choice.
    """

    checkpoint: str | None = None
    sites: tuple[str, ...] = (
        "layers.-3.ffn.in", "layers.-3.ffn.out", "layers.-2.ffn.in",
        "layers.-2.ffn.out", "layers.-1.ffn.in", "layers.-1.ffn.out",
    )  # fmt: skip
    rank: Annotated[int, Ge(1)] = 1920
    start: Literal["paper", "public_code"] = "paper"
    edit_rate: Annotated[float, Gt(0)] = 1e-4
    text_rephrase_weight: Annotated[float, Ge(0)] = 0.1
    image_rephrase_weight: Annotated[float, Ge(0)] = 0.1
    text_locality_weight: Annotated[float, Ge(0)] = 1.0
    image_locality_weight: Annotated[float, Ge(0)] = 1.0
    near_locality_weight: Annotated[float, Ge(0)] = 0.0
    learning_rate: Annotated[float, Gt(0)] = 1e-6
    rate_learning_rate: Annotated[float, Gt(0)] = 1e-4
    batch_size: Annotated[int, Ge(1)] = 1
    accumulate: Annotated[int, Ge(1)] = 2
    clip_norm: Annotated[float, Gt(0)] | None = 100.0
    training_steps: Annotated[int, Ge(1)] = 30_000
    validate_every: Annotated[int, Ge(1)] = 1000
    patience: Annotated[int, Ge(1)] = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        if not self.sites:
            raise ValueError("sites: got none, expected at least one such as layers.-1.ffn.in.")
        super().__post_init__()


class _Signal(NamedTuple):
    """Factors of the gradient of each edit at one site, padded with zeros.

    Attributes:
        z_ETW: Input and output gradient of every token, side by side.
        present_ET: True where a token has a gradient.
    """

    z_ETW: Tensor
    present_ET: Tensor


class MEND(Plain):
    """`y = x W^T + (x X~^T) D~`, with X~ and D~ made by the hypernetwork from the edit's gradient."""

    Config: ClassVar[type] = MENDConfig
    starts_neutral = False
    positionwise = True
    max_steps = 0
    trains_with_objective = True

    def __init__(self, config: MENDConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config = config
        self.sites = config.sites
        self.optimizer = OptimizerSettings("sgd", config.learning_rate)  # unused: max_steps is 0
        self.weight_settings: Mapping[str, Any] = {"sites": list(config.sites), "rank": config.rank}
        if config.start != "paper":  # older files of weights do not name the start
            self.weight_settings = {**self.weight_settings, "start": config.start}
        self.training = TrainingSettings(
            config.learning_rate,
            config.batch_size,
            config.accumulate,
            config.clip_norm,
            config.training_steps,
            config.validate_every,
            config.patience,
            rates={_RATE: config.rate_learning_rate},
        )
        self._weights = weights
        self._model: EditParams = {}

    def following(self, model: EditParams) -> MEND:
        other = copy.copy(self)
        other._model = dict(model)
        return other

    def start(self, backbone: Backbone) -> EditParams:
        return {}

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        """The earlier difference of each matrix and the edit's, added up."""
        return {name: delta.unsqueeze(0) for name, delta in self.merged({**self._model, **params}).items()}

    def check(self, backbone: Backbone) -> None:
        modules = {backbone.site(name) for name in self.sites}
        if len(modules) < len(self.sites):
            raise InputError(f"editor.sites: got {', '.join(self.sites)}, expected different matrices.")
        if self._weights is None:
            with torch.device("meta"):  # shapes only
                expected = self._drawn(backbone, 0)
            check_tensors(self.config.checkpoint, self._loaded(backbone, "cpu"), expected)

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        sites = fitting_sites(backbone, self.sites)
        return {} if sites == self.sites else {"sites": sites}

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        weights = self._weights if self._weights is not None else self._loaded(backbone, str(batch.tokens_EKS.device))
        params: EditParams = {}
        for index, (name, signal) in enumerate(self._signals(backbone, batch, prefix).items()):
            out_width, in_width = backbone.site(name).weight.shape
            mapped_ETW = self._mapped(weights, name, signal.z_ETW, f"{out_width}x{in_width}")
            mapped_ETW = mapped_ETW.masked_fill(~signal.present_ET.unsqueeze(-1), 0.0)
            x_ETI, delta_ETO = mapped_ETW.split([in_width, out_width], dim=-1)
            params[f"{name}.x"] = x_ETI
            params[f"{name}.delta"] = -weights[_RATE][index] * delta_ETO
        return params

    def _loaded(self, backbone: Backbone, device: str) -> dict[str, Tensor]:
        return load_weights(self.config.checkpoint, "mend", self.weight_settings, backbone.fingerprint, device)

    def _signals(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> dict[str, _Signal]:
        """Inputs and output gradients of every site, from one forward and backward of the edits' NLL; detached."""
        prefix = prefix_of_edit(backbone, self.sites, batch, prefix)
        batch = batch.select((EDIT,))
        inputs: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}

        def watch(name: str) -> Rewrite:
            def rewrite(x: Tensor, y: Tensor) -> Tensor:
                inputs[name] = x.detach()
                shifts[name] = torch.zeros_like(y, requires_grad=True)
                return self._added(self._model, name, x, y) + shifts[name]

            return rewrite

        with torch.enable_grad(), rewritten({backbone.site(name): watch(name) for name in self.sites}):
            states_ETD = backbone.suffix(prefix, batch.predict_EKT)[:, 0]
            likelihood = risks.reliability(
                backbone.head(states_ETD), batch.target_EKT[:, 0], batch.target_mask_EKT[:, 0]
            )
            gradients = torch.autograd.grad(likelihood.value.sum(), [shifts[name] for name in self.sites])
        return {
            name: _compact(inputs[name], gradient, batch.num_edits)
            for name, gradient in zip(self.sites, gradients, strict=True)
        }

    def _mapped(self, weights: Mapping[str, Tensor], name: str, z: Tensor, shape: str) -> Tensor:
        """(x~, delta~) of tokens `(..., in + out)`: normalised, then two residual blocks shared by equal shapes."""
        # Detached: a step of Adam is larger than a gradient's deviation and would flip its sign.
        z = (z - weights[f"{name}.mean"].detach()) / weights[f"{name}.std"].detach()
        for block in _BLOCKS:
            inner = (z @ weights[f"{shape}.{block}.v"].T) @ weights[f"{shape}.{block}.u"].T
            if (bias := weights.get(_bias(shape, block))) is not None:
                inner = inner + bias
            inner = weights[f"{name}.{block}.scale"] * inner + weights[f"{name}.{block}.shift"]
            # Training starts at 0, where the gradient of `clamp` is 1 and that of `relu` 0.
            z = z + inner.clamp(min=0.0)
        return z

    @contextmanager
    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        def rewrite_at(name: str) -> Rewrite:
            return lambda x, y: self._added(params, name, x, self._added(self._model, name, x, y))

        with rewritten({backbone.site(name): rewrite_at(name) for name in self.sites}):
            yield Trace()

    def _added(self, params: EditParams, name: str, x: Tensor, y: Tensor) -> Tensor:
        """A module's output with the factors of E edits, or with the difference of a model, `name` itself."""
        if name in params:
            return y + x @ params[name][0].to(x.dtype).T
        if f"{name}.x" not in params:
            return y
        x_ETI, delta_ETO = params[f"{name}.x"], params[f"{name}.delta"]
        x_ENI = x.reshape(x_ETI.shape[0], -1, x.shape[-1])
        shares_ENT = torch.bmm(x_ENI, x_ETI.to(x.dtype).transpose(1, 2))
        return y + torch.bmm(shares_ENT, delta_ETO.to(x.dtype)).reshape(y.shape)

    @contextmanager
    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> Iterator[Trace]:
        """All edits' factors side by side, or the difference that `extended` has made of them."""
        for_all = {name: value.expand(batch.num_edits, -1, -1) for name, value in self.pooled(params).items()}
        with self.applied(backbone, for_all, batch) as trace:
            yield trace

    def pooled(self, params: EditParams) -> EditParams:
        """One set of factors (axis 0 has length 1) whose addition is the sum of all edits': tokens concatenated."""
        return {
            name: value if name in self.sites else value.flatten(0, 1).unsqueeze(0) for name, value in params.items()
        }

    def merged(self, params: EditParams) -> dict[str, Tensor]:
        pooled, differences = self.pooled(params), {}
        for name in self.sites:
            parts = [pooled[name][0]] if name in pooled else []
            if f"{name}.x" in pooled:
                parts.append(pooled[f"{name}.delta"][0].T @ pooled[f"{name}.x"][0])
            differences[name] = torch.stack(parts).sum(0)
        return differences

    def initial_weights(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        """A hypernetwork that is the identity: its factors u, biases and shifts are 0, nothing is normalised."""
        device = backbone.device
        return {name: value.to(device) for name, value in self._drawn(backbone, seed).items()}

    def _drawn(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weights = {_RATE: torch.full((len(self.sites),), self.config.edit_rate)}
        for name in self.sites:
            out_width, in_width = backbone.site(name).weight.shape
            width, shape = out_width + in_width, f"{out_width}x{in_width}"
            rank = min(self.config.rank, width)
            weights |= {f"{name}.mean": torch.zeros(width), f"{name}.std": torch.ones(width)}
            for block in _BLOCKS:
                weights[f"{name}.{block}.scale"] = torch.ones(width)
                weights[f"{name}.{block}.shift"] = torch.zeros(width)
                if f"{shape}.{block}.v" not in weights:
                    weights[f"{shape}.{block}.v"] = self._first_factor(rank, width, generator)
                    weights[f"{shape}.{block}.u"] = torch.zeros(width, rank)
            for block in _BLOCKS if self.config.start == "public_code" else _BLOCKS[:1]:
                weights[_bias(shape, block)] = torch.zeros(width)
        return weights

    def _first_factor(self, rank: int, width: int, generator: torch.Generator) -> Tensor:
        if self.config.start == "public_code":
            return torch.randn(rank, width, generator=generator)
        bound = math.sqrt(6 / (rank + width))  # Glorot's uniform distribution
        return bound * (2 * torch.rand(rank, width, generator=generator) - 1)

    def with_weights(self, weights: Mapping[str, Tensor]) -> MEND:
        return MEND(self.config, weights)

    def estimated(
        self, backbone: Backbone, weights: Mapping[str, Tensor], batches: Iterable[EditBatch]
    ) -> dict[str, Tensor]:
        """The weights with mean and deviation of each feature of x and delta, over tokens with a gradient."""
        counts = dict.fromkeys(self.sites, 0)
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        for batch in batches:
            for name, signal in self._signals(backbone, batch).items():
                z_NW = signal.z_ETW[signal.present_ET].double()
                counts[name] += len(z_NW)
                sums[name] = sums.get(name, 0.0) + z_NW.sum(0)
                squares[name] = squares.get(name, 0.0) + z_NW.square().sum(0)
        measured = dict(weights)
        for name, count in counts.items():
            if count < 2:
                raise InputError(f"training records: {count} tokens with a gradient at {name}, expected at least 2.")
            mean = sums[name] / count
            variance = ((squares[name] - count * mean.square()) / (count - 1)).clamp_min(0.0)
            in_width = backbone.site(name).weight.shape[1]
            parts = [_floored(part) for part in (variance[:in_width], variance[in_width:])]
            measured |= {f"{name}.mean": mean.float(), f"{name}.std": torch.cat(parts).sqrt().float()}
        return measured

    def native_training_loss(self, backbone: Backbone, batch: EditBatch) -> Tensor:
        weights = {slot: getattr(self.config, f"{slot}_weight") for slot in (*REPHRASE_SLOTS, *LOCALITY_SLOTS)}
        read = [slot for slot in batch.slots if weights.get(slot)]
        total_E = torch.zeros(batch.num_edits, device=batch.tokens_EKS.device)
        if not read:
            return total_E
        params = self.init(backbone, batch)
        batch = batch.select(read)
        prefix = backbone.prefix(batch, *self.sites, positionwise=True)
        with torch.no_grad():
            base_EKTV = backbone.head(backbone.suffix(prefix, batch.predict_EKT))
        with self.applied(backbone, params, batch):
            logits_EKTV = backbone.head(backbone.suffix(prefix, batch.predict_EKT))
        for k, slot in enumerate(read):
            mask_ET = batch.target_mask_EKT[:, k]
            if slot in LOCALITY_SLOTS:
                risk = risks.locality(logits_EKTV[:, k], base_EKTV[:, k], mask_ET, "base_first")
            else:
                risk = risks.reliability(logits_EKTV[:, k], batch.target_EKT[:, k], mask_ET)
            total_E = total_E + weights[slot] * risk.value
        return total_E


def _bias(shape: str, block: str) -> str:
    """Name of a block's bias; that of the first block has the name of the only one in the paper."""
    return f"{shape}.bias" if block == "first" else f"{shape}.{block}.bias"


def _compact(x: Tensor, gradient: Tensor, num_edits: int) -> _Signal:
    """Each edit's tokens that have a gradient, in order, padded to the longest edit of the batch."""
    x_ESI = x.reshape(num_edits, -1, x.shape[-1]).float()
    gradient_ESO = gradient.reshape(num_edits, -1, gradient.shape[-1]).float()
    present_ES = (gradient_ESO != 0).any(-1)
    length = max(1, int(present_ES.sum(1).max()))
    order_ET = torch.sort((~present_ES).long(), dim=1, stable=True).indices[:, :length]
    present_ET = present_ES.gather(1, order_ET)
    z_ESW = torch.cat([x_ESI, gradient_ESO], dim=-1)
    z_ETW = z_ESW.gather(1, order_ET.unsqueeze(-1).expand(-1, -1, z_ESW.shape[-1]))
    return _Signal(z_ETW.masked_fill(~present_ET.unsqueeze(-1), 0.0), present_ET)


def _floored(variance: Tensor) -> Tensor:
    """Variances, bounded below by a share of their mean; 1 for all if no feature varies."""
    mean = variance.mean()
    floored = variance.clamp_min(_SMALLEST_DEVIATION**2 * mean)
    return torch.where(mean > 0, floored, torch.ones_like(floored))


EDITOR = MEND
