"""Fine-tuning that waits until several processes edit at the same time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from odedit.editors.ftl import FTL, FTLConfig
from odedit.inputs.batch import EditBatch, EditParams

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class SigningConfig(FTLConfig):
    """Settings of FT-L and two more.

    Attributes:
        folder: Folder in which every process writes a file.
        processes: Number of files to wait for.
    """

    folder: str = ""
    processes: int = 1


class Signing(FTL):
    """FT-L; raises TimeoutError if the other processes do not start."""

    Config: ClassVar[type] = SigningConfig

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        folder = Path(self.config.folder)  # type: ignore[attr-defined]
        (folder / f"process-{os.getpid()}").touch()
        start = time.monotonic()
        while len(list(folder.iterdir())) < self.config.processes:  # type: ignore[attr-defined]
            if time.monotonic() - start > _PATIENCE_S:
                raise TimeoutError(f"{len(list(folder.iterdir()))} of {self.config.processes} processes edit")  # type: ignore[attr-defined]
            time.sleep(0.05)
        return super().own_risk(params, trace, batch)


EDITOR = Signing
