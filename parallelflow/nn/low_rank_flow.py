"""The paper's rank-R layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from parallelflow.checks import expect_choice, expect_flag, expect_kind, expect_positive_integer
from parallelflow.discretizations import Discretization
from parallelflow.discretizations.discretize import ONE_NODE
from parallelflow.functional import low_rank_flow
from parallelflow.nn.engine import check_engine
from parallelflow.nn.gated_delta_net import GatedDeltaNet
from parallelflow.nn.layer import AnyResult


class LowRankFlow(GatedDeltaNet):
    """``dS = Σ_j β_tj b_tj (v_tj - a_tj^T S)ᵀ dt`` over a token, R rows at once, stepped by any scheme.

    Writes b and reads a are normalised keys; Euler's step is ``S_t = e^{g_t} S_{t-1} + Σ_j β_tj b_tj (v_tj -
    a_tjᵀ e^{g_t} S_{t-1})ᵀ``.

    Args:
        rank: R.
        tied: whether reads are the writes, ``a = b``: a generator that only forgets, so that the exact flow is stable.
            Otherwise ``k_proj`` makes both, writes first: any matrix of rank R, rotations too.
        discretization: ``euler``, ``backward_euler``, ``cayley``, ``rk4``, ``exact``, or a ``Discretization``.
        options: of ``GatedDeltaNet``.

    Source: Muca Cirone and Salvi, *ParallelFlow* (arXiv 2504.00492), section 3.
    """

    def __init__(
        self, hidden_size: int, *, rank: int = 2, tied: bool = False, discretization: Any = "exact", **options: Any
    ) -> None:
        expect_positive_integer("rank", rank)
        expect_flag("tied", tied)
        super().__init__(hidden_size, rows=rank, key_rows=rank if tied else 2 * rank, **options)
        self.tied = tied
        check_engine(self.engine, taken=("discretization",))
        chosen = Discretization(discretization) if isinstance(discretization, str) else discretization
        expect_kind("discretization", chosen, Discretization, f"a Discretization or one of {', '.join(ONE_NODE)}")
        expect_choice("discretization", chosen.scheme, ONE_NODE)
        self.engine = {"discretization": discretization, **self.engine}

    def flow(self, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AnyResult:
        beta = self.beta(hidden_states).unflatten(-1, (self.rows, -1)).unsqueeze(-1)
        write, read = (key, key) if self.tied else key.chunk(2, 2)
        query, write, read = (F.normalize(x, dim=-1, eps=1e-6) for x in (query, write, read))
        group = self.num_value_heads // self.num_heads
        read = -beta.to(read.dtype) * read.repeat_interleave(group, 3)
        value = beta.to(value.dtype) * value
        return low_rank_flow(query, value, self.log_decay(hidden_states), read=read, write=write, **options)
