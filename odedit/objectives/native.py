"""Native: the base editor's own loss, which is the NLL of the edit's answer and the editor's own terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from odedit.objectives.base import BaseConfig, Objective


@dataclass(frozen=True)
class NativeConfig(BaseConfig):
    """Settings of the native objective; it has none of its own."""

    replaces_native_loss: ClassVar[bool] = False


class Native(Objective):
    Config = NativeConfig


OBJECTIVE = Native
