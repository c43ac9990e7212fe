"""A step of decay and rows together: exactly where they commute, and split where they do not (a decay a key channel).

    Lie:     decay, then rows                      S⁺ = R(e^g S)               order 1; as in the models' own tokens
    Strang:  half the decay, rows, the other half  S⁺ = e^{g/2} R(e^{g/2} S)   order 2; its rows read the raw state

with ``R(S) = S + BΦ(AᵀS + Uᵀ)`` the rows' own step.

Source: Strang 1968, *On the construction and comparison of difference schemes*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallelflow.discretizations.base import Phi, Scheme, identity_like
from parallelflow.discretizations.rows import (
    Stack,
    compute_dtype,
    mixed,
    read_dot_write,
    rescaled,
    spread,
    value_heads,
)
from parallelflow.drivers.base import Factor, LowRankDriver, Row


def commuting(driver: LowRankDriver, scheme: Scheme) -> LowRankDriver:
    """The step of a driver with no decay or a scalar one, which commutes with the rows.

    A reset (-inf) is an event before the step and not a rate: the rows act for the whole step on the emptied state.
    """
    decay = driver.log_decay
    if decay is not None:
        decay = torch.where(decay == -torch.inf, 0, decay).to(compute_dtype(driver))
    return LowRankDriver(_stepped(driver, scheme, decay), driver.log_decay, driver.order)


def lie(driver: LowRankDriver, scheme: Scheme) -> LowRankDriver:
    """Decay, then rows."""
    return LowRankDriver(_stepped(driver, scheme, None), driver.log_decay, driver.order)


def strang(driver: LowRankDriver, scheme: Scheme) -> LowRankDriver:
    """Half the decay, rows, half the decay: ``S⁺ = e^g S + (e^{g/2} B) ((e^{g/2} Φ_a A)ᵀ S + Φ_u Uᵀ)``, raw reads.

    Sequential rows become simultaneous ones, ``(I - L)⁻¹`` of them, L the part of X below the diagonal. A reset belongs
    to the first half.
    """
    decay = driver.log_decay
    assert decay is not None
    half = decay.to(compute_dtype(driver)) / 2
    first, second = half.exp(), torch.where(half == -torch.inf, 0, half).exp()
    stepped = LowRankDriver(_stepped(driver, scheme, None), order=driver.order)
    rows = stepped.rows
    if driver.order == "sequential" and driver.rank > 1:
        stack = Stack(stepped)
        product = stack.product
        once = torch.linalg.inv(identity_like(product) - product.tril(-1))
        rows = mixed(stepped, stack, Phi(once, once))
    heads = value_heads(driver)

    def decayed(row: Row) -> Row:
        axis = row.write.ndim - 2
        before, after = (x.unsqueeze(2) if row.write.ndim == 5 else x for x in (first, second))
        write = (spread(row.write, heads, axis) * after).to(row.write.dtype)
        if row.read is None:
            return Row(write, None, row.value)
        vector, coefficient, sign = row.read
        if coefficient is None:
            return Row(write, Factor(vector, before.expand(*vector.shape[:axis], *before.shape[-2:]), sign), row.value)
        coefficient = spread(coefficient, heads, axis)
        coefficient = (coefficient if coefficient.ndim == vector.ndim else coefficient.unsqueeze(-1)) * before
        return Row(write, Factor(vector, coefficient, sign), row.value)

    return LowRankDriver(tuple(map(decayed, rows)), decay, reads="raw")


def _stepped(driver: LowRankDriver, scheme: Scheme, decay: Tensor | None) -> tuple[Row, ...]:
    """The rows' own step. ``decay [B, T, HV]`` or None: what the values see of it.

    One row a token, rows one after another, and rows that only write need a number each; simultaneous rows that read
    each other's writes a matrix. Sequential rows are already split from each other, and from the decay.
    """
    heads, dtype = value_heads(driver), compute_dtype(driver)
    sequential = driver.order == "sequential" and driver.rank > 1
    if sequential:
        decay = None
    if sequential or driver.rank == 1 or all(row.read is None for row in driver.rows):
        return tuple(_alone(row, scheme, decay, heads, dtype) for row in driver.rows)
    stack = Stack(driver)
    phi = scheme.matrix(stack.product, decay)
    return driver.rows if phi is None else mixed(driver, stack, phi)


def _alone(row: Row, scheme: Scheme, decay: Tensor | None, heads: int, dtype: torch.dtype) -> Row:
    if decay is not None and row.write.ndim == 5:
        decay = decay.unsqueeze(2)
    if row.read is None:
        if decay is None:  # Φ(0) is 1
            return row
        phi = scheme.scalar(torch.zeros_like(decay), decay)
        if phi is None:
            return row
        return rescaled(row, None, phi.value.expand(*row.write.shape[:-2], heads))
    phi = scheme.scalar(read_dot_write(row, heads, dtype), decay)
    return row if phi is None else rescaled(row, *phi)
