"""An objective from outside the package: ODEdit with one more term, the squared norm of the edit's tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from odedit.objectives.common.terms import Forward
from odedit.objectives.odedit import ODEdit, ODEditConfig


@dataclass(frozen=True)
class NormConfig(ODEditConfig):
    """Settings.

    Attributes:
        norm_weight: Weight of the squared norm.
    """

    norm_weight: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        return super().weights | {"norm": self.norm_weight}


class Norm(ODEdit):
    Config = NormConfig

    def further_terms(self, forward: Forward) -> dict[str, Tensor]:
        squares = [value.flatten(1).square().sum(1) for value in forward.params.values()]
        return {"norm": sum(squares[1:], start=squares[0])}


OBJECTIVE = Norm
