"""What all layers have in common, and what each of them is made of."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallelflow.nn import (
    LAYERS,
    RWKV7,
    GatedDeltaNet,
    Layer,
    LowRankFlow,
    SoftmaxAttention,
    make_layer,
    set_context_group,
)
from parallelflow.nn.attention import rotate
from parallelflow.nn.convolution import depthwise, short_convolution, token_shift
from parallelflow.nn.norm import GatedRMSNorm

WIDTH = 16
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "delta_net": ("delta_net", {"num_heads": 2, "conv_bias": True}),
    "gated_delta_net": ("gated_delta_net", {"num_heads": 2, "num_value_heads": 4, "value_head_dim": 3}),
    "gated_delta_net, no convolution": ("gated_delta_net", {"num_heads": 2, "conv_size": 0, "output_gate": None}),
    "delta_product": ("delta_product", {"num_heads": 2, "num_householder": 3, "num_value_heads": 4}),
    "delta_product, no decay": ("delta_product", {"num_heads": 2, "forget_gate": False}),
    "kimi_delta_attention": ("kimi_delta_attention", {"num_heads": 2, "num_value_heads": 4}),
    "kimi_delta_attention, no gate": ("kimi_delta_attention", {"num_heads": 2, "output_gate": None}),
    "rwkv7": ("rwkv7", {"head_dim": 8}),
    "gated_linear_attention": ("gated_linear_attention", {"num_heads": 2}),
    "mamba2": ("mamba2", {"head_dim": 8, "state_size": 6, "num_groups": 2}),
    "comba": ("comba", {"num_heads": 2, "num_value_heads": 4}),
    "comba, no decay": ("comba", {"num_heads": 2, "forget_gate": False, "output_correction": False}),
    "low_rank_flow": ("low_rank_flow", {"num_heads": 2, "num_value_heads": 4}),
    "low_rank_flow, tied, Cayley": ("low_rank_flow", {"num_heads": 2, "tied": True, "discretization": "cayley"}),
    "softmax_attention": ("softmax_attention", {"num_heads": 4, "num_key_value_heads": 2}),
}


def build(variant: str, dtype: torch.dtype = torch.float64) -> Layer:
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    layer = make_layer(name, WIDTH, **options)
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return layer.to(dtype)


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.fixture(params=VARIANTS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return build(request.param)


def test_every_layer_is_here():
    assert {name for name, _ in VARIANTS.values()} == set(LAYERS)


@torch.no_grad()
def test_pieces_of_a_sequence(layer):
    """One token or many at a time: the same outputs and the same memory."""
    hidden_states = draw(2, 23, WIDTH)
    whole = layer(hidden_states)
    memory, outputs = None, []
    for start, stop in [(0, 1), (1, 2), (2, 4), (4, 15), (15, 16), (16, 23)]:
        output, memory, *_ = layer(hidden_states[:, start:stop], memory=memory)
        outputs.append(output)
    assert_same(torch.cat(outputs, 1), whole.output)
    assert_same(memory, whole.memory)


@torch.no_grad()
def test_the_future_does_not_matter(layer):
    hidden_states = draw(1, 12, WIDTH)
    changed = torch.cat([hidden_states[:, :7], draw(1, 5, WIDTH, seed=2)], 1)
    assert_same(layer(changed).output[:, :7], layer(hidden_states).output[:, :7])
    assert not torch.allclose(layer(changed).output[:, 7:], layer(hidden_states).output[:, 7:])


@torch.no_grad()
def test_padding(layer):
    """On the left, on the right, between, and nothing but padding; then more of it, after a memory."""
    masks = torch.tensor([[0] * 3 + [1] * 8, [1] * 6 + [0] * 5, [1, 0] * 5 + [1], [0] * 11]).bool()
    hidden_states, more = draw(4, 11, WIDTH), draw(4, 4, WIDTH, seed=3)
    following = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    first = layer(hidden_states, attention_mask=masks)
    second = layer(more, attention_mask=torch.cat([masks.long(), following], 1), memory=first.memory)
    assert not first.output[~masks].any() and not second.output[following == 0].any()
    for row in range(4):
        alone = torch.cat([hidden_states[row, masks[row]], more[row, following[row].bool()]]).unsqueeze(0)
        got = torch.cat([first.output[row, masks[row]], second.output[row, following[row].bool()]])
        assert_same(got, layer(alone).output[0])


@torch.no_grad()
def test_packed_sequences(layer):
    """Short ones too: a window reaches back into the memory when the convolution is wider than a sequence is long."""
    hidden_states, more = draw(1, 12, WIDTH), draw(1, 6, WIDTH, seed=3)
    first = layer(hidden_states, cu_seqlens=torch.tensor([0, 1, 8, 12]))
    second = layer(more, cu_seqlens=torch.tensor([0, 2, 3, 6]), memory=first.memory)
    for row, (a, b), (c, d) in [(0, (0, 1), (0, 2)), (1, (1, 8), (2, 3)), (2, (8, 12), (3, 6))]:
        alone = layer(torch.cat([hidden_states[:, a:b], more[:, c:d]], 1))
        assert_same(torch.cat([first.output[:, a:b], second.output[:, c:d]], 1), alone.output)
        if hasattr(second.memory, "state"):
            assert_same(second.memory.state[row], alone.memory.state[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_narrow_numbers(variant):
    """bfloat16 layers give bfloat16 that is near the float32 layer's, from states in float32."""
    wide, narrow = build(variant, torch.float32), build(variant, torch.bfloat16)
    hidden_states = draw(1, 40, WIDTH, dtype=torch.bfloat16)
    expected = wide.load_state_dict(narrow.state_dict()) and wide(hidden_states.float()).output
    result = narrow(hidden_states)
    assert result.output.dtype == torch.bfloat16
    assert (result.output - expected).norm() <= 0.03 * expected.norm()
    if hasattr(result.memory, "state"):
        assert result.memory.state.dtype == torch.float32
    result.output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in narrow.parameters())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "low_rank_flow"])  # its step looks at values
def test_another_device(variant):
    """On the meta device, where a tensor left on the host is an error: forward, backward, memories, packed lines."""
    name, options = VARIANTS[variant]
    with torch.device("meta"):
        layer = make_layer(name, WIDTH, **options)
        hidden_states = torch.randn(2, 70, WIDTH, requires_grad=True)
        line, starts = torch.randn(1, 12, WIDTH), torch.tensor([0, 3, 12])
    output, memory, *_ = layer(hidden_states)
    longer, memory, *_ = layer(hidden_states[:, :1], memory=memory)
    last, memory, *_ = layer(hidden_states[:, :5], memory=memory)
    (output.sum() + longer.sum() + last.sum()).backward()
    assert hidden_states.grad.is_meta and all(parameter.grad.is_meta for parameter in layer.parameters())
    packed = {"cu_seqlens": starts, "cu_seqlens_cpu": torch.tensor([0, 3, 12])}
    output, memory, *_ = layer(line, **packed)
    assert output.is_meta and layer(line, memory=memory, **packed).output.is_meta


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["delta_product", "kimi_delta_attention", "rwkv7", "mamba2", "comba", "low_rank_flow"]
)
def test_compiled(variant):
    layer, hidden_states = build(variant), draw(2, 9, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(compiled(hidden_states).output, layer(hidden_states).output)


@pytest.mark.parametrize("variant", ["gated_delta_net", "rwkv7"])
def test_the_engine_is_a_choice(variant):
    layer, hidden_states = build(variant), draw(1, 30, WIDTH)
    expected = layer(hidden_states).output
    layer.engine = {"solver": "substitution", "aggregate": "associative", "chunk_size": 4}
    assert_same(layer(hidden_states).output, expected)
    layer.engine = {"solver": "magic"}
    with pytest.raises(ValueError, match="solver: got 'magic'"):
        layer(hidden_states)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_convolution(width):
    inputs, convolution = draw(3, 10, 5), depthwise(5, width, bias=True).double()
    expected = F.conv1d(F.pad(inputs.mT, (width - 1, 0)), convolution.weight, convolution.bias, groups=5).mT
    output, window = short_convolution(inputs, convolution.weight, convolution.bias)
    assert_same(output, expected)
    assert_same(window, inputs[:, 11 - width :])
    assert window.untyped_storage().nbytes() == window.nbytes, "the window keeps the inputs alive"
    line = inputs.flatten(0, 1).unsqueeze(0)
    packed, windows = short_convolution(
        line, convolution.weight, convolution.bias, cu_seqlens=torch.tensor([0, 10, 20, 30])
    )
    assert_same((packed.view(3, 10, 5), windows), (expected, window))


def test_token_shift():
    inputs = draw(2, 4, 3)
    shifted, window = token_shift(inputs, window=inputs[:, -1:])
    assert_same((shifted, window), (inputs.roll(1, 1), inputs[:, -1:]))


def test_gated_norm():
    inputs, gate = draw(2, 3, 8), draw(2, 3, 8, seed=2)
    norm = GatedRMSNorm(8, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    plain = F.rms_norm(inputs, (8,), norm.weight, 1e-3)
    assert_same(norm(inputs), plain)
    assert_same(norm(inputs, gate), plain * F.silu(gate))
    first = GatedRMSNorm(8, eps=1e-3, groups=2, gate_first=True, activation="sigmoid").double()
    parts = (inputs * gate.sigmoid()).unflatten(-1, (2, 4))
    assert_same(first(inputs, gate), F.rms_norm(parts, (4,), None, 1e-3).flatten(-2))


def test_rotations():
    """Pairs of channels as complex numbers: what two rotated vectors have in common is their distance only."""
    vectors, positions = draw(5, 1, 8), torch.tensor([0, 3, 7, 8, 100])
    turned = rotate(vectors, positions, 100.0)
    first, second = vectors.chunk(2, -1)
    angles = positions[:, None, None] * 100.0 ** (-torch.arange(4) / 4)
    expected = torch.view_as_real(
        torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    )
    torch.testing.assert_close(turned, expected.mT.flatten(-2), rtol=0, atol=1e-5)
    later = rotate(vectors, positions + 1000, 100.0)
    assert_same(turned.squeeze(1) @ turned.squeeze(1).mT, later.squeeze(1) @ later.squeeze(1).mT)


@torch.no_grad()
def test_attention():
    layer, hidden_states = build("softmax_attention"), draw(1, 6, WIDTH)
    query, key, value = (p(hidden_states).unflatten(-1, (-1, 4))[0] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    query, key = (rotate(x, torch.arange(6), 10000.0) for x in (query, key))
    outputs = []
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].T / 2
        weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, head // 2])
    assert_same(layer(hidden_states).output[0], layer.o_proj(torch.cat(outputs, -1)))


@torch.no_grad()
def test_a_tied_flow_of_rank_one_is_gated_delta_net():
    delta = build("gated_delta_net")
    flow = LowRankFlow(WIDTH, **VARIANTS["gated_delta_net"][1], rank=1, tied=True, discretization="euler").double()
    flow.load_state_dict(delta.state_dict())
    hidden_states = 3 * draw(1, 9, WIDTH)  # far from the two normalisations' different guards
    torch.testing.assert_close(flow(hidden_states).output, delta(hidden_states).output, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_exact_flow_is_a_matrix_exponential():
    """``S' = exp(G) S + ∫ exp(sG) ds F`` of ``dS = (G S + F) dt``, by one exponential of a larger matrix."""
    torch.manual_seed(0)
    layer = LowRankFlow(WIDTH, num_heads=1, head_dim=4, value_head_dim=3, forget_gate=False, conv_size=0).double()
    layer.o_norm, layer.o_proj, layer.output_gate = nn.Identity(), nn.Identity(), None
    layer.o_norm.forward = lambda inputs, gate: inputs
    hidden_states = draw(1, 7, WIDTH)
    query, key, value = (F.silu(p(hidden_states)[0]) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    vectors = F.normalize(key.view(7, 4, 4), dim=-1, eps=1e-6)
    write, read, value, query = vectors[:, :2], vectors[:, 2:], value.view(7, 2, 3), F.normalize(query, dim=-1)
    beta, state, outputs = layer.b_proj(hidden_states)[0].sigmoid(), torch.zeros(4, 3).double(), []
    for t in range(7):
        generator = -(write[t].T * beta[t]) @ read[t]
        larger = torch.zeros(7, 7).double()
        larger[:4, :4], larger[:4, 4:] = generator, (write[t].T * beta[t]) @ value[t]
        exponential = torch.linalg.matrix_exp(larger)
        state = exponential[:4, :4] @ state + exponential[:4, 4:]
        outputs.append(state.T @ query[t] / 2)
    assert_same(layer(hidden_states).output[0], torch.stack(outputs))


@torch.no_grad()
def test_the_first_value_under_padding():
    first, second = build("rwkv7"), RWKV7(WIDTH, head_dim=8, layer_index=1, num_layers=2).double()
    nn.init.normal_(second.o_proj.weight)
    hidden_states, mask = draw(2, 7, WIDTH), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    padded = first(hidden_states, attention_mask=mask)
    outputs = second(padded.output, attention_mask=mask, first_value=padded.first_value)
    alone = first(hidden_states[:1, 2:])
    assert_same(outputs.output[:1, 2:], second(alone.output, first_value=alone.first_value).output)
    assert_same(outputs.first_value[:1, 2:], alone.first_value)
    with pytest.raises(TypeError, match="first_value"):
        build("delta_net")(hidden_states, first_value=padded.first_value)


def test_initial_decays():
    torch.manual_seed(0)
    layer = GatedDeltaNet(256, num_heads=256, head_dim=1)
    step, rate = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01
    assert 0.3 < (step < 0.01).float().mean() < 0.7, "not uniform in the logarithm"
    assert rate.min() > 0 and rate.max() <= 16 and 7 < rate.mean() < 9


def test_errors():
    layer = GatedDeltaNet(WIDTH, num_heads=2)
    with pytest.raises(ValueError, match=r"hidden_states: got shape \[2, 3, 8\], expected \[B, T, D\] with D = 16"):
        layer(torch.zeros(2, 3, 8))
    with pytest.raises(TypeError, match=r"hidden_states: got dtype torch.int64"):
        layer(torch.zeros(2, 3, WIDTH, dtype=torch.int64))
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(
            TypeError, match=f"hidden_states: got dtype {dtype}, expected the parameters', torch.float32"
        ):
            layer(torch.zeros(2, 3, WIDTH, dtype=dtype))
    with pytest.raises(ValueError, match="attention_mask: got one together with cu_seqlens"):
        layer(torch.zeros(1, 3, WIDTH), attention_mask=torch.ones(1, 3), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"memory.window: got shape \[1, 3, 48\], expected .* = \[2, 3, 48\]"):
        layer(torch.zeros(2, 3, WIDTH), memory=layer(torch.zeros(1, 3, WIDTH)).memory)
    memory = layer(torch.zeros(2, 3, WIDTH)).memory
    for wrong in (memory.state, tuple(memory), "state"):
        with pytest.raises(
            TypeError, match=f"memory: got {type(wrong).__name__}, expected a Memory of an earlier call"
        ):
            layer(torch.zeros(2, 3, WIDTH), memory=wrong)
    with pytest.raises(TypeError, match=r"memory\.state: got NoneType, expected a tensor"):
        layer(torch.zeros(2, 3, WIDTH), memory=memory._replace(state=None))
    with pytest.raises(TypeError, match="memory: got Memory, expected a KeysAndValues"):
        SoftmaxAttention(WIDTH, num_heads=2)(torch.zeros(2, 3, WIDTH), memory=memory)
    with pytest.raises(TypeError, match="head_dims: GatedDeltaNet has no such option; did you mean 'head_dim'"):
        GatedDeltaNet(WIDTH, num_heads=2, head_dims=3)
    with pytest.raises(TypeError, match="context_group: got str, expected a ProcessGroup"):
        set_context_group(layer, "ranks")
    with pytest.raises(ValueError, match="num_value_heads: got 3, expected a multiple of 2"):
        GatedDeltaNet(WIDTH, num_heads=2, num_value_heads=3)
    with pytest.raises(ValueError, match="output_gate: got 'relu'"):
        GatedDeltaNet(WIDTH, num_heads=2, output_gate="relu")
    with pytest.raises(ValueError, match=r"layer: got 'gated_deltanet'.*did you mean 'gated_delta_net'"):
        make_layer("gated_deltanet", WIDTH)
    with pytest.raises(TypeError, match="num_head: mamba2 has no such option"):
        make_layer("mamba2", WIDTH, num_head=2)
    with pytest.raises(ValueError, match="first_value: got None"):
        RWKV7(WIDTH, head_dim=8, layer_index=1, num_layers=2)(torch.zeros(1, 3, WIDTH))
    with pytest.raises(ValueError, match="head_dim: got 5, expected an even number"):
        SoftmaxAttention(WIDTH, num_heads=2, head_dim=5)
    with pytest.raises(ValueError, match="lower_bound: got 1"):
        make_layer("kimi_delta_attention", WIDTH, num_heads=2, lower_bound=1.0)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 3], TypeError, "cu_seqlens: got list, expected a tensor"),
        (torch.tensor([0.0, 3.0]), TypeError, "cu_seqlens: got dtype torch.float32, expected int32 or int64"),
        (torch.tensor([[0, 3]]), ValueError, r"cu_seqlens: got shape \[1, 2\]"),
        (torch.tensor([0, 2]), ValueError, r"cu_seqlens: got \[0, 2\], expected .* from 0 to T = 3"),
        (torch.tensor([0, 2, 1, 3]), ValueError, r"cu_seqlens: got \[0, 2, 1, 3\]"),
    ],
)
def test_errors_of_packed_lines(offsets, error, message):
    layer = GatedDeltaNet(WIDTH, num_heads=2)
    with pytest.raises(error, match=message):
        layer(torch.zeros(1, 3, WIDTH), cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens: got one with a batch of 2"):
        layer(torch.zeros(2, 3, WIDTH), cu_seqlens=torch.tensor([0, 3]))


@pytest.mark.parametrize("number", [2.0, -torch.inf], ids=str)
def test_a_mask_is_of_zeros_and_ones(number):
    """Without a zero in it, too: a mask to be added to scores (0 for a token) would mean the opposite."""
    layer = GatedDeltaNet(WIDTH, num_heads=2)
    with pytest.raises(ValueError, match="attention_mask: got numbers other than 0 and 1"):
        layer(torch.zeros(2, 3, WIDTH), attention_mask=torch.full((2, 3), number))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_saved_whole(name):
    """By ``torch.save``, or to another process, or copied: it computes the same, and still loads weights."""
    options = {"rwkv7": {"head_dim": 8}, "mamba2": {"head_dim": 8, "state_size": 6}}.get(name, {"num_heads": 2})
    layer, hidden_states = make_layer(name, WIDTH, **options), torch.randn(2, 5, WIDTH)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(hidden_states).output, layer(hidden_states).output)
        other.load_state_dict(layer.state_dict())
