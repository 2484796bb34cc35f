"""The contract of a base editor: which parameters it trains, and how the model computes with them.

An editor is one file that defines `EDITOR`, a class built from its frozen `Config`. It keeps no state: what it learns
is in `EditParams`, what a forward shows is in the `Trace`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from odedit.backbones.base import Backbone, Prefix
from odedit.inputs.batch import EDIT, EditBatch, EditParams
from odedit.runtime.brief import brief

PUBLISHED_LAYERS = 32
"""Number of text layers of BLIP2-OPT-2.7B, for which the default sites were published."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The base editor's own optimiser, applied per edit.

    Attributes:
        kind: `sgd`, `adam` (weight decay as in L2) or `adamw` (decoupled).
        learning_rate: Step size.
        weight_decay: On the trained tensors, which are differences to the model's weights.
        clip_norm: Largest gradient norm of one edit over all its tensors; None for no clipping.
    """

    kind: str
    learning_rate: float
    weight_decay: float = 0.0
    clip_norm: float | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """How a `Trainable` editor's weights are trained, with Adam.

    Attributes:
        learning_rate: Step size.
        batch_size: Records of one forward.
        accumulate: Forwards of one step.
        clip_norm: Largest gradient norm of a step; None for no clipping.
        max_steps: Bound on the steps.
        validate_every: Steps between two looks at the validation records.
        patience: Looks without improvement after which training stops.
        rates: Step sizes of weights that have their own, by name.
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
    """What the forwards inside one `applied` block showed; read by `own_risk` and `finished`.

    Attributes:
        values: Named tensors, axis 0 the edit.
        pending: Values that cost something and that nobody may ask for, as functions.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    pending: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    __repr__ = brief

    def value(self, name: str) -> Tensor:
        """A named tensor, computed now if it is pending."""
        if name in self.pending:
            self.values[name] = self.pending.pop(name)()
        return self.values[name]


class Editor(Protocol):
    """A way to write an edit into a model.

    Axis 1 of a tensor of phi_e may be longer for one edit than for another (factors, neurons, memory). In a batch the
    shorter ones are padded with zeros, which must compute as if they were absent.

    Attributes:
        Config: Frozen dataclass, every field with a default and its source.
        sites: Edited sites; the frozen prefix ends at the lowest.
        optimizer: What the inner loop steps with.
        max_steps: Published number of steps, the default bound of the inner loop; 0: `init` is the whole edit (MEND),
            and the loop never steps.
        own_slots: Sequences that `own_risk` reads; others need not run under the native objective.
        frozen: Tensors of phi_e that no step moves (a memory of states).
        label_smoothing: Share of it in the method's native likelihood; the ODEdit objective has none.
        starts_neutral: Whether applying phi_0 changes no logit.
        positionwise: Whether what an edit adds at a position depends on the states at this position alone: then the
            last layer may run at the positions that are read, and `applied` may see these only.
        length_varies: Whether axis 1 of phi_e depends on the batch while an edit moves.
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
        """Raises InputError if the settings do not fit the model: no such site, weights that must be trained first.

        Args:
            backbone: May be one without weights (`backbones.inspect_backbone`).
        """
        ...

    def fitted(self, num_layers: int) -> Mapping[str, Any]:
        """Replacements for settings that name layers which a text model with `num_layers` layers does not have."""
        ...

    def init(self, backbone: Backbone, batch: EditBatch, prefix: Prefix | None = None) -> EditParams:
        """phi_0 of E edits, float32; differentiable in the weights of a `Trainable` editor.

        Args:
            prefix: Of the batch at the editor's sites, where it is there already.
        """
        ...

    def applied(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> AbstractContextManager[Trace]:
        """Inside, forwards over the E x K sequences of `batch` see phi_e; undone on any exit, bit for bit.

        A forward over further positions of the same sequences (`Backbone.behind`) goes on from the last whole one.

        `params` as `init` made them: the edited path is always taken, so that gradients flow. As `finished` made them:
        the path that inference takes (WISE routes).
        """
        ...

    def together(self, backbone: Backbone, params: EditParams, batch: EditBatch) -> AbstractContextManager[Trace]:
        """As `applied` with finished params, but every sequence of `batch` sees all E edits at once."""
        ...

    def own_risk(self, params: EditParams, trace: Trace, batch: EditBatch) -> Tensor:
        """`(E,)`: the method's own terms beside the likelihood (WISE margins, T-Patcher l_a + l_m); zeros for none."""
        ...

    def constrain(self, params: EditParams) -> EditParams:
        """After each step: projection onto what the method allows (WISE: the clamp)."""
        ...

    def converged(self, loss_E: Tensor, previous_E: Tensor, token_right_E: Tensor, trace: Trace) -> Tensor:
        """`(E,)` bool: the published stop rule, from this loss, the last, whether all target tokens are right, and
        what the forward showed (T-Patcher: how active its neurons are).
        """
        ...

    def finished(self, params: EditParams, trace: Trace, batch: EditBatch) -> EditParams:
        """What is saved: phi_e and whatever inference needs beside it (WISE: the routing threshold)."""
        ...


class Plain:
    """What most editors answer, to inherit from: no terms of their own, no projection, no stop rule, phi_e as it is."""

    own_slots: Sequence[str] = ()
    frozen: frozenset[str] = frozenset()
    label_smoothing: float = 0.0
    starts_neutral: bool = True
    positionwise: bool = False
    length_varies: bool = False

    def fitted(self, num_layers: int) -> Mapping[str, Any]:
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
        """Weight differences `{site: (out, in)}` that stand for all E edits; no cost at inference."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """An editor that looks at unedited records once, before the first edit (T-Patcher's memory states).

    Without any it falls back on what supervises each edit.
    """

    def measured(self, backbone: Backbone, batch: EditBatch) -> Editor:
        """A copy of the editor that has seen the batch, of records that show nothing an edit is scored on; the editor
        itself stays as it is.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """An editor with weights of its own, learned by `odedit train` before any edit.

    Attributes:
        training: How its weights are trained.
        weight_settings: The settings that the weights depend on; a checkpoint made with others is refused.
        trains_with_objective: Whether the ODEdit objective replaces `native_training_loss` (MEND), or only acts on
            edits (UniKE, whose encoders have a loss of their own). Where it replaces it, the editor is `Mergeable`:
            the multiplier reads the change of the weights.
    """

    training: TrainingSettings
    weight_settings: Mapping[str, Any]
    trains_with_objective: bool

    def initial_weights(self, backbone: Backbone, seed: int) -> dict[str, Tensor]:
        """The weights before training, float32."""
        ...

    def with_weights(self, weights: Mapping[str, Tensor]) -> Editor:
        """A copy of the editor with these weights instead of its checkpoint's; they may require gradients."""
        ...

    def native_training_loss(self, backbone: Backbone, batch: EditBatch) -> Tensor:
        """`(E,)`: the published loss on a supervision batch of training records."""
        ...


@runtime_checkable
class Estimating(Protocol):
    """A `Trainable` editor some of whose weights are measured before the first step (MEND's statistics).

    Weights that no gradient reaches are not moved by training.
    """

    def estimated(
        self, backbone: Backbone, weights: Mapping[str, Tensor], batches: Iterable[EditBatch]
    ) -> dict[str, Tensor]:
        """The weights, with those that are measured replaced by what the training records in `batches` show."""
        ...


def prefix_of_edit(backbone: Backbone, sites: Sequence[str], batch: EditBatch, prefix: Prefix | None) -> Prefix:
    """Of the sequence that each edit is itself: from the batch's prefix, or made if that is None."""
    if prefix is not None:
        return prefix.column(batch.slots.index(EDIT))
    return backbone.prefix(batch.select((EDIT,)), *sites, positionwise=True)


def fitting_site(site: str, num_layers: int) -> str:
    """The site, or where the model has no such layer, the one at the same relative depth.

    >>> fitting_site("layers.23.ffn.in", 4), fitting_site("layers.-3.ffn.out", 2), fitting_site("layers.-1.ffn.in", 4)
    ('layers.2.ffn.in', 'layers.-1.ffn.out', 'layers.-1.ffn.in')
    """
    match = re.fullmatch(r"layers\.(-?\d+)\.(.+)", site)
    if match is None or -num_layers <= int(match[1]) < num_layers:
        return site
    from_end = match[1].startswith("-")
    depth = (int(match[1]) % PUBLISHED_LAYERS + 0.5) / PUBLISHED_LAYERS
    return f"layers.{int(depth * num_layers) - from_end * num_layers}.{match[2]}"
