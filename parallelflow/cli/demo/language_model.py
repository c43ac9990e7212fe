"""A small byte-level language model on the gated delta rule, in plain PyTorch on top of the functional API.

Read from top to bottom: a short causal convolution, the mixing layer, the MLP, the model. Every part has one `forward`
over whole sequences and one `step` for a single byte, whose memory stays constant however long the text grows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow import functional, step


class Memory(NamedTuple):
    """What a layer carries from byte to byte: the last inputs of its convolution and the state S."""

    window: Tensor  # [B, width - 1, channels]
    state: Tensor  # [B, H, K, V]


class ShortConvolution(nn.Module):
    """A depthwise causal convolution over the last few positions, then SiLU.  [B, T, C] to [B, T, C]."""

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, channels) / width**0.5)

    def forward(self, inputs: Tensor, window: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the outputs and the window that the next positions need; None starts from zeros."""
        width, channels = self.weight.shape
        if window is None:
            window = inputs.new_zeros(inputs.shape[0], width - 1, channels)
        padded = torch.cat([window, inputs], dim=1)
        length = inputs.shape[1]
        mixed = sum(self.weight[i] * padded[:, i : i + length] for i in range(width))
        return F.silu(torch.as_tensor(mixed)), padded[:, length:]


class GatedDeltaLayer(nn.Module):
    """S_t = (I - β k kᵀ) e^g S_{t-1} + β k vᵀ, o = Sᵀq: gated, normalised and mixed (arXiv 2412.06464)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.convolution = ShortConvolution(3 * width)
        self.beta_decay = nn.Linear(width, 2 * heads)
        self.rate = nn.Parameter(torch.linspace(-4.0, 0.0, heads))  # slow and fast heads: log of the decay per byte
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.output = nn.Linear(width, width, bias=False)

    def tensors(self, inputs: Tensor, window: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """query, key, value [B, T, H, D], beta and log_decay [B, T, H]; and the convolution's window."""
        mixed, window = self.convolution(self.query_key_value(inputs), window)
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in mixed.chunk(3, dim=-1))
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        beta, decay = self.beta_decay(inputs).chunk(2, dim=-1)
        return [query, key, value, 2 * beta.sigmoid(), -self.rate.exp() * F.softplus(decay)], window

    def read_out(self, mixed: Tensor, inputs: Tensor) -> Tensor:
        return self.output(self.norm(mixed).flatten(-2) * F.silu(self.gate(inputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        tensors, _ = self.tensors(inputs, None)
        return self.read_out(functional.gated_delta_rule(*tensors).output, inputs)

    def prefill(self, inputs: Tensor) -> tuple[Tensor, Memory]:
        """The whole prompt at once, in chunks; its final state is where `step` goes on."""
        tensors, window = self.tensors(inputs, None)
        result = functional.gated_delta_rule(*tensors, return_final_state=True)
        assert result.final_state is not None
        return self.read_out(result.output, inputs), Memory(window, result.final_state)

    def step(self, inputs: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One position, inputs [B, 1, width]."""
        tensors, window = self.tensors(inputs, memory.window)
        result = step.gated_delta_rule(*(x[:, 0] for x in tensors), state=memory.state)
        assert result.final_state is not None
        return self.read_out(result.output[:, None], inputs), Memory(window, result.final_state)


class GatedMLP(nn.Module):
    """SwiGLU: W (SiLU(G x) ⊙ U x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        gate, up = self.gate_up(inputs).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width, eps=1e-6), GatedDeltaLayer(width, heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(width, eps=1e-6), GatedMLP(width, 2 * width)

    def _after(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.mlp_norm(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return self._after(hidden + self.mixer(self.mixer_norm(hidden)))

    def prefill(self, hidden: Tensor) -> tuple[Tensor, Memory]:
        mixed, memory = self.mixer.prefill(self.mixer_norm(hidden))
        return self._after(hidden + mixed), memory

    def step(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        mixed, memory = self.mixer.step(self.mixer_norm(hidden), memory)
        return self._after(hidden + mixed), memory


class ByteLanguageModel(nn.Module):
    """Bytes [B, T] to the logits of the next byte [B, T, 256].

    Args:
        width: the width of the residual stream, a multiple of `heads`.
        depth: the number of blocks.
        heads: the number of heads; their keys and values have width // heads channels.
    """

    def __init__(self, width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def prefill(self, tokens: Tensor) -> tuple[Tensor, list[Memory]]:
        """The logits [B, T, 256] of a prompt and the memory with which `step` goes on."""
        hidden, memories = self.embedding(tokens), []
        for block in self.blocks:
            hidden, memory = block.prefill(hidden)  # type: ignore[operator]
            memories.append(memory)
        return self.head(self.norm(hidden)), memories

    def step(self, token: Tensor, memories: list[Memory]) -> tuple[Tensor, list[Memory]]:
        """One byte [B] and the memory before it give the logits [B, 256] and the memory after it."""
        hidden, after = self.embedding(token)[:, None], []
        for block, memory in zip(self.blocks, memories, strict=True):
            hidden, memory = block.step(hidden, memory)  # type: ignore[operator]
            after.append(memory)
        return self.head(self.norm(hidden))[:, 0], after

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, *, temperature: float = 0.7, seed: int = 0) -> bytes:
        """`count` bytes after a non-empty prompt, byte by byte, at a constant cost for each."""
        generator = torch.Generator().manual_seed(seed)
        logits, memories = self.prefill(torch.tensor([list(prompt)]))
        logits, generated = logits[:, -1], bytearray()
        for _ in range(count):
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
            generated.append(int(token))
            logits, memories = self.step(token, memories)
        return bytes(generated)
