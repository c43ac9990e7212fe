"""A new model is one file: a delta rule that erases along a direction of its own, trained to keep eight variables."""

import torch
import torch.nn.functional as F

import parallelflow as pf


def oblique_delta_rule(query, key, eraser, value, beta, decay):
    """S_t = (I - β k eᵀ) γ S_{t-1} + β k vᵀ: the gated delta rule, but the eraser e is not the key k."""
    row = pf.Row(read=pf.Factor(eraser, beta, sign=-1), write=key, value=pf.Factor(value, beta))
    return pf.integrate(pf.LowRankDriver(rows=(row,), log_decay=decay.log()), query).output


class Memory(torch.nn.Module):  # tokens say "variable a is now v; what is b?": integers [B, T] to logits [B, T, 8]
    def __init__(self, size=32):
        super().__init__()
        self.query, self.key, self.eraser, self.value = (torch.nn.Embedding(8, size) for _ in range(4))
        self.gates, self.answer = torch.nn.Embedding(8, 2), torch.nn.Linear(size, 8)

    def forward(self, assigned, value, asked):
        tables = (self.query, asked), (self.key, assigned), (self.eraser, assigned), (self.value, value)
        vectors = (F.normalize(table(numbers), dim=-1)[:, :, None] for table, numbers in tables)  # [B, T, 1, size]
        return self.answer(oblique_delta_rule(*vectors, *self.gates(assigned).sigmoid().split(1, dim=-1))[:, :, 0])


def train(model, steps=150):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(steps):
        assigned, value, asked = torch.randint(8, (3, 16, 64))
        last = ((assigned[:, None] == asked[:, :, None]).tril() * torch.arange(1, 65)).amax(-1)  # 0: not yet assigned
        loss = F.cross_entropy(model(assigned, value, asked).mT, F.pad(value, (1, 0)).gather(1, last))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


if __name__ == "__main__":
    print("loss:", *(f"{loss:.2f}" for loss in list(train(Memory()))[::10]))
