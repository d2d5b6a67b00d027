"""What a router is told of its solver, and each solver by it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from optimized.ops.capped_simplex import capped_simplex
from optimized.ops.coordinate_descent import coordinate_descent

# Of the schemas of operators that take a `Solver`.
SOLVER = "float ratio, bool straight_through, str solver, int n_iters, float eps, float eps_init, float eps_decay"


class Solver(NamedTuple):
    """Options of a router's scores, in the order of an operator's arguments."""

    ratio: float  # mass of the soft scores over K
    straight_through: bool  # scores of 1 with the gradient of the soft ones
    solver: (
        str  # iterative: `ops.coordinate_descent`; exact: `ops.capped_simplex`; sigmoid: of each logit, solves nothing
    )
    n_iters: int
    eps: float
    eps_init: float
    eps_decay: float

    @classmethod
    def of(cls, a: Any) -> Solver:
        """From the arguments of an operator."""
        return cls(a.ratio, a.straight_through, a.solver, a.n_iters, a.eps, a.eps_init, a.eps_decay)

    @property
    def exact(self) -> bool:
        return self.solver == "exact"

    @property
    def sigmoid(self) -> bool:
        """Whether a score depends on its own logit alone: so it has a gradient where nothing is to be chosen, too."""
        return self.solver == "sigmoid"

    @property
    def stateless(self) -> bool:
        """Whether the forward solves nothing, and leaves nothing to its backward."""
        return self.straight_through or self.sigmoid

    def solve(
        self, logits: Tensor, mask: Tensor | None, ks: tuple[int, ...], triton: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Soft scores, and what their backward needs: iterates and counts, or a threshold and nothing.

        ks: K of the rows, or by Triton of two groups of experts.
        """
        k = self._mass(ks, logits)
        if self.exact:
            return *capped_simplex.raw(logits, mask, k, self.eps, triton), logits.new_empty(0)  # type: ignore[attr-defined]
        return coordinate_descent.raw(logits, mask, k, self.n_iters, *self._epsilons(), triton)  # type: ignore[attr-defined]

    def backward(
        self, grad: Tensor, logits: Tensor, mask: Tensor | None, k: int, solved: tuple[Tensor, ...], triton: bool
    ) -> Tensor:
        """Gradient of the logits (B, E, N) from that of the soft scores."""
        mass = self._mass((k,), logits)
        assert capped_simplex.backward is not None
        assert coordinate_descent.backward is not None
        if self.exact:
            return capped_simplex.backward.raw(grad, logits, mask, *solved[:2], mass, self.eps, triton, 1)  # type: ignore[attr-defined]
        constants = mass, self.n_iters, *self._epsilons(), triton
        return coordinate_descent.backward.raw(grad, logits, mask, *solved, *constants, 1)  # type: ignore[attr-defined]

    def picked_backward(
        self,
        grads: tuple[Tensor, ...],
        inverses: tuple[Tensor, ...],
        dlogits: Tensor | None,
        logits: Tensor,
        mask: Tensor | None,
        ks: tuple[int, ...],
        solved: tuple[Tensor, ...],
    ) -> Tensor:
        """By Triton, from the gradients of one or two groups' picked scores (B, E, K), and from dlogits."""
        from optimized.kernels import capped_simplex, coordinate_descent, sigmoid

        if self.sigmoid:
            return sigmoid.sigmoid_picked_backward(grads, inverses, dlogits, logits)
        given = grads, inverses, dlogits, logits, mask
        if self.exact:
            return capped_simplex.capped_simplex_picked_backward(*given, *solved[:2], self.eps)  # type: ignore[call-arg, arg-type]
        return coordinate_descent.coordinate_descent_picked_backward(
            *given, solved, self._mass(ks, logits), self._epsilons()
        )

    def _mass(self, ks: tuple[int, ...], logits: Tensor) -> Any:
        masses = tuple([float(min(k * self.ratio, logits.shape[-1])) for k in ks])
        return masses if len(masses) > 1 else masses[0]

    def _epsilons(self) -> tuple[float, float, float]:
        return self.eps, self.eps_init, self.eps_decay
