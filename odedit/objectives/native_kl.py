"""Native with KL: the base editor's own loss and R_loc. In a comparison it isolates the effect of R_loc."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from odedit.objectives.base import ComparingConfig, Objective


@dataclass(frozen=True)
class NativeKLConfig(ComparingConfig):
    """Settings of the native objective with R_loc."""

    replaces_native_loss: ClassVar[bool] = False
    terms_added_to_training: ClassVar[tuple[str, ...]] = ("loc",)


class NativeKL(Objective):
    Config = NativeKLConfig


OBJECTIVE = NativeKL
