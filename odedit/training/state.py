"""State of a training, from which it can be resumed, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from odedit.backbones.common.fingerprints import comparable
from odedit.errors import InputError
from odedit.runtime.addresses import masked
from odedit.runtime.brief import brief
from odedit.storage.location import Location, Place, at
from odedit.storage.tensors import read_tensors, write_tensors
from odedit.training.multiplier import Dual

FORMAT = "odedit-training-1"
_GROUPS = ("weights", "first", "second", "best")


@dataclass(frozen=True)
class TrainingState:
    """State between two steps; the order of the records follows from the step.

    Attributes:
        weights: Weights of the editor.
        first, second: Moments of Adam.
        best: Weights of the lowest validation loss.
        best_loss, best_step: Lowest validation loss, and its step.
        step: Steps taken.
        losses: Training loss of every step.
        looks: Step and loss of every validation.
        dual: Multiplier network; without weights unless lambda is learned.
        stop_reason: `max_steps` or `patience`; empty during training.
    """

    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    best: dict[str, Tensor]
    best_loss: float = math.inf
    best_step: int = 0
    step: int = 0
    losses: tuple[float, ...] = ()
    looks: tuple[tuple[int, float], ...] = ()
    dual: Dual = field(default_factory=Dual)
    stop_reason: str = ""

    __repr__ = brief

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> TrainingState:
        """State before the first step."""
        kept = {name: value.detach() for name, value in weights.items()}
        zeros = {name: torch.zeros_like(value) for name, value in kept.items()}
        return cls(kept, zeros, dict(zeros), dict(kept))

    @property
    def looked_at(self) -> int:
        """Step of the last validation; -1 before the first."""
        return self.looks[-1][0] if self.looks else -1

    @property
    def looks_without_improvement(self) -> int:
        """Number of validations since the best one."""
        return sum(step > self.best_step for step, _ in self.looks)


def write_state(path: Place, state: TrainingState, identity: Mapping[str, Any]) -> None:
    """Writes the state atomically; of a finished training only the best weights."""
    groups = _GROUPS if not state.stop_reason else ("best",)
    tensors = {f"{group}/{name}": value for group in groups for name, value in getattr(state, group).items()}
    tensors |= {f"dual/{name}": value for name, value in state.dual.delta.items()}
    # JSON preserves floats: it writes as many digits as reading the same value takes.
    info = {
        "identity": dict(identity),
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "step": state.step,
        "losses": state.losses,
        "looks": state.looks,
        "dual_steps": state.dual.steps,
        "stop_reason": state.stop_reason,
    }
    # Copies: safetensors refuses tensors that share memory, as the best and the present weights may.
    stored = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "info": json.dumps(info)}
    write_tensors(at(path), stored, metadata)


def read_state(path: Place, identity: Mapping[str, Any], device: str = "cpu") -> TrainingState:
    """Reads a state that `write_state` wrote.

    Raises:
        InputError: The file cannot be read, or belongs to a training with other settings, records or model.
    """
    location = at(path)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in (*_GROUPS, "dual")}
    try:
        tensors, metadata = read_tensors(location, device)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{location}: format is {metadata.get('format')!r}, expected {FORMAT!r}. Remove it.")
        info = json.loads(metadata["info"])
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            # A copy has the alignment of other tensors: sums over memory of another alignment differ in the last bit.
            groups[group][name] = value.clone()
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{location}: this state of a training is damaged ({masked(str(error))}). Remove it to start over."
        ) from error
    stored = info["identity"]
    own = {key: comparable(value, stored.get(key)) for key, value in identity.items()}
    _check_identity(location, json.loads(json.dumps(own)), stored)
    delta = {name: value.requires_grad_() for name, value in groups["dual"].items()}
    return TrainingState(
        **{group: groups[group] for group in _GROUPS},
        best_loss=info["best_loss"],
        best_step=info["best_step"],
        step=info["step"],
        losses=tuple(info["losses"]),
        looks=tuple((step, loss) for step, loss in info["looks"]),
        dual=Dual(delta, info["dual_steps"]),
        stop_reason=info["stop_reason"],
    )


def _check_identity(location: Location, own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    changed = [
        f"  {key}: was {stored.get(key)!r}, now {own.get(key)!r}"
        for key in sorted({*own, *stored})
        if own.get(key) != stored.get(key)
    ]
    if changed:
        raise InputError(
            f"{location} holds a training with other settings or records:\n" + "\n".join(changed) + "\n"
            "Write to another file (--out), or add --fresh to start over."
        )
