"""DeltaProduct, gated or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parallelflow.checks import expect_positive_integer
from parallelflow.functional import delta_product
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.layer import AnyResult


class DeltaProduct(GatedDeltaNet):
    """``S ← e^{g_t} S``, then R times ``S ← (I - β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ``.

    Args:
        num_householder: R, the steps a token.
        negative_eigenvalues: β in (0, 2), unless False: in (0, 1).
        options: of ``GatedDeltaNet``; ``forget_gate=False`` is DeltaProduct without a decay.

    Source: Siems et al. 2025, arXiv 2502.10297; names of flash-linear-attention's ``GatedDeltaProduct``.
    """

    def __init__(
        self, hidden_size: int, *, num_householder: int = 2, negative_eigenvalues: bool = True, **options: Any
    ) -> None:
        expect_positive_integer("num_householder", num_householder)
        super().__init__(
            hidden_size, rows=num_householder, negative_eigenvalues=negative_eigenvalues, **options
        )  # fmt: skip

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        beta = self.beta(hidden_states).unflatten(-1, (self.rows, -1))
        return delta_product(
            query, key, value, beta, self.log_decay(hidden_states), normalize_query_key=True, **options
        )  # fmt: skip
