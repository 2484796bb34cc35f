"""An editor from outside the package: one gain per edit and output of a module."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from odedit.editors.base import OptimizerSettings, Trace
from odedit.editors.common.hooks import rewritten


@dataclass(frozen=True)
class GainsConfig:
    """Settings.

    Attributes:
        site: Module whose outputs are scaled.
    """

    site: str = "layers.-1.ffn.out"


class Gains:
    Config = GainsConfig
    own_slots = ()
    max_steps = 5
    frozen = frozenset()
    label_smoothing = 0.0
    starts_neutral = True
    positionwise = False
    length_varies = False
    optimizer = OptimizerSettings("sgd", 0.1)

    def __init__(self, config):
        self.config = config
        self.sites = (config.site,)

    def check(self, backbone):
        backbone.site(self.config.site)

    def init(self, backbone, batch, prefix=None):
        return {"gains": torch.zeros(batch.num_edits, backbone.site(self.config.site).out_features)}

    @contextmanager
    def applied(self, backbone, params, batch):
        gains_EO = params["gains"]

        def rewrite(x, y):
            y_ENO = y.reshape(len(gains_EO), -1, y.shape[-1])
            return (y_ENO + gains_EO[:, None] * y_ENO).reshape(y.shape)

        with rewritten({backbone.site(self.config.site): rewrite}):
            yield Trace()

    def together(self, backbone, params, batch):
        return self.applied(backbone, {"gains": params["gains"].sum(0).expand(batch.num_edits, -1)}, batch)

    def own_risk(self, params, trace, batch):
        return torch.zeros(batch.num_edits)

    def constrain(self, params):
        return params

    def converged(self, loss_E, previous_E, token_right_E, trace):
        return token_right_E

    def finished(self, params, trace, batch):
        return params


EDITOR = Gains
