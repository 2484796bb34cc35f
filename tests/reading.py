"""A forward at the positions that are read, against the whole forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odedit.edits import EditBatch
from odedit.encoding import gather_positions
from odedit.hooks import rewritten

SITES = ("layers.0.attention.q", "layers.0.ffn.in", "layers.-1.attention.q", "layers.-1.ffn.in")


def check(model: Any, batch: EditBatch, site: str, positionwise: bool) -> None:
    """Whether the last layer leaves the other positions out or not, states and an edit's gradient are the same."""
    prefix = model.prefix(batch, site, positionwise=positionwise)
    shift = torch.zeros(model.site(site).weight.shape[0], requires_grad=True)
    states, gradients, widths = [], [], []

    def add(x: Tensor, y: Tensor) -> Tensor:
        widths.append(y.shape[1])
        return y + shift

    for read in (None, batch.predict_EKT):
        with rewritten({model.site(site): add}):
            found = model.suffix(prefix, read)
        states.append(gather_positions(found, batch.predict_EKT) if read is None else found)
        gradients += torch.autograd.grad(states[-1].square().sum(), shift)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
    whole, read_alone = batch.tokens_EKS.shape[-1], batch.predict_EKT.shape[-1]
    leaves_out = positionwise and site.startswith("layers.-1")
    assert widths == [whole, read_alone if leaves_out else whole]
