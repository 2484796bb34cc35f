"""Checks that forwards of some positions equal the whole forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odedit.backbones.base import holding
from odedit.editors.base import Editor
from odedit.editors.common.hooks import rewritten
from odedit.inputs.batch import EditBatch, EditParams
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

SITES = ("layers.0.attention.q", "layers.0.ffn.in", "layers.-1.attention.q", "layers.-1.ffn.in")


def check(model: Any, batch: EditBatch, site: str, positionwise: bool) -> None:
    """Checks states and an edit's gradient with and without the last layer's other positions, at a site or the matrix
    that holds it.
    """
    site = holding(model, site)
    prefix = model.prefix(batch, site, positionwise=positionwise)
    kept = model.prefix(batch, site, positionwise=positionwise, read_EKT=batch.predict_EKT)
    shift = torch.zeros(model.site(site).weight.shape[0], requires_grad=True)
    states, gradients, widths = [], [], []

    def add(x: Tensor, y: Tensor) -> Tensor:
        widths.append(y.shape[1])
        return y + shift

    for start, read in ((prefix, None), (prefix, batch.predict_EKT), (kept, batch.predict_EKT)):
        with rewritten({model.site(site): add}):
            hidden = model.suffix(start, read)
        states.append(gather_positions(hidden, batch.predict_EKT) if read is None else hidden)
        gradients += torch.autograd.grad(states[-1].square().sum(), shift)
    for some in (1, 2):
        torch.testing.assert_close(states[0], states[some], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients[0], gradients[some], rtol=1e-3, atol=1e-3)
    whole, read_alone = batch.tokens_EKS.shape[-1], batch.predict_EKT.shape[-1]
    # One matrix for queries, keys and values is run where keys are read.
    reads = read_alone if positionwise and site.startswith("layers.-1") and not site.endswith("qkv") else whole
    assert widths == [whole, reads, reads]
    assert kept.hidden_RSD.shape[1] == (read_alone if positionwise and site.startswith("layers.-1.ffn") else whole)


@torch.no_grad()
def check_target_states(model: Any, batch: EditBatch, editor: Editor, params: EditParams) -> None:
    """Checks that states from the KV cache equal those of whole sequences, under edits too."""
    draft_EKT = batch.target_EKT.flip(0).clamp(min=5)
    at_EKT = torch.where(batch.target_mask_EKT, batch.predict_EKT + 1, 0)
    kept = batch.tokens_EKS.gather(2, at_EKT)
    tokens_EKS = batch.tokens_EKS.scatter(2, at_EKT, torch.where(batch.target_mask_EKT, draft_EKT, kept))
    other = replace(batch, tokens_EKS=tokens_EKS)
    assert not torch.equal(other.tokens_EKS, batch.tokens_EKS)
    mask = batch.target_mask_EKT[..., 1:]
    for acting in (editor.applied, editor.together):
        kv_cache = KVCache()
        prefix = model.prefix(batch, *editor.sites, positionwise=editor.positionwise, kv_cache=kv_cache)
        with acting(model, params, batch):
            model.suffix(prefix, batch.predict_EKT, kv_cache)
            target = model.target_states(prefix, batch, draft_EKT, kv_cache)
            # Another draft with the same first token: states after that token, and all states.
            further_EKT = torch.cat([draft_EKT[..., :1], batch.target_EKT[..., 1:]], dim=-1)
            later, all_later = (model.target_states(prefix, batch, further_EKT, kv_cache, first) for first in (1, 0))
        with acting(model, params, other):
            whole = model.suffix(model.prefix(other, *editor.sites))
        whole = gather_positions(whole, other.predict_EKT)[..., 1:, :]
        assert bool(mask.any())
        torch.testing.assert_close(target[mask], whole[mask], rtol=2e-3, atol=2e-3)
        assert not torch.equal(all_later[..., 1:, :][mask[..., 1:]], target[..., 1:, :][mask[..., 1:]])
        torch.testing.assert_close(later[mask[..., 1:]], all_later[..., 1:, :][mask[..., 1:]], rtol=2e-3, atol=2e-3)
