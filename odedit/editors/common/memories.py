"""Key-value memories: neurons beside a feed-forward half, and remembered states that positions attend over.

References:
    arXiv 2409.19872, eq. 2, 3 and 7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_NOISE_SEED = 0


def attend(query_GND: Tensor, memory_GMD: Tensor, count: int) -> Tensor:
    """What each query finds among the `count` remembered states of highest cosine: `softmax(q M^T / sqrt(D)) M`.

    Args:
        query_GND: States of G groups.
        memory_GMD: Keys and values at once; a row of zeros is absent.

    Returns:
        `(G, N, D)`; zeros for a group whose memory is empty.
    """
    present_G1M = (memory_GMD != 0).any(dim=-1).unsqueeze(1)
    logits_GNM = query_GND @ memory_GMD.transpose(1, 2) / math.sqrt(query_GND.shape[-1])
    kept_GNM = present_G1M.expand_as(logits_GNM)
    if memory_GMD.shape[1] > count:
        # The query's own length does not change the order of its cosines.
        length_G1M = memory_GMD.norm(dim=-1).unsqueeze(1).clamp(min=1e-12)
        cosine_GNM = (logits_GNM.detach() / length_G1M).masked_fill(~kept_GNM, -torch.inf)
        kept_GNM = kept_GNM & (cosine_GNM >= cosine_GNM.topk(count, dim=-1).values[..., -1:])
    weight_GNM = logits_GNM.masked_fill(~kept_GNM, torch.finfo(logits_GNM.dtype).min).softmax(dim=-1)
    return weight_GNM @ memory_GMD


def blend(states_GND: Tensor, found_GND: Tensor, alpha_GN: Tensor) -> Tensor:
    """Turns each state towards what it found by the share alpha; its norm stays."""
    alpha_GN1 = alpha_GN.unsqueeze(-1)
    direction_GND = (1 - alpha_GN1) * F.normalize(states_GND, dim=-1) + alpha_GN1 * F.normalize(found_GND, dim=-1)
    return states_GND.norm(dim=-1, keepdim=True) * F.normalize(direction_GND, dim=-1)


def neurons(entering_GND: Tensor, keys_GHD: Tensor, bias_GH: Tensor, values_GHD: Tensor) -> Tensor:
    """`relu(q K^T + b) V`, what H neurons per group add to a feed-forward half; one of zeros adds nothing."""
    return (entering_GND @ keys_GHD.transpose(1, 2) + bias_GH.unsqueeze(1)).relu() @ values_GHD


def starting_keys(entering_ETD: Tensor, mask_ET: Tensor, count: int, sharpness: float, noise: float) -> Tensor:
    """Keys of `count` neurons, `(E, count, D)`; number i stands for answer token i modulo their number.

    With the bias `1 - sharpness` it answers 1 to the state that predicts its token, but for the noise.

    Args:
        entering_ETD: The states that predict the T answer tokens, as they enter the feed-forward half.
        noise: Standard deviation of the first answers, so that neurons of one token do not learn alike.
    """
    token_EH = torch.arange(count, device=mask_ET.device) % mask_ET.sum(dim=1, keepdim=True).clamp(min=1)
    state_EHD = take(entering_ETD, token_EH)
    length_EH1 = state_EHD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    # The same for every edit, whatever its batch.
    drawn_HD = torch.randn(count, entering_ETD.shape[-1], generator=torch.Generator().manual_seed(_NOISE_SEED))
    return (sharpness * state_EHD / length_EH1 + noise * drawn_HD.to(state_EHD)) / length_EH1


def last_positions(real_ES: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` real positions of each row in order, padded with 0, and which of them there are."""
    lengths_E1 = real_ES.sum(dim=1, keepdim=True)
    offset_M = torch.arange(min(count, int(lengths_E1.max())), device=real_ES.device)
    position_EM = (lengths_E1 - count).clamp(min=0) + offset_M
    is_there_EM = position_EM < lengths_E1
    return position_EM * is_there_EM, is_there_EM


def take(states_ESD: Tensor, position_EM: Tensor) -> Tensor:
    return states_ESD.gather(1, position_EM.unsqueeze(-1).expand(-1, -1, states_ESD.shape[-1]))
