"""Rephrase: NLL of the edit and of its rephrases, and nothing else.

In a comparison it is the control of an objective that is supervised by rephrases: what it gains over `native` is due to
the rephrases as further training data, and what another objective gains over it is due to that objective. With
`own_weight: 1` the editor's own terms are added.
"""

from __future__ import annotations

from dataclasses import dataclass

from odedit.objectives.common.rephrased import Rephrased, RephrasedConfig


@dataclass(frozen=True)
class RephraseConfig(RephrasedConfig):
    """Settings of the rephrase objective."""


class Rephrase(Rephrased):
    Config = RephraseConfig


OBJECTIVE = Rephrase
