"""The contract of an editor: which parameters phi_e an edit trains, and how the model computes with them.

An editor is one file that defines `EDITOR`, a class built from its frozen `Config`. It keeps no state: an edit's
parameters are in `EditParams`, values recorded during a forward in the `Trace`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix, holding
from odedit.inputs.batch import EDIT, EditBatch, EditParams
from odedit.runtime.brief import brief

PUBLISHED_LAYERS = 32
"""Text layers of BLIP2-OPT-2.7B, for which the default sites were published."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The editor's optimiser, applied per edit.

    Attributes:
        kind: `sgd`, `adam` (weight decay as in L2) or `adamw` (decoupled).
        learning_rate: Step size.
        weight_decay: Decay of the trained tensors, which are differences to the model's weights.
        clip_norm: Largest gradient norm of one edit over all its tensors; None: no clipping.
    """

    kind: str
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """Training of a `Trainable` editor's weights, with Adam.

    Attributes:
        learning_rate: Step size.
        batch_size: Records per forward.
        accumulate: Forwards per step.
        clip_norm: Largest gradient norm of a step; None: no clipping.
        max_steps: Largest number of steps.
        validate_every: Steps between two validations.
        patience: Validations without improvement after which training stops.
        rates: Step sizes of single weights, by name, instead of `learning_rate`.
    """

    learning_rate: float
    batch_size: int
    accumulate: int
    clip_norm: float | None
    max_steps: int
    validate_every: int
    patience: int
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Trace:
    """Values recorded by the forwards inside one `applied` block; read by `own_risk`, `converged` and `finished`.

    Attributes:
        values: Tensors by name; axis 0 is the edit.
        pending: Functions that compute further values, by name; called when the value is first read.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    __repr__ = brief

    def value(self, name: str) -> Tensor:
        """The tensor of this name, computed first if it is pending."""
        if name in self.pending:
            self.values[name] = self.pending.pop(name)()
        return self.values[name]


class Editor(Protocol):
    """A method of writing an edit into a model.

    Axis 1 of a tensor of phi_e may differ in length between edits (factors, neurons, stored states). In a batch it is
    padded with zeros, and padding must change no result.

    Attributes:
        Config: Frozen dataclass of settings, each with a default; see `odedit.settings.Settings`.
        sites: Edited modules; the frozen prefix of the model ends at the lowest.
        optimizer: Optimiser of the inner loop.
        max_steps: Published number of steps, the default bound of the inner loop. 0: `init` makes the whole edit
            (MEND), and the loop takes no step.
        own_slots: Sequences that `own_risk` reads. The native objective runs these and the edit only.
        frozen: Names of tensors of phi_e that no step moves.
        label_smoothing: Label smoothing of the native likelihood; the ODEdit objective has none.
        starts_neutral: True when applying phi_0 changes no logit.
        positionwise: True when an edit's change at a position depends on that position's states alone. Then the last
            layer runs only at the positions that are read, and `applied` may see only these.
        length_varies: True when axis 1 of phi_e depends on the batch until the edit is finished.
    """

    Config: ClassVar[type]
    config: Any
    sites: Sequence[str]
    own_slots: Sequence[str]
    optimizer: OptimizerSettings
    max_steps: int
    frozen: frozenset[str]
    label_smoothing: float
    starts_neutral: bool
    positionwise: bool
    length_varies: bool

    def check(self, backbone: Backbone) -> None:
        """Raises InputError if the settings do not fit the model: unknown site, missing trained weights.

        Args:
            backbone: Model, possibly without weights (`backbones.inspect_backbone`).
        """
        ...

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        """Settings that name layers or matrices which the model lacks, with values that fit; empty if all fit.

        Args:
            backbone: Model, possibly without weights.
        """
        ...

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        """phi_0 of E edits, float32; differentiable with respect to the weights of a `Trainable` editor.

        Args:
            prefix: Prefix of the batch at the editor's sites; None: computed if needed.
        """
        ...

    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> AbstractContextManager[Trace]:
        """Applies phi_e to forwards over the E x K sequences of `batch`; undone on any exit, bit for bit.

        A forward over later positions (`Backbone.target_states`) continues the last forward over whole sequences.

        Args:
            params: From `init`: the edited path is always taken, so that gradients flow. From `finished`: the path of
                inference is taken (WISE routes each prompt).
        """
        ...

    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> AbstractContextManager[Trace]:
        """Applies all E finished edits to every sequence of `batch` at once."""
        ...

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        """The method's loss terms beside the likelihood, `(E,)` (WISE: margins; T-Patcher: l_a + l_m); or zeros."""
        ...

    def constrain(self, params: EditParams) -> EditParams:
        """Projects phi_e onto the allowed set after each step (WISE: clamp)."""
        ...

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        """The published stop rule, `(E,)` bool.

        Args:
            loss_E: Objective at this step.
            previous_E: Objective at the step before.
            token_right_E: True when every target token is the model's first choice.
            trace: Values of this step's forward (T-Patcher: activation of its neurons).
        """
        ...

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        """The tensors to save: phi_e, and further tensors for inference (WISE: routing threshold)."""
        ...


class Plain:
    """Base class with the defaults of most editors: no own terms, projection or stop rule; phi_e is saved as it is."""

    own_slots: Sequence[str] = ()
    frozen: frozenset[str] = frozenset()
    label_smoothing: float = 0.0
    starts_neutral: bool = True
    positionwise: bool = False
    length_varies: bool = False

    def fitted(self, backbone: Backbone) -> Mapping[str, Any]:
        return {}

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        return torch.zeros(batch.num_edits, device=batch.tokens_EKS.device)

    def constrain(self, params: EditParams) -> EditParams:
        return params

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        return torch.zeros_like(token_right_E)

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        return params


@runtime_checkable
class Mergeable(Protocol):
    """An editor whose finished edits can be written into plain weights."""

    def merged(self, params: EditParams) -> dict[str, Tensor]:
        """Sum of all E edits as weight differences `{site: (out, in)}`."""
        ...


@dataclass(frozen=True)
class Neurons:
    """Units beside one layer's feed-forward network: `relu(h keys^T + biases) values`.

    Attributes:
        layer: Number of the layer, from 0.
    """

    layer: int
    keys_ND: Tensor
    biases_N: Tensor
    values_ND: Tensor

    __repr__ = brief


@runtime_checkable
class Widening(Protocol):
    """An editor whose finished edits are neurons, which `odedit.editing.widened` writes into a wider network."""

    def neurons(self, backbone: Backbone, params: EditParams) -> Neurons:
        """The neurons of all E edits, without padding."""
        ...


@dataclass(frozen=True)
class EditSize:
    """Numbers of values of one edit.

    Attributes:
        trained: Values that steps move, float32.
        fixed: Values that no step moves, float32.
        dense: Values of matrices that a forward makes of them, in the model's type.
    """

    trained: int
    fixed: int = 0
    dense: int = 0


@runtime_checkable
class Sized(Protocol):
    """An editor that knows the size of an edit before it is made; read by `odedit.editing.memory`."""

    def size(self, backbone: Backbone, positions: int) -> EditSize:
        """Size of an edit whose sequences have that many positions.

        Args:
            backbone: Model, possibly without weights.
        """
        ...


@runtime_checkable
class Measuring(Protocol):
    """An editor that measures unedited records once, before the first edit (T-Patcher's memory states).

    Without records it uses each edit's own locality prompts.
    """

    def measured(self, backbone: Backbone, batch: EditBatch) -> Editor:
        """A copy of the editor with the measurements of `batch`.

        Args:
            batch: Records that share nothing with the probes of any edit.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """An editor with weights that `odedit train` learns before any edit.

    Attributes:
        training: Batch size, step sizes and stop rule of the training.
        weight_settings: Settings that the weights depend on; a checkpoint made with others is refused.
        trains_with_objective: True when the ODEdit objective replaces `native_training_loss` (MEND), which requires a
            `Mergeable` editor: the multiplier reads the weight change. False when it acts on edits only (UniKE).
    """

    training: TrainingSettings
    weight_settings: Mapping[str, Any]
    trains_with_objective: bool

    def initial_weights(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        """Weights before training, float32."""
        ...

    def with_weights(self, weights: Mapping[str, Tensor]) -> Editor:
        """A copy of the editor with these weights, which may require gradients, instead of its checkpoint's."""
        ...

    def native_training_loss(self, backbone: Backbone, batch: EditBatch) -> Tensor:
        """The published loss on a supervision batch of training records, `(E,)`."""
        ...


@runtime_checkable
class Estimating(Protocol):
    """A `Trainable` editor that measures some of its weights before the first step (MEND's statistics).

    Training does not move weights that no gradient reaches.
    """

    def estimated(
        self, backbone: Backbone, weights: Mapping[str, Tensor], batches: Iterable[EditBatch]
    ) -> dict[str, Tensor]:
        """The weights, with statistics of the training records in `batches` filled in."""
        ...


@runtime_checkable
class Continuing(Editor, Protocol):
    """An editor whose edits follow one another in one model (`commit.way: sequential`).

    The model is a set of parameters that the editor applies with `together`; {} before the first edit.
    """

    def following(self, model: EditParams) -> Continuing:
        """A copy of the editor for the next edit of the model, whose earlier edits act in `init` and `applied`.

        The model without any edit stays the one that objectives and scores compare with.
        """
        ...

    def start(self, backbone: Backbone) -> EditParams:
        """Values of phi_0 by name, axis 0 of length 1, where the next edit goes on from the model; {}: from `init`."""
        ...

    def extended(self, backbone: Backbone, params: EditParams) -> EditParams:
        """The model with a further edit.

        Args:
            params: Finished edit that the copy of `following` has made.
        """
        ...


def prefix_of_edit(backbone: Backbone, sites: Sequence[str], batch: EditBatch, prefix: Prefix | None) -> Prefix:
    """Prefix of each edit's own sequence: a column of the batch's prefix, or computed if that is None."""
    if prefix is not None:
        return prefix.column(batch.slots.index(EDIT))
    return backbone.prefix(batch.select((EDIT,)), *sites, positionwise=True)


def fitting_sites(backbone: Backbone, sites: Sequence[str]) -> tuple[str, ...]:
    """The sites by `fitting_site`, and the matrices that hold them (`holding`); each once."""
    fitting = (holding(backbone, fitting_site(site, backbone.num_layers)) for site in sites)
    return tuple(dict.fromkeys(fitting))


def fitting_site(site: str, num_layers: int) -> str:
    """The site; if the model has no such layer, the site at the same relative depth.

    >>> fitting_site("layers.23.ffn.in", 4), fitting_site("layers.-3.ffn.out", 2), fitting_site("layers.-1.ffn.in", 4)
    ('layers.2.ffn.in', 'layers.-1.ffn.out', 'layers.-1.ffn.in')
    """
    match = re.fullmatch(r"layers\.(-?\d+)\.(.+)", site)
    if match is None or -num_layers <= int(match[1]) < num_layers:
        return site
    from_end = match[1].startswith("-")
    depth = (int(match[1]) % PUBLISHED_LAYERS + 0.5) / PUBLISHED_LAYERS
    return f"layers.{int(depth * num_layers) - from_end * num_layers}.{match[2]}"
