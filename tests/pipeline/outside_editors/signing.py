"""Fine-tuning that waits until several processes edit, which proves that there were several."""

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
    """Settings of FT-L and of the wait.

    Attributes:
        folder: Folder in which every process makes a file.
        processes: Number of processes to wait for.
    """

    folder: str = ""
    processes: int = 1


class Signing(FTL):
    """Editor that raises TimeoutError if the other processes do not edit within 120 s."""

    Config: ClassVar[type] = SigningConfig

    def own_risk(self, params: EditParams, trace: Any, batch: EditBatch) -> Tensor:
        folder = Path(self.config.folder)  # type: ignore[attr-defined]
        (folder / f"process-{os.getpid()}").touch()
        begun = time.monotonic()
        while len(list(folder.iterdir())) < self.config.processes:  # type: ignore[attr-defined]
            if time.monotonic() - begun > _PATIENCE_S:
                raise TimeoutError(f"only {len(list(folder.iterdir()))} process(es) edit")
            time.sleep(0.05)
        return super().own_risk(params, trace, batch)


EDITOR = Signing
