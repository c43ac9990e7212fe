"""Gates that FLA's kernels compute inside: log-decays and betas from raw inputs.

Source: flash-linear-attention 0.6.0, ``fla.ops.kda.gate`` and the arguments of ``chunk_gated_delta_rule``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def log_decay(
    g: Tensor | None,
    use_gate_in_kernel: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None = None,
    safe_gate: bool = False,
) -> Tensor | None:
    """The log-decay: ``g`` itself, or with ``use_gate_in_kernel``

        -e^A_log · softplus(g + dt_bias),   with ``lower_bound``   lower_bound · sigmoid(e^A_log · (g + dt_bias)).

    ``g [B, T, HV]`` or ``[B, T, HV, K]``, ``A_log`` of HV numbers (None with ``lower_bound``: its exponential is 1),
    ``dt_bias`` of HV or HV · K numbers; computed in at least float32. ``safe_gate`` chooses a faster kernel in FLA;
    here it only asks, as there, for a ``lower_bound`` from -5 to 0.

    Raises:
        ValueError: for a gate's parameter without the gate, a missing one, a bound out of range.
    """
    if not use_gate_in_kernel:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
            if value is not None:
                raise ValueError(f"{name}: got a tensor with use_gate_in_kernel=False, expected None")
        return g
    if g is None:
        raise ValueError("g: got None with use_gate_in_kernel=True, expected the gate's raw input")
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: got None with use_gate_in_kernel=True, expected one number a head or a lower_bound")
    if safe_gate and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound: got {lower_bound} with safe_gate=True, expected a number in [-5, 0)")
    raw = g.to(torch.promote_types(g.dtype, torch.float32))
    heads = g.shape[2:]
    for name, parameter, count in (("A_log", A_log, heads[:1].numel()), ("dt_bias", dt_bias, heads.numel())):
        if parameter is not None and parameter.numel() != count:
            raise ValueError(f"{name}: got shape {list(parameter.shape)}, expected {count} numbers")
    if dt_bias is not None:
        raw = raw + dt_bias.to(raw.dtype).reshape(heads)
    rate = None if A_log is None else A_log.to(raw.dtype).exp().reshape(heads[0], *(1 for _ in heads[1:]))
    if lower_bound is None:
        assert rate is not None
        return -rate * softplus(raw)
    return lower_bound * torch.sigmoid(raw if rate is None else rate * raw)


def beta_of(beta: Tensor | None, v: Tensor, use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> Tensor:
    """β: given (None is 1), or ``sigmoid(beta)``, twice that with ``allow_neg_eigval``, in at least float32."""
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval: got True, expected use_beta_sigmoid_in_kernel=True with it")
    if beta is None:
        return v.new_ones(v.shape[:3])
    if not use_beta_sigmoid_in_kernel:
        return beta
    opened = torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32)))
    return 2 * opened if allow_neg_eigval else opened
