"""DeltaNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parallelflow.checks import expect_flag
from parallelflow.functional import delta_rule
from parallelflow.nn.layer import AnyResult
from parallelflow.nn.query_key_value import QueryKeyValueLayer


class DeltaNet(QueryKeyValueLayer):
    """``S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ`` with ``β = sigmoid(W_b x)`` and normalised queries and keys.

    Args:
        negative_eigenvalues: β is doubled, so that ``I - β k kᵀ`` may reflect (Grazzi et al. 2024, arXiv 2411.12537).
        options: of ``QueryKeyValueLayer``.

    Source: Yang, Wang, Zhang, Shen and Kim 2024, arXiv 2406.06484; names of flash-linear-attention's ``DeltaNet``.
    """

    def __init__(self, hidden_size: int, *, negative_eigenvalues: bool = False, **options: Any) -> None:
        expect_flag("negative_eigenvalues", negative_eigenvalues)
        super().__init__(hidden_size, **options)
        self.negative_eigenvalues = negative_eigenvalues
        self.b_proj = nn.Linear(hidden_size, self.rows * self.num_value_heads, bias=False)

    def beta(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, R · HV]``, in (0, 1) or (0, 2)."""
        beta = self.b_proj(hidden_states).sigmoid()
        return 2 * beta if self.negative_eigenvalues else beta

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        return delta_rule(query, key, value, self.beta(hidden_states), normalize_query_key=True, **options)
