"""Warp-specialised scans for Hopper GPUs (sm_90a), bfloat16 and float16, K 64 or 128, V a multiple of 64."""

from .forward import ForwardScan, forward_scan
from .reverse import ReverseScan, reverse_scan
from .sequences import Sequences, packed, regular

__all__ = ["ForwardScan", "ReverseScan", "Sequences", "forward_scan", "packed", "regular", "reverse_scan"]
