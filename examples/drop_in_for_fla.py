"""Code written for flash-linear-attention runs on this engine, on any device, after one line; FLA may be absent."""

import torch

import parallelflow.compat.fla

parallelflow.compat.fla.install()

# From here on the code is FLA's users' own.
import torch.nn.functional as F  # noqa: E402
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule  # noqa: E402

B, T, H, HV, K, V = 1, 512, 2, 4, 32, 32
q, k = torch.randn(2, B, T, H, K)
v = torch.randn(B, T, HV, V, requires_grad=True)
g, beta = F.logsigmoid(torch.randn(B, T, HV)), torch.rand(B, T, HV)

o, state = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
o.square().mean().backward()
print("chunk:", tuple(o.shape), "state", tuple(state.shape), "gradient", tuple(v.grad.shape))

# A prompt, then token by token from its state: the same outputs.
half = T // 2
_, state = chunk_gated_delta_rule(
    *(x[:, :half] for x in (q, k, v, g, beta)), use_qk_l2norm_in_kernel=True, output_final_state=True
)
tokens = []
for t in range(half, T):
    token = {name: x[:, t : t + 1] for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta))}
    out, state = fused_recurrent_gated_delta_rule(
        **token, initial_state=state, use_qk_l2norm_in_kernel=True, output_final_state=True
    )
    tokens.append(out)
difference = (torch.cat(tokens, 1) - o[:, half:]).abs().max().item()
print(f"token by token, off by {difference:.1e}")
assert difference < 1e-5

# Two sequences packed on one line do not see each other.
cu_seqlens = torch.tensor([0, 200, T])
packed, _ = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
alone, _ = chunk_gated_delta_rule(*(x[:, 200:] for x in (q, k, v, g, beta)), use_qk_l2norm_in_kernel=True)
print(f"packed, off by {(packed[:, 200:] - alone).abs().max().item():.1e}")

# A misspelt option is an error, and says which there are.
try:
    chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=True)
except TypeError as error:
    print("TypeError:", str(error).split("; the keywords")[0])

parallelflow.compat.fla.uninstall()
