"""How a system is laid over a thread block: what the kernels are compiled for, and the shared memory they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

LANES = 32  # threads of a warp
MOST_ROWS = 256  # of a system
MOST_RANK = 4  # rows of a token
ROWS_OF_A_THREAD = {"SigDelta": 8, "Substitution": 16}  # so many rows of a tile of columns stay in its registers
MOST_WARPS = 16  # of a block: with more a thread has too few registers
WIDTH = {"SigDelta": {4: 2, 8: 1}, "Substitution": {4: 4, 8: 2}}  # columns of a thread, by bytes of a number


@dataclass(frozen=True)
class Layout:
    """``solver``: the kernel's name in C++. A thread keeps ``own`` tokens (of sigDelta: of the grid's rows, which begin
    at 1) of ``rank`` rows in ``width`` columns; ``resident``: whether G lies in shared memory."""

    solver: str
    number_bytes: int
    tokens: int
    rank: int
    own: int
    width: int
    resident: bool

    @staticmethod
    def of(solver: str, number_bytes: int, tokens: int, rank: int, shared_bytes: int, width: int) -> Layout:
        """The layout for a device whose blocks may take ``shared_bytes``: narrower tiles than ``width``, then G out of
        shared memory, where there is too little. No layout changes a bit of the solution."""
        own = max(1, ROWS_OF_A_THREAD[solver] // rank, -(-tokens // MOST_WARPS))
        layout = Layout(solver, number_bytes, tokens, rank, own, width, True)
        while layout.memory * number_bytes > shared_bytes and layout.width > 1:
            layout = replace(layout, width=layout.width // 2)
        if layout.memory * number_bytes > shared_bytes:
            layout = replace(layout, width=width, resident=False)
        while layout.memory * number_bytes > shared_bytes and layout.width > 1:
            layout = replace(layout, width=layout.width // 2)
        return layout

    @staticmethod
    def width_of(solver: str, number_bytes: int, columns: int, multiprocessors: int) -> int:
        """Columns of a thread for so many columns of all systems: fewer where more multiprocessors get a tile."""
        width = WIDTH[solver][number_bytes]
        while width > 1 and columns < LANES * width * multiprocessors:
            width //= 2
        return width

    @property
    def warps(self) -> int:
        """Warps of a block."""
        kept = self.tokens - (self.solver == "SigDelta")
        return max(1, -(-kept // self.own))

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return LANES * self.width

    @property
    def memory(self) -> int:
        """Numbers of shared memory."""
        tokens, warps, own, row = self.tokens, self.warps, self.own, self.rank * self.columns
        if self.solver == "SigDelta":
            cells, rows = tokens * (tokens - 1) // 2, tokens + 2 * warps
        else:
            cells, rows = warps * warps * (own * (own + 1) // 2), 2
        return self.resident * self.rank**2 * cells + rows * row

    def definitions(self, number: str, element: str) -> dict[str, str]:
        """What ``kernel.cu`` wants defined, for C++ types."""
        arguments = f"{number}, {self.rank}, {self.own}, {self.width}, {str(self.resident).lower()}"
        return {
            "SOLVER": f"{self.solver}<{arguments}>", "NUMBER": number, "ELEMENT": element,
            "BLOCK_WARPS": str(self.warps),
        }  # fmt: skip
