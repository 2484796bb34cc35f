"""Knowledge as key-value pairs (UniKE): extra neurons of a feed-forward network, and stored states to attend over.

References:
    arXiv 2409.19872, eq. 2, 3 and 7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_NOISE_SEED = 0


def attend(query_GND: Tensor, stored_GMD: Tensor, count: int) -> Tensor:
    """Attention over the `count` stored states of highest cosine: `softmax(q M^T / sqrt(D)) M` (eq. 2).

    Args:
        query_GND: Queries of G groups.
        stored_GMD: Stored states M of each group, both keys and values; a row of zeros is padding.
        count: Largest number of states that a query attends over.

    Returns:
        Attended states `(G, N, D)`; zeros for a group without stored states.
    """
    present_G1M = (stored_GMD != 0).any(dim=-1).unsqueeze(1)
    logits_GNM = query_GND @ stored_GMD.transpose(1, 2) / math.sqrt(query_GND.shape[-1])
    kept_GNM = present_G1M.expand_as(logits_GNM)
    if stored_GMD.shape[1] > count:
        # The norm of a query does not change the order of its cosines.
        length_G1M = stored_GMD.norm(dim=-1).unsqueeze(1).clamp(min=1e-12)
        cosine_GNM = (logits_GNM.detach() / length_G1M).masked_fill(~kept_GNM, -torch.inf)
        kept_GNM = kept_GNM & (cosine_GNM >= cosine_GNM.topk(count, dim=-1).values[..., -1:])
    weight_GNM = logits_GNM.masked_fill(~kept_GNM, torch.finfo(logits_GNM.dtype).min).softmax(dim=-1)
    return weight_GNM @ stored_GMD


def blend(states_GND: Tensor, attended_GND: Tensor, alpha_GN: Tensor, *, keeps_norm: bool = True) -> Tensor:
    """Turns each state towards its attended state by the share alpha (eq. 7).

    Args:
        keeps_norm: True gives the result the norm of the state; False leaves the sum of the two unit vectors, weighted
            by 1 - alpha and alpha, as the public code does.
    """
    alpha_GN1 = alpha_GN.unsqueeze(-1)
    direction_GND = (1 - alpha_GN1) * F.normalize(states_GND, dim=-1) + alpha_GN1 * F.normalize(attended_GND, dim=-1)
    if not keeps_norm:
        return direction_GND
    return states_GND.norm(dim=-1, keepdim=True) * F.normalize(direction_GND, dim=-1)


def neurons(entering_GND: Tensor, keys_GHD: Tensor, bias_GH: Tensor, values_GHD: Tensor) -> Tensor:
    """Output of H extra neurons per group, `relu(q K^T + b) V` (eq. 3); a neuron of zeros adds nothing."""
    return (entering_GND @ keys_GHD.transpose(1, 2) + bias_GH.unsqueeze(1)).relu() @ values_GHD


def starting_keys(entering_ETD: Tensor, mask_ET: Tensor, count: int, sharpness: float, noise: float) -> Tensor:
    """Initial keys of `count` neurons, `(E, count, D)`; neuron i belongs to answer token i modulo their number.

    With the bias `1 - sharpness`, a neuron's activation at the state that predicts its token is 1, apart from noise.

    Args:
        entering_ETD: Input of the feed-forward network at the positions that predict the T answer tokens.
        mask_ET: True at answer tokens.
        count: Number of neurons.
        sharpness: Slope of the activation in the cosine to the token's state.
        noise: Standard deviation of the initial activations, so that neurons of one token learn differently.
    """
    token_EH = torch.arange(count, device=mask_ET.device) % mask_ET.sum(dim=1, keepdim=True).clamp(min=1)
    state_EHD = take(entering_ETD, token_EH)
    length_EH1 = state_EHD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    # The same draw for every edit, so that it does not depend on the batch.
    drawn_HD = torch.randn(count, entering_ETD.shape[-1], generator=torch.Generator().manual_seed(_NOISE_SEED))
    return (sharpness * state_EHD / length_EH1 + noise * drawn_HD.to(state_EHD)) / length_EH1


def last_positions(real_ES: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` real positions of each row, in order.

    Returns:
        Positions `(E, M)`, padded with 0, and their presence `(E, M)` bool.
    """
    lengths_E1 = real_ES.sum(dim=1, keepdim=True)
    offset_M = torch.arange(min(count, int(lengths_E1.max())), device=real_ES.device)
    position_EM = (lengths_E1 - count).clamp(min=0) + offset_M
    is_present_EM = position_EM < lengths_E1
    return position_EM * is_present_EM, is_present_EM


def take(states_ESD: Tensor, position_EM: Tensor) -> Tensor:
    """The states at these positions, `(E, M, D)`."""
    return states_ESD.gather(1, position_EM.unsqueeze(-1).expand(-1, -1, states_ESD.shape[-1]))
