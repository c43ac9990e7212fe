"""What the scans of every tier do, said once: which arrays go in and come out, by two launches of the tier's own.

``scan.py`` has the portable launches and the formulas, ``hopper/scan.py`` those for Hopper GPUs.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .chunks import Chunks
from .prepare import Prepared
from .segments import Segments


class Scans(NamedTuple):
    """A tier's scans. ``tiles(key, value, tied)``: programs that carry one value head's state. What is None in a launch
    is neither read nor written.

    query, key [B, T, H, K], value and d_output [B, T, HV, V], contiguous; states in float32 unless said.
    """

    tiles: Callable[[Tensor, Tensor, bool], int]
    launch_forward: Callable[..., None]
    launch_reverse: Callable[..., None]

    def forward_scan(
        self, query: Tensor, key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, scale: float,
        initial_state: Tensor | None, output: Tensor, final_state: Tensor | None, ended: Tensor | None,
        halts: Tensor | None, halt: int,
    ) -> None:  # fmt: skip
        """Outputs [B, T, HV, V] in the value's dtype and, where there is room for them, final states [N, HV, K, V] and
        the states at the entry of every `halt`-th chunk, [P, N, HV, K, V].  `ended`, of segments, says which sequence
        ends with each."""
        self.launch_forward(key, value, prepared, chunks, initial_state, final_state, query=query, scale=scale,
                            output=output, owners=ended, halts=halts, halt=halt)  # fmt: skip

    def halting_scan(
        self, key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, initial_state: Tensor | None,
        halts: Tensor, halt: int,
    ) -> None:  # fmt: skip
        """The states at the entry of every `halt`-th chunk alone."""
        self.launch_forward(key, value, prepared, chunks, initial_state, None, halts=halts, halt=halt)

    def flow_scan(
        self, key: Tensor, value: Tensor, prepared: Prepared, segments: Segments, *, initial_state: Tensor | None,
        flows: Tensor,
    ) -> None:  # fmt: skip
        """[H | P] of the leading segments, [F, HV, K, V + K] ([H] of rows that only write).

        Of the segment that begins a sequence H is what the initial state [N, HV, K, V] becomes, and P is left open.
        """
        self.launch_forward(key, value, prepared, segments.layout, initial_state, flows, flows=segments.leading)

    def recompute_scan(
        self, key: Tensor, value: Tensor, prepared: Prepared, chunks: Chunks, *, initial_state: Tensor | None,
        entry_states: Tensor, innovation: Tensor,
    ) -> None:  # fmt: skip
        """Transposed states at the chunks' entries [M, HV, V, K] and R [B, T, HV, V], in the value's dtype; without an
        inverse R is the values, and is not written."""
        self.launch_forward(key, value, prepared, chunks, initial_state, None, innovation=innovation,
                            entry_states=entry_states)  # fmt: skip

    def reverse_scan(
        self, query: Tensor, key: Tensor, d_output: Tensor, prepared: Prepared, chunks: Chunks, *, scale: float,
        d_final_state: Tensor | None, exit_gradients: Tensor, d_value: Tensor, d_initial_state: Tensor | None,
        begun: Tensor | None,
    ) -> None:  # fmt: skip
        """Transposed gradients of the chunks' exit states [M, HV, V, K] and of the values, in the value's dtype; where
        there is room for them, of the initial states.  `begun`, of segments, says which sequence begins with each."""
        self.launch_reverse(query, key, d_output, prepared, chunks, scale, d_final_state, d_initial_state,
                            d_value=d_value, exit_gradients=exit_gradients, owners=begun)  # fmt: skip

    def reverse_flow_scan(
        self, query: Tensor, key: Tensor, d_output: Tensor, prepared: Prepared, segments: Segments, *, scale: float,
        d_final_state: Tensor | None, sources: Tensor,
    ) -> None:  # fmt: skip
        """The gradients of the trailing segments' entry states if those of their exit states were zero, [F, HV, K, V];
        of the segment that ends a sequence, the whole of it: its exit has the gradient of the final state."""
        self.launch_reverse(query, key, d_output, prepared, segments.layout, scale, d_final_state, sources,
                            flows=segments.trailing)  # fmt: skip
