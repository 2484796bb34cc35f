"""R_gen: distance between the hidden states of an edit and of its rephrase (arXiv 2601.19700, eq. 2-6).

Four variants, as in the paper's Table 4: `mmd2_rbf` with one rephrase (MMD-s) or several (MMD-m: concatenate their
states and masks along S), `mmd2_linear`, and `contrastive`. Each also returns its scale gradient (see
`odedit.risks.risks`), in which w multiplies the states of both sides.

Risks are per edit, and leading dimensions are free: the suffix `ETD` stands for `(..., T, D)`. T and S may differ.
Half-precision states are computed in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from odedit.risks.risks import Risk, upcast

BANDWIDTH_MULTIPLIERS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Ratios sigma_q^2 / sigma_0^2: the usual five octaves of a multi-kernel MMD. The paper states none."""


def mean_squared_distance(states_ND: Tensor) -> Tensor:
    """Base bandwidth sigma_0^2, a scalar: the mean of `|z_i - z_j|^2` over all pairs i != j.

    Measure it once, on a few hundred unedited states of edits and rephrases. It needs no pairwise matrix, since
    `sum_{i<j} |z_i - z_j|^2 = N sum_i |z_i - mean|^2`.

    Raises:
        ValueError: Fewer than two states.

    >>> mean_squared_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor(25.)
    """
    num_states = states_ND.shape[0]
    if num_states < 2:
        raise ValueError(f"states: got {num_states} of them, expected at least 2 to measure a distance.")
    states_ND = upcast(states_ND)
    return 2.0 * (states_ND - states_ND.mean(0)).square().sum() / (num_states - 1)


def bandwidths(sigma2_0: Tensor | float, multipliers: Sequence[float] = BANDWIDTH_MULTIPLIERS) -> Tensor:
    """Squared bandwidths sigma_q^2 = sigma_0^2 * multiplier_q, `(Q,)`.

    Raises:
        ValueError: No multiplier, or a number that is not positive and finite.
    """
    if not multipliers or not all(0.0 < value < float("inf") for value in multipliers):
        raise ValueError(f"multipliers: got {list(multipliers)}, expected at least one, each positive and finite.")
    base = float(sigma2_0)
    if not 0.0 < base < float("inf"):
        raise ValueError(f"sigma2_0: got {base}, expected a positive finite number; are all the states equal?")
    device = sigma2_0.device if isinstance(sigma2_0, Tensor) else None
    return base * torch.tensor(tuple(multipliers), dtype=torch.float32, device=device)


def mmd2_rbf(x_ETD: Tensor, y_ESD: Tensor, x_mask_ET: Tensor, y_mask_ES: Tensor, sigma2_Q: Tensor) -> Risk:
    """Squared MMD between two clouds of hidden states with `k(a, b) = sum_q exp(-|a - b|^2 / (2 sigma_q^2))`.

    The biased V-statistic, which is never negative and, as short answers need, defined for a single token. The
    unbiased estimate is neither.

    Args:
        x_ETD: States of the edit.
        y_ESD: States of its rephrase, or of several, concatenated.
        x_mask_ET: True at real states of `x_ETD`. An edit without real states on one side has risk and gradient 0.
        y_mask_ES: True at real states of `y_ESD`.
        sigma2_Q: Squared bandwidths, constants from `bandwidths`. If they were measured on this pair, as is common,
            the loss would be constant at T = S = 1, and its scale gradient 0.
    """
    with torch.autocast(x_ETD.device.type, enabled=False):
        cloud_END, weight_EN = _pooled_cloud(x_ETD, y_ESD, x_mask_ET, y_mask_ES)
        distance_ENN = _squared_distances(cloud_END, weight_EN)
        exponent_ENNQ = distance_ENN.unsqueeze(-1) / (2.0 * sigma2_Q.detach().to(distance_ENN))
        kernel_ENNQ = torch.exp(-exponent_ENNQ)
        value_E = _quadratic(weight_EN, kernel_ENNQ.sum(-1))
        # d/dw exp(-w^2 d^2 / (2 sigma^2)) at w = 1 is -(d^2 / sigma^2) exp(-d^2 / (2 sigma^2)).
        gradient_E = _quadratic(weight_EN, (-2.0 * exponent_ENNQ * kernel_ENNQ).sum(-1))
        return Risk(value_E, gradient_E)


def mmd2_linear(x_ETD: Tensor, y_ESD: Tensor, x_mask_ET: Tensor, y_mask_ES: Tensor) -> Risk:
    """Squared MMD with the linear kernel: the squared distance between the two mean states.

    Quadratic in w, hence a scale gradient of twice the value. Arguments as in `mmd2_rbf`.
    """
    present_E = x_mask_ET.any(-1) & y_mask_ES.any(-1)
    difference_ED = _pool(x_ETD, x_mask_ET) - _pool(y_ESD, y_mask_ES)
    value_E = difference_ED.square().sum(-1).masked_fill(~present_E, 0.0)
    return Risk(value_E, 2.0 * value_E)


def contrastive(
    x_ETD: Tensor,
    y_ESD: Tensor,
    negatives_EKSD: Tensor,
    x_mask_ET: Tensor,
    y_mask_ES: Tensor,
    negatives_mask_EKS: Tensor,
    temperature: float = 0.1,
) -> Risk:
    """Instance-level InfoNCE of mean states: edit against rephrase, with the edit's locality prompts as negatives.

    `-log( exp(s(x, y)/tau) / (exp(s(x, y)/tau) + sum_k exp(s(x, n_k)/tau)) )` with cosine similarity s. Negatives
    come from the same edit, so that its result does not depend on the batch.

    The scale gradient is exactly 0, since a cosine does not change with scale: the generality environment adds nothing
    to the invariance penalty.

    Args:
        x_ETD: States of the edit.
        y_ESD: States of its rephrase.
        negatives_EKSD: States of K other sequences of the same edit.
        x_mask_ET: True at real states of `x_ETD`. An edit without real states on one side has risk and gradient 0.
        y_mask_ES: True at real states of `y_ESD`.
        negatives_mask_EKS: True at real states of `negatives_EKSD`. Without any negative the risk is 0.
        temperature: Temperature tau. The paper states none; 0.1 is common.

    Raises:
        ValueError: The temperature is not positive.

    References:
        "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, eq. 4.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number.")
    x_ED = functional.normalize(_pool(x_ETD, x_mask_ET), dim=-1)
    y_ED = functional.normalize(_pool(y_ESD, y_mask_ES), dim=-1)
    negatives_EKD = functional.normalize(_pool(negatives_EKSD, negatives_mask_EKS), dim=-1)
    positive_E1 = (x_ED * y_ED).sum(-1, keepdim=True) / temperature
    negative_EK = (x_ED.unsqueeze(-2) * negatives_EKD).sum(-1) / temperature
    negative_EK = negative_EK.masked_fill(~negatives_mask_EKS.any(-1), -torch.inf)
    value_E = torch.cat([positive_E1, negative_EK], dim=-1).logsumexp(-1) - positive_E1.squeeze(-1)
    value_E = value_E.masked_fill(~(x_mask_ET.any(-1) & y_mask_ES.any(-1)), 0.0)
    return Risk(value_E, torch.zeros_like(value_E))


def _pool(states_ETD: Tensor, mask_ET: Tensor) -> Tensor:
    """Mean over real states, `(E, D)`; 0 for an empty mask."""
    total_ED = upcast(states_ETD).masked_fill(~mask_ET.unsqueeze(-1), 0.0).sum(-2)
    return total_ED / mask_ET.sum(-1, keepdim=True).clamp_min(1)


def _pooled_cloud(x_ETD: Tensor, y_ESD: Tensor, x_mask_ET: Tensor, y_mask_ES: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds concatenated, N = T + S, and weights c such that `MMD^2 = c' K c`.

    A state of x weighs 1/|x|, a state of y -1/|y|, and padding 0, so that the quadratic form is
    mean k(X, X) + mean k(Y, Y) - 2 mean k(X, Y).
    """
    cloud_END = torch.cat([upcast(x_ETD), upcast(y_ESD)], dim=-2)
    x_weight_ET = x_mask_ET.to(cloud_END.dtype) / x_mask_ET.sum(-1, keepdim=True).clamp_min(1)
    y_weight_ES = y_mask_ES.to(cloud_END.dtype) / y_mask_ES.sum(-1, keepdim=True).clamp_min(1)
    present_E1 = x_mask_ET.any(-1, keepdim=True) & y_mask_ES.any(-1, keepdim=True)
    weight_EN = torch.cat([x_weight_ET, -y_weight_ES], dim=-1) * present_E1
    real_EN = torch.cat([x_mask_ET, y_mask_ES], dim=-1)
    return cloud_END.masked_fill(~real_EN.unsqueeze(-1), 0.0), weight_EN


def _squared_distances(cloud_END: Tensor, weight_EN: Tensor) -> Tensor:
    """Pairwise `|z_i - z_j|^2`, `(E, N, N)`, through the Gram matrix: no `(N, N, D)` tensor, no square root.

    Subtracting a constant centre changes no distance and avoids cancellation, as it keeps the Gram matrix of the
    magnitude of the distances. Squared norms are its diagonal, so that a state's distance to itself is exactly 0.
    """
    share_EN = weight_EN.abs()
    centre_E1D = (share_EN.unsqueeze(-2) @ cloud_END.detach()) / share_EN.sum(-1)[..., None, None].clamp_min(1.0)
    centred_END = cloud_END - centre_E1D
    gram_ENN = centred_END @ centred_END.transpose(-1, -2)
    norm_EN = gram_ENN.diagonal(dim1=-2, dim2=-1)
    return norm_EN.unsqueeze(-1) + norm_EN.unsqueeze(-2) - 2.0 * gram_ENN


def _quadratic(weight_EN: Tensor, matrix_ENN: Tensor) -> Tensor:
    """Quadratic form `c' M c`, `(E,)`."""
    return (weight_EN.unsqueeze(-1) * matrix_ENN * weight_EN.unsqueeze(-2)).sum((-1, -2))
