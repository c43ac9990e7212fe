"""A small byte-level language model: embeddings, blocks of Gated DeltaNet, a head.

Whole texts and single bytes go the same way; what is carried between them stays constant however long the text grows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallelflow.nn import Block, GatedDeltaNet, Memory


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
        self.blocks = nn.ModuleList(
            Block(GatedDeltaNet(width, num_heads=heads, negative_eigenvalues=True), intermediate_size=2 * width)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(tokens)[0]

    def read(self, tokens: Tensor, memories: list[Memory] | None = None) -> tuple[Tensor, list[Memory]]:
        """The logits of a text, or of its next bytes after the memories of what came before; and the memories."""
        hidden, after = self.embedding(tokens), []
        for index, block in enumerate(self.blocks):
            hidden, memory = block(hidden, memory=None if memories is None else memories[index])
            after.append(memory)
        return self.head(self.norm(hidden)), after

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, *, temperature: float = 0.7, seed: int = 0) -> bytes:
        """`count` bytes after a non-empty prompt, byte by byte, at a constant cost for each."""
        generator = torch.Generator().manual_seed(seed)
        logits, memories = self.read(torch.tensor([list(prompt)]))
        generated = bytearray()
        for _ in range(count):
            token = torch.multinomial((logits[:, -1] / temperature).softmax(dim=-1), 1, generator=generator)
            generated.append(int(token))
            logits, memories = self.read(token, memories)
        return bytes(generated)
