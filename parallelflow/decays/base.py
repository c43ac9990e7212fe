"""What every decay provides."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from parallelflow.decays.rows import Rows, Scaled

FLOOR = -800.0  # e^-800 is 0 in float64 too: a reset (-inf) is clamped here so that differences stay finite


def accurate(device: torch.device) -> torch.dtype:
    """The widest dtype there is: float64, but float32 on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Decay(ABC):
    """The decay inside chunks. Gradients with respect to the log-decay gather in ``pulled`` as adjoints of ``c``.

    What the ``pull`` methods take as ``gradient`` is given up to them.
    """

    rowwise: bool  # its factors are numbers a row: the vectors stay as they are

    def __init__(self, heads: int) -> None:
        self.heads = heads  # HV

    @abstractmethod
    def gram(self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor) -> Tensor:
        """``M[p, q] = mask · scalar_p Σ_k left_p[k] right_q[k] e^{r_p[k] - c_q[k]}``, ``[M, HV, n, m]``."""

    @abstractmethod
    def pull_gram(
        self, left: Tensor, scalars: Tensor | None, right: Tensor, of: Rows, to: Rows, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Adjoint of ``gram``: gradients of ``left``, ``scalars`` and ``right``. Entries of ``gradient`` outside the
        mask may be anything finite."""

    @abstractmethod
    def from_start(self, rows: Rows, vectors: Tensor, scalars: Tensor | None) -> Scaled:
        """``scalar · vector ⊙ e^{r_p}``: rows as they see the state at the chunk's start."""

    @abstractmethod
    def pull_from_start(
        self, rows: Rows, vectors: Tensor, scalars: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Adjoint of ``from_start`` given that of its dense form: gradients of ``vectors`` and ``scalars``."""

    @abstractmethod
    def to_end(self, rows: Rows, vectors: Tensor) -> Scaled:
        """``vector ⊙ e^{c_C - c_q}``: rows as the state at the chunk's end keeps them."""

    @abstractmethod
    def pull_to_end(self, rows: Rows, vectors: Tensor, gradient: Tensor) -> Tensor:
        """Adjoint of ``to_end`` given that of its dense form."""

    @abstractmethod
    def total(self) -> Tensor | None:
        """``Λ = e^{c_C}``: None (no decay), ``[M, HV]``, or ``[M, HV, K]``."""

    @abstractmethod
    def pull_total(self, diagonal: Tensor) -> None:
        """Adjoint of ``total`` given ``diag(dS_out S_0ᵀ) [M, HV, K]``."""

    @abstractmethod
    def pull(self) -> Tensor | None:
        """The gradient of the log-decay, from all adjoints gathered so far."""


class SummedDecay(Decay):
    """A decay with its sums over the tokens' axis: ``0, c_1, c_2, … c_C``."""

    axis: int

    def __init__(self, log_decay: Tensor) -> None:
        super().__init__(log_decay.shape[1])
        self.dtype = log_decay.dtype
        wide = log_decay.to(accurate(log_decay.device)).clamp(min=FLOOR)
        sums = wide.cumsum(self.axis)
        self.sums = torch.cat((torch.zeros_like(sums.narrow(self.axis, 0, 1)), sums), self.axis)
        self.last = self.sums.select(self.axis, -1).unsqueeze(self.axis)
        self.pulled = torch.zeros_like(self.sums, dtype=self.dtype)

    def exponent(self, rows: Rows) -> Tensor:
        """``r_p`` of each row, in the accurate dtype."""
        return self.sums.index_select(self.axis, rows.places)

    def rounded_exp(self, exponent: Tensor) -> Tensor:
        """``e^x`` in the compute dtype of an exponent ≤ 0 in the accurate one."""
        return exponent.to(self.dtype).exp()

    def gather(self, rows: Rows, gradient: Tensor) -> None:
        """Adds adjoints of the rows' exponents to those of the sums."""
        self.pulled.index_add_(self.axis, rows.places, gradient)

    def gather_last(self, gradient: Tensor) -> None:
        """Adds an adjoint of ``c_C``."""
        self.pulled.select(self.axis, -1).add_(gradient)

    def pull(self) -> Tensor:
        wide = self.pulled.narrow(self.axis, 1, self.pulled.shape[self.axis] - 1).to(accurate(self.pulled.device))
        return wide.flip(self.axis).cumsum(self.axis).flip(self.axis).to(self.dtype)
