"""The library in one sitting: a model, its gradients, its decoding step, and its parts."""

import torch

import parallelflow as pf

batch, length, heads, key_size, value_size = 2, 1000, 4, 64, 64
query, key = torch.randn(2, batch, length, heads, key_size)
value = torch.randn(batch, length, heads, value_size, requires_grad=True)
beta = torch.rand(batch, length, heads)
log_decay = -0.1 * torch.rand(batch, length, heads)

# A model is a function: all tokens at once, on any device, differentiable.
output, state = pf.gated_delta_rule(
    query, key, value, beta, log_decay, normalize_query_key=True, return_final_state=True
)
output.square().mean().backward()
print("output", tuple(output.shape), "state", tuple(state.shape), "gradient", tuple(value.grad.shape))

# Decoding goes on from the state, token by token, at a constant cost.
query, key = (torch.nn.functional.normalize(x, dim=-1) for x in (query, key))
token = [x[:, -1] for x in (query, key, value, beta, log_decay)]
output, state = pf.step.gated_delta_rule(*token, state=state)
print("one more token", tuple(output.shape))

# Solver, aggregate and chunk size are choices; the result is the same.
results = [
    pf.gated_delta_rule(query, key, value, beta, log_decay, solver=solver, aggregate=aggregate, chunk_size=32).output
    for solver in ("tensor_inverse", "substitution")
    for aggregate in ("sequential", "associative", "segmented")
]
print("largest difference between six ways:", max((x - results[0]).abs().max().item() for x in results))

# Below the models there are drivers: rows that name tensors. This one is DeltaNet.
row = pf.Row(read=pf.Factor(key, beta, sign=-1), write=key, value=pf.Factor(value, beta))
delta_net = pf.integrate(pf.LowRankDriver(rows=(row,)), query).output
print("as a driver, off by", (delta_net - pf.delta_rule(query, key, value, beta).output).abs().max().item())
