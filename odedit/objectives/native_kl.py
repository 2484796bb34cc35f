"""The base editor's own loss and R_loc: shows in a comparison what the rest of an objective adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from odedit.objectives.base import ComparingConfig, Objective


@dataclass(frozen=True)
class NativeKLConfig(ComparingConfig):
    """Settings of the native objective with R_loc: those of every objective that compares with the unedited model."""

    replaces_native_loss: ClassVar[bool] = False
    terms_added_to_training: ClassVar[tuple[str, ...]] = ("loc",)


class NativeKL(Objective):
    Config = NativeKLConfig


OBJECTIVE = NativeKL
