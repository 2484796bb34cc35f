"""Ridge regression of values on keys with a cost for what unedited activations would change; in float64.

The write of MEMIT (arXiv 2210.07229, eq. 14) is this regression. With a null space, the solution changes nothing in the
directions of unedited activations, as in AlphaEdit (arXiv 2410.02355, eq. 11); here it is solved within that space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odedit.errors import InputError
from odedit.runtime import parallel
from odedit.runtime.brief import brief


@dataclass
class NormalEquations:
    """Sums over keys k of weight w and their values v, from which the regression is solved.

    Attributes:
        gram_II: Sum of w k k^T.
        cross_DI: Sum of w v k^T.
    """

    gram_II: Tensor
    cross_DI: Tensor

    __repr__ = brief

    @classmethod
    def empty(cls, width_in: int, width_out: int, device: torch.device | str = "cpu") -> NormalEquations:
        """Sums over no keys."""
        zeros = torch.zeros(width_in + width_out, width_in, dtype=torch.float64, device=device)
        return cls(zeros[:width_in], zeros[width_in:])

    def add(self, keys_MI: Tensor, values_MD: Tensor, weights_M: Tensor) -> None:
        """Adds M keys with their values and weights."""
        weighed_MI = keys_MI.double() * weights_M.double().unsqueeze(1)
        self.gram_II += weighed_MI.T @ keys_MI.double()
        self.cross_DI += values_MD.double().T @ weighed_MI

    def summed(self) -> NormalEquations:
        """The sums over the keys of all workers."""
        gram_II, cross_DI = (value * parallel.count() for value in parallel.mean([self.gram_II, self.cross_DI]))
        return NormalEquations(gram_II, cross_DI)

    def solved(self, cost_II: Tensor, ridge: float, null_space: Tensor | None = None) -> Tensor:
        """The matrix W that minimises sum w |W k - v|^2 + tr(W C W^T) + rho |W|^2, `(D, I)`.

        Args:
            cost_II: C, symmetric, without negative eigenvalues.
            ridge: rho as a share of the mean diagonal entry of the other terms; above 0.
            null_space: Orthonormal directions `(I, M)` within whose span the rows of W lie; None: all.
        """
        matrix_II = self.gram_II + cost_II.to(self.gram_II)
        rho = ridge * matrix_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        matrix_II = matrix_II + rho * torch.eye(len(matrix_II), dtype=torch.float64, device=matrix_II.device)
        basis_IM = None if null_space is None else null_space.to(matrix_II)
        cross_DM = self.cross_DI if basis_IM is None else self.cross_DI @ basis_IM
        within_MM = matrix_II if basis_IM is None else basis_IM.T @ matrix_II @ basis_IM
        solution_DM = torch.cholesky_solve(cross_DM.T, torch.linalg.cholesky(within_MM)).T
        return solution_DM if basis_IM is None else solution_DM @ basis_IM.T


def null_space(moment_II: Tensor, threshold: float) -> Tensor:
    """Eigenvectors of a second moment with eigenvalues of at most `threshold` times the largest, `(I, M)`.

    Raises:
        InputError: There is none.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II.double())
    is_null_I = values_I <= threshold * values_I[-1]
    if not bool(is_null_I.any()):
        share = float(values_I[0] / values_I[-1])
        raise InputError(
            f"commit.null_space: got {threshold:g}, and no direction of the unedited activations is that weak; the "
            f"weakest has {share:.2g} of the strongest. Set a larger value, or null."
        )
    return vectors_II[:, is_null_I]
