"""The exponential of a low-rank exponent; and Magnus' expansion of order 4, which is one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi, identity_like
from parallelflow.discretizations.phi import phi1_matrix
from parallelflow.discretizations.rows import Stack, compute_dtype, mixed, spread, value_heads
from parallelflow.discretizations.source import DriverSource
from parallelflow.drivers.base import LowRankDriver

NODES = (0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6)
"""Gauss' two nodes on [0, 1]."""


def exponential_phi(product: Tensor, weights: Tensor, value_weights: Tensor, log_decay: Tensor | None) -> Phi:
    """Φ of the flow ``exp [[γI + B C Aᵀ, B C_u Uᵀ], [0, 0]]`` of a system that reads through A, writes along B:

        S⁺ = e^γ S + B (φ1(CM) C Aᵀ e^γ S + φ1(γI + CM) C_u Uᵀ),     M = AᵀB

    ``product`` (M), ``weights`` (C) and ``value_weights`` (C_u) ``[..., R, R]``, ``log_decay`` (γ) ``[...]`` or None.
    ``C = C_u = I`` is the exact flow.
    """
    inner = weights @ product
    read = phi1_matrix(inner)
    shifted = read if log_decay is None else phi1_matrix(inner + log_decay[..., None, None] * identity_like(inner))
    return Phi(read @ weights, shifted @ value_weights)


def check_decay(name: str, driver: LowRankDriver) -> None:
    """ValueError for what has no low-rank exponent: a decay a channel, and rows one after another."""
    if driver.log_decay is not None and driver.log_decay.ndim == 4:
        raise ValueError(
            f"discretization: got {name!r} with a log-decay a key channel, whose commutators with the rows are not of "
            "low rank; expected none or one a head, or discretization=Discretization('exact', splitting='strang')"
        )
    if driver.order == "sequential" and driver.rank > 1:
        raise ValueError(f"discretization: got {name!r} with sequential rows, expected order='simultaneous'")


def magnus4(source: DriverSource) -> LowRankDriver:
    """The exponential of Magnus' expansion to order 4, from the rates at Gauss' two nodes of every step h.

        Ω = h/2 (ω1 + ω2) + c [ω2, ω1],   c = √3 h²/12,   ω_i = (g_i + B_i A_iᵀ,  B_i U_iᵀ), an affine system

    stays of rank 2R, with both nodes' rows side by side: ``C = [[h/2, -c A1ᵀB2], [c A2ᵀB1, h/2]]``,
    ``C_u = C + diag(c g2, -c g1)`` (the commutator of the decay with the values), ``γ = h/2 (g1 + g2)``.
    On rates that do not change it is the exact flow. Rates are finite: a reset is no rate.

    Raises:
        ValueError: for a decay a key channel, and for sequential rows.

    Source: Blanes, Casas, Oteo and Ros 2009, *The Magnus expansion and some of its applications*, section 5.4.
    """
    first, second = (source.at(node) for node in NODES)
    for driver in (first, second):
        check_decay("magnus4", driver)
    if first.rank != second.rank or (first.log_decay is None) != (second.log_decay is None):
        raise ValueError("rates: returned drivers of another rank or decay at another time, expected the same")
    both = LowRankDriver(first.rows + second.rows)
    heads = max(value_heads(first), value_heads(second))
    dtype = torch.promote_types(compute_dtype(first), compute_dtype(second))
    stack = Stack(both, heads, dtype)
    product, rank = stack.product, first.rank
    step = source.per_token(first).to(dtype).unsqueeze(-1)  # [B, T, 1]
    curvature = math.sqrt(3) / 12 * step.square()

    identity = identity_like(product)
    node = torch.arange(2 * rank, device=product.device) // rank  # whose rows these are
    commutator = (node[:, None] - node) * product
    weights = step[..., None, None] / 2 * identity + curvature[..., None, None] * commutator
    value_weights, decay = weights, None
    if first.log_decay is not None and second.log_decay is not None:
        g1, g2 = (spread(rate.to(dtype), heads, 2) for rate in (first.log_decay, second.log_decay))
        decay = step / 2 * (g1 + g2)
        bends = torch.stack((curvature * g2, -curvature * g1), -1).repeat_interleave(rank, -1)
        value_weights = weights + torch.diag_embed(bends)
    phi = exponential_phi(product, weights, value_weights, decay)
    return LowRankDriver(mixed(both, stack, phi), decay)
