"""FLA's functions against FLA's recurrences: outputs, states, gradients, and every keyword they take."""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from parallelflow.compat import fla
from tests.compat import fla_recurrences as naive

B, T, H, HV, K, V, N = 2, 7, 2, 4, 5, 3, 2  # N: Householder steps a token
KEY, VALUE, HEAD, CHANNEL = (H, K), (HV, V), (HV,), (HV, K)
LAYER = {"layer_idx": 1, "num_layers": 4}


def head_sizes(**shapes):
    """The same with as many key heads as value heads, for families without grouped values."""
    return {name: (HV, *shape[1:]) for name, shape in shapes.items()}


QKV = {"q": KEY, "k": KEY, "v": VALUE}
PLAIN = head_sizes(**QKV)
LOW_RANK = head_sizes(q=KEY, k=KEY, v=VALUE, a=KEY, b=KEY)
FAMILY = {  # the functions of a model: the axes of its tensors after [B, T], and its step
    "delta_rule": ({**PLAIN, "beta": HEAD}, naive.delta),
    "gated_delta_rule": ({**QKV, "g": HEAD, "beta": HEAD}, naive.delta),
    "gdn": ({**QKV, "g": HEAD, "beta": HEAD}, naive.delta),
    "kda": ({**QKV, "g": CHANNEL, "beta": HEAD}, naive.delta),
    "gdn2": ({**PLAIN, "g": CHANNEL, "b": CHANNEL, "w": VALUE}, naive.gdn2),
    "comba": ({**QKV, "p": KEY, "g": HEAD, "beta": HEAD}, naive.comba),
    "gated_delta_product": ({**PLAIN, "g": HEAD, "beta": HEAD}, naive.product),
    "rwkv7": ({"r": (HV, K), "w": CHANNEL, "k": (HV, K), "v": VALUE, "a": CHANNEL, "b": CHANNEL}, naive.plus_low_rank),
    "dplr_delta_rule": ({**LOW_RANK, "gk": CHANNEL}, naive.plus_low_rank),
    "iplr_delta_rule": (LOW_RANK, naive.plus_low_rank),
    "gla": ({**PLAIN, "g": CHANNEL}, naive.write_only),
    "simple_gla": ({**PLAIN, "g": HEAD}, naive.write_only),
    "retention": (PLAIN, naive.write_only),
    "lightning_attn": (PLAIN, naive.write_only),
    "linear_attn": (PLAIN, naive.write_only),
}
NAMES = [name for names in fla.FAMILIES.values() for name in names if name != "fused_mul_recurrent_rwkv7"]


def family(name):
    return name.removeprefix("chunk_").removeprefix("fused_recurrent_").removeprefix("fused_chunk_")


def takes(name, keyword):
    return keyword in inspect.signature(getattr(fla, name)).parameters


def default_of(name, keyword):
    return inspect.signature(getattr(fla, name)).parameters[keyword].default


def draw(name, length=T, batch=B):
    """The tensors of a function by its own letters: log-decays negative, β in (0, 1), low rank small."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shapes, _ = FAMILY[family(name)]
    tensors = {}
    for letter, axes in shapes.items():
        steps = N if family(name) == "gated_delta_product" and letter in ("k", "v", "beta") else 1
        x = torch.randn(batch, length * steps, *axes, generator=generator, dtype=torch.float64)
        if letter in ("g", "gk") or (letter == "w" and family(name) == "rwkv7"):
            x = -x.exp() / 4
        elif letter == "beta" or (letter in "bw" and family(name) == "gdn2"):
            x = x.sigmoid()
        elif letter in ("a", "b"):
            x = x / 4
        tensors[letter] = x.requires_grad_()
    if family(name) == "gla" and name.startswith("fused_recurrent"):
        tensors["gk"] = tensors.pop("g")
    return tensors


def expected(name, tensors, *, initial_state=None, scale=None, output_final_state=None, use_qk_l2norm_in_kernel=False,
             cu_seqlens=None, reverse=False, state_v_first=False, **other):  # fmt: skip
    """What the recurrence makes of a call, in the layouts of FLA."""
    x = dict(tensors)
    if family(name) == "rwkv7":
        x = {"q": x.pop("r"), "gk": x.pop("w"), **x}
    if family(name) in ("kda", "gdn2", "gla") and "g" in x:
        x["gk"] = x.pop("g")
    if family(name) == "retention":
        x["g_gamma"] = naive.retention_decay(HV)
    if family(name) == "lightning_attn":
        x["g_gamma"] = naive.lightning_decay(HV, **LAYER)
    if "beta" in x and x["beta"].ndim == 3:
        x["beta"] = x["beta"].unsqueeze(-1)
    if family(name) == "gated_delta_product":  # a token's steps beside each other, before the last axis
        x |= {letter: x[letter].unflatten(1, (-1, N)).transpose(2, 3) for letter in ("k", "v", "beta")}
    if use_qk_l2norm_in_kernel:
        x |= {letter: naive.unit(x[letter]) for letter in ("q", "k", "p") if letter in x}
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if scale is None:
        scale = 1.0 if name == "chunk_rwkv7" else K**-0.5
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    extra = {key: other[key] for key in ("normalize", "z") if key in other}
    output, final, z = naive.run(
        FAMILY[family(name)][1], x.pop("q"), scale, initial_state, V, bounds, reverse, **extra, **x
    )
    return output, final.transpose(-1, -2) if state_v_first else final, z


def call(name, tensors, **options):
    if family(name) == "lightning_attn":
        options |= LAYER
    if family(name) == "gated_delta_product":
        options["num_householder"] = N
    return getattr(fla, name)(**tensors, **options)


def close(actual, wanted, what):
    error = (actual - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error < 1e-11, f"{what}: relative error {error:.1e}"


def compare(name, tensors, options, recurrence=None, leaves=()):
    """Output, final state, and the gradients of every tensor, initial state included."""
    wanted, wanted_state, _ = (recurrence or functools.partial(expected, name, tensors))(**options)
    output, state = call(name, tensors, output_final_state=True, **options)
    assert state.shape == wanted_state.shape
    close(output, wanted, "output")
    close(state, wanted_state, "final state")
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (output, state)]
    inputs = [*tensors.values(), *leaves]
    if options.get("initial_state") is not None:
        inputs.append(options["initial_state"])
    gradients = [
        torch.autograd.grad((o * weights[0]).sum() + (s * weights[1]).sum(), inputs)
        for o, s in ((output, state), (wanted, wanted_state))
    ]
    for tensor, actual, reference in zip(inputs, *gradients, strict=True):
        close(actual, reference, f"gradient of a tensor {list(tensor.shape)}")


def initial_state(name, sequences=B, state_v_first=False):
    generator = torch.Generator().manual_seed(2)
    shape = (V, K) if state_v_first else (K, V)
    return torch.randn(sequences, HV, *shape, generator=generator, dtype=torch.float64).requires_grad_()


def unnormalized(name):
    return {"normalize": False} if takes(name, "normalize") else {}


@pytest.mark.parametrize("name", NAMES)
def test_recurrence(name):
    """From a state, with every switch that the function has turned on: reversed, normalised, the state transposed."""
    options = {key: True for key in ("use_qk_l2norm_in_kernel", "reverse", "state_v_first") if takes(name, key)}
    state = initial_state(name, state_v_first=options.get("state_v_first", False))
    compare(name, draw(name), {**options, "initial_state": state, "scale": 0.3, **unnormalized(name)})


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_packed_sequences(name):
    """Defaults of every option; packed sequences are the same alone, an empty one keeps its state."""
    compare(name, draw(name), unnormalized(name))
    tensors = draw(name, batch=1)
    cu_seqlens = torch.tensor([0, 3, 3, T])
    options = {"cu_seqlens": cu_seqlens, "initial_state": initial_state(name, 3), **unnormalized(name)}
    options |= {key: True for key in ("reverse",) if takes(name, key)}
    compare(name, tensors, options)
    if takes(name, "cu_seqlens_cpu"):
        output, _ = call(name, tensors, **options, cu_seqlens_cpu=cu_seqlens)
        close(output, expected(name, tensors, **options)[0], "with cu_seqlens_cpu")


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back(name):
    """No state unless asked for (RWKV-7's recurrent form: unless refused); bfloat16 in and out, states in float32."""
    tensors = {letter: x.detach().bfloat16() for letter, x in draw(name).items()}
    output, state = call(name, tensors, **unnormalized(name))
    assert output.dtype == torch.bfloat16
    assert output.shape == (B, T, HV, V)
    assert (state is not None) == (name == "fused_recurrent_rwkv7")
    state = initial_state(name).detach().bfloat16()
    output, state = call(name, tensors, initial_state=state, output_final_state=True, **unnormalized(name))
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert state.shape == (B, HV, K, V)


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "chunk_size")])
def test_chunk_size(name):
    tensors = {letter: x.detach() for letter, x in draw(name, length=40).items()}
    close(call(name, tensors, chunk_size=16)[0], expected(name, tensors)[0], "in chunks of 16")


GATED = [name for name in NAMES if takes(name, "use_gate_in_kernel")]


@pytest.mark.parametrize(
    ("name", "bound"),
    [(name, bound) for name in GATED for bound in (None, -4.0) if bound is None or takes(name, "lower_bound")],
)
def test_gate_in_kernel(name, bound):
    """-e^A softplus(g + bias), or bounded: lower_bound · sigmoid(e^A (g + bias))."""
    tensors = draw(name)
    heads = tensors["g"].shape[2:]
    A_log, dt_bias = (
        torch.randn(heads[0]).double().requires_grad_(),
        torch.randn(heads.numel()).double().requires_grad_(),
    )
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    if bound is not None:
        options |= {"lower_bound": bound} | ({"safe_gate": True} if takes(name, "safe_gate") else {})

    def recurrence(**_):
        gated = naive.softplus_gate(tensors["g"], A_log, dt_bias)
        if bound is not None:
            gated = naive.bounded_gate(tensors["g"], A_log, dt_bias, bound)
        return expected(name, {**tensors, "g": gated})

    compare(name, tensors, options, recurrence, leaves=(A_log, dt_bias))


def test_gate_without_rate():
    """A bounded gate whose rate is left out has rate 1; a gate without either says what it lacks."""
    tensors = {letter: x.detach() for letter, x in draw("chunk_kda").items()}
    gated = -3 * torch.sigmoid(tensors["g"])
    output, _ = fla.chunk_kda(**tensors, use_gate_in_kernel=True, lower_bound=-3.0)
    close(output, expected("chunk_kda", {**tensors, "g": gated})[0], "output")
    with pytest.raises(ValueError, match="A_log: got None"):
        fla.chunk_kda(**tensors, use_gate_in_kernel=True)
    with pytest.raises(ValueError, match="A_log: got a tensor with use_gate_in_kernel=False"):
        fla.chunk_kda(**tensors, A_log=torch.zeros(HV))
    for bound in (None, -6.0, 0.0):
        with pytest.raises(ValueError, match="lower_bound: got"):
            fla.chunk_kda(**tensors, use_gate_in_kernel=True, A_log=torch.zeros(HV), safe_gate=True, lower_bound=bound)


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "use_beta_sigmoid_in_kernel")])
@pytest.mark.parametrize("negative", [False, True])
def test_beta_sigmoid_in_kernel(name, negative):
    tensors = draw(name)
    options = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": negative}

    def recurrence(**_):
        return expected(name, {**tensors, "beta": (1 + negative) / (1 + torch.exp(-tensors["beta"]))})

    compare(name, tensors, options, recurrence)
    with pytest.raises(ValueError, match="allow_neg_eigval"):
        call(name, tensors, allow_neg_eigval=True)


@pytest.mark.parametrize(
    "name",
    ["fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda", "fused_recurrent_comba"],
)
def test_beta_of_every_value_channel(name):
    tensors = draw(name)
    tensors["beta"] = torch.rand(B, T, HV, V, dtype=torch.float64).requires_grad_()
    first = {"state_v_first": True} if takes(name, "state_v_first") else {}
    state = initial_state(name, state_v_first=bool(first))
    compare(name, tensors, {"initial_state": state, **first})


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        *(("fused_recurrent_gated_delta_rule", decays) for decays in ("gv", "gk", "g gv", "g gk gv", "gk gv", "")),
        *(("fused_recurrent_gla", decays) for decays in ("gv", "gk", "gk gv", "")),
    ],
)
def test_decays_of_channels(name, decays):
    """A head's, a key channel's and a value channel's decay, alone and together; none at all."""
    tensors = draw(name)
    for letter in ("g", "gk"):
        tensors.pop(letter, None)
    shapes = {"g": HEAD, "gk": CHANNEL, "gv": VALUE}
    for letter in decays.split():
        tensors[letter] = (-torch.rand(B, T, *shapes[letter], dtype=torch.float64)).requires_grad_()
    compare(name, tensors, {"initial_state": initial_state(name)})


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "beta") and default_of(name, "beta") is None])
def test_beta_left_out(name):
    """Where β has a default it is 1."""
    tensors = {letter: x.detach() for letter, x in draw(name).items()}
    ones = expected(name, {**tensors, "beta": torch.ones_like(tensors["beta"])})[0]
    close(call(name, {letter: x for letter, x in tensors.items() if letter != "beta"})[0], ones, "output")


@pytest.mark.parametrize("both", [True, False])
def test_simple_gla_with_a_decay_of_the_head(both):
    tensors = draw("chunk_simple_gla")
    tensors["g_gamma"] = (-torch.rand(HV, dtype=torch.float64)).requires_grad_()
    if not both:
        tensors.pop("g")
    for name in ("chunk_simple_gla", "fused_recurrent_simple_gla"):
        compare(name, tensors, {"reverse": True} if takes(name, "reverse") else {})


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "return_intermediate_states")])
@pytest.mark.parametrize("bounds", [None, [0, 0, 3, 4, T], [0, 1, 2, T, T]])
@pytest.mark.parametrize("started", [True, False])
def test_states_between_chunks(name, bounds, started):
    """A third result: the state that each chunk of each sequence starts from, in the output's dtype."""
    batch = B if bounds is None else 1
    tensors = {letter: x.detach() for letter, x in draw(name, batch=batch).items()}
    ends = [0, T] if bounds is None else bounds
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    state = initial_state(name, B if bounds is None else len(bounds) - 1).detach() if started else None
    wanted = []
    for n, (start, stop) in enumerate(pairwise(ends)):
        entry = state if state is None or bounds is None else state[n : n + 1]
        for place in range(start, stop, 2):
            before = {letter: x[:, start:place] for letter, x in tensors.items()}
            wanted.append(expected(name, before, initial_state=entry)[1])
    for first in (False, True):
        given = None if state is None else state.transpose(-1, -2) if first else state
        options = {"initial_state": given, "state_v_first": first, "chunk_size": 2, **packed}
        output, final, states = call(name, tensors, return_intermediate_states=True, output_final_state=True, **options)
        close(states.transpose(-1, -2) if first else states, torch.stack(wanted, 1), "states")
        close(output, call(name, tensors, **options)[0], "output")
        close(final, call(name, tensors, output_final_state=True, **options)[1], "final state")
        assert call(name, tensors, return_intermediate_states=True, **options)[1] is None
    half = {letter: x.half() for letter, x in tensors.items()}
    assert call(name, half, return_intermediate_states=True, **packed)[2].dtype == torch.float16


def test_no_chunk_no_state():
    tensors = {letter: x.detach()[:, :0] for letter, x in draw("chunk_kda").items()}
    assert fla.chunk_kda(**tensors, return_intermediate_states=True)[2].shape == (B, 0, HV, K, V)


def test_comba_without_a_removal_key():
    """None is the key."""
    tensors = {letter: x.detach() for letter, x in draw("chunk_comba").items()}
    wanted = expected("chunk_comba", {**tensors, "p": tensors["k"]})[0]
    close(fla.chunk_comba(**{**tensors, "p": None})[0], wanted, "output")


def test_gated_delta_product_without_a_gate():
    tensors = {letter: x.detach() for letter, x in draw("chunk_gated_delta_product").items()}
    wanted = expected("chunk_gated_delta_product", {**tensors, "g": None})[0]
    close(call("chunk_gated_delta_product", {**tensors, "g": None})[0], wanted, "output")
    with pytest.raises(ValueError, match="k: got 14 steps for 7 tokens"):
        fla.chunk_gated_delta_product(**tensors, num_householder=3)


def test_rwkv7_from_its_layers_tensors():
    """Reads -kk, writes kk ⊙ a; forwards and backwards in time."""
    x = draw("chunk_rwkv7")
    r, w, k, v, kk, a = x["r"], x["w"], x["k"], x["v"], x["a"], x["b"]
    apart = {"r": r, "w": w, "k": k, "v": v, "a": -kk, "b": kk * a}
    for reverse in (False, True):
        wanted, wanted_state, _ = expected("chunk_rwkv7", apart, reverse=reverse)
        output, state = fla.fused_mul_recurrent_rwkv7(r, w, k, v, kk, a, reverse=reverse, output_final_state=True)
        close(output, wanted, "output")
        close(state, wanted_state, "state")


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "normalize")])
@pytest.mark.parametrize("start", ["zero", "matrix", "both", "sums"])
def test_normalized_linear_attention(name, start):
    """The state is a pair whose second part always comes; both parts carry on and have gradients."""
    tensors = {letter: x.detach().abs().requires_grad_() for letter, x in draw(name).items()}  # a divisor far from 0
    S, z = initial_state(name), torch.rand(B, 1, HV, K, dtype=torch.float64).requires_grad_()
    given = {"zero": None, "matrix": S, "both": (S, z), "sums": (None, z)}[start]
    output, (state, sums) = call(name, tensors, initial_state=given, normalize=True, output_final_state=True)
    entry = {"initial_state": S if start in ("matrix", "both") else None, "normalize": True}
    if start in ("both", "sums"):
        entry["z"] = z.squeeze(1)
    wanted, wanted_state, wanted_sums = expected(name, tensors, **entry)
    leaves = [*tensors.values(), *([S] if start in ("matrix", "both") else []), *([z] if "z" in entry else [])]
    close(output, wanted, "output")
    close(state, wanted_state, "state")
    close(sums.squeeze(1), wanted_sums, "sums of keys")
    actual = torch.autograd.grad(output.square().sum() + state.sum() + sums.square().sum(), leaves)
    reference = torch.autograd.grad(wanted.square().sum() + wanted_state.sum() + wanted_sums.square().sum(), leaves)
    for tensor, ours, theirs in zip(leaves, actual, reference, strict=True):
        close(ours, theirs, f"gradient of a tensor {list(tensor.shape)}")
    without = call(name, tensors, normalize=True)[1]
    assert without[0] is None
    assert without[1].shape == (B, 1, HV, K)


RECORD = json.loads(Path(__file__).with_name("fla_signatures.json").read_text())


@pytest.mark.parametrize("name", RECORD["functions"])
def test_signature(name):
    """FLA's parameters in FLA's order with FLA's defaults; what more there is can only be given by name."""
    recorded = RECORD["functions"][name]
    parameters = inspect.signature(getattr(fla, name)).parameters
    ours = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours] == recorded["parameters"]
    assert {p.name: p.default for p in ours if p.default is not p.empty} == recorded["defaults"]
    further = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(ours) + len(further) == len(parameters)
    assert recorded["further_keywords"] or not further
    assert all(p.default is not p.empty for p in further)


def test_every_function_is_recorded():
    assert set(RECORD["functions"]) == {name for names in fla.FAMILIES.values() for name in names}
    assert set(RECORD["functions"]) <= set(fla.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keywords_are_named(name):
    with pytest.raises(TypeError, match=rf"output_finalstate: unknown keyword of {canonical(name)}; did you mean "
                       r"'output_final_state'\?; the keywords are "):  # fmt: skip
        call(name, draw(name), output_finalstate=True)


def canonical(name):
    return getattr(fla, name).__name__


def test_arguments_that_do_not_fit():
    x = draw("chunk_delta_rule")
    q, k, v, beta = x.values()
    with pytest.raises(TypeError, match="beta: not given to chunk_delta_rule"):
        fla.chunk_delta_rule(q, k, v)
    with pytest.raises(TypeError, match="k: given to chunk_delta_rule twice"):
        fla.chunk_delta_rule(q, k, v, beta, k=k)
    with pytest.raises(TypeError, match="got 11 positional arguments, expected at most 10: q, k"):
        fla.chunk_delta_rule(q, k, v, beta, *[None] * 7)
    with pytest.raises(ValueError, match="cp_context: got 1, expected one with a group and cu_seqlens"):
        fla.chunk_gated_delta_rule(**draw("chunk_gated_delta_rule"), cp_context=1)
    with pytest.raises(ValueError, match="cp_context: got the layout 'zigzag', expected 'contiguous'"):
        fla.chunk_kda(**draw("chunk_kda"), cp_context=SimpleNamespace(layout="zigzag"))
    with pytest.raises(ValueError, match="cp_context: got one with initial_state or output_final_state"):
        fla.chunk_kda(**draw("chunk_kda"), cp_context=SimpleNamespace(), output_final_state=True)
    with pytest.raises(ValueError, match="use_graph: got True with cu_seqlens, expected False"):
        fla.chunk_kda(**draw("chunk_kda", batch=1), use_graph=True, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ValueError, match="chunk_size: got 0, expected"):
        fla.chunk_kda(**draw("chunk_kda"), chunk_size=0)
    with pytest.raises(TypeError, match="initial_state: got tuple, expected a tensor"):
        fla.chunk_delta_rule(q, k, v, beta, initial_state=(None, None))
    with pytest.raises(ValueError, match=r"lower_bound: got 1\.0, expected a negative number"):
        fla.chunk_rwkv7(**draw("chunk_rwkv7"), lower_bound=1.0)


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("chunk_gated_delta_rule", {"head_first": True}, TypeError, "head_first: not taken by chunk_gated"),
        ("chunk_gated_delta_rule", {"beta": None}, TypeError, "beta: got None for chunk_gated_delta_rule"),
        ("chunk_kda", {"g": None}, TypeError, "g: got None for chunk_kda"),
        ("chunk_gla", {"g": None}, TypeError, "g: got None for chunk_gla"),
        ("chunk_kda", {"g": torch.zeros(B, T, HV)}, ValueError, r"g: got shape \[2, 7, 4\] with 3 axes, expected"),
        ("chunk_rwkv7", {"w": torch.zeros(B, T, HV)}, ValueError, r"w: got shape \[2, 7, 4\]"),
        ("chunk_simple_gla", {"g": None, "g_gamma": torch.zeros(3)}, ValueError, r"g_gamma: got shape \[3\]"),
        ("fused_recurrent_gla", {"gv": torch.zeros(B, T, HV)}, ValueError, r"gv: got shape \[2, 7, 4\], expected"),
        ("fused_recurrent_delta_rule", {"beta": torch.zeros(B, T, HV, 2)}, ValueError,
         r"beta: got shape \[2, 7, 4, 2\]"),
        ("chunk_gated_delta_rule", {"use_gate_in_kernel": True, "A_log": torch.zeros(3)}, ValueError,
         r"A_log: got shape \[3\], expected 4 numbers"),
        ("chunk_linear_attn", {"initial_state": [None]}, ValueError, "initial_state: got list, expected a tensor"),
        ("chunk_linear_attn", {"initial_state": (None, torch.zeros(B, HV, K))}, ValueError,
         r"initial_state: got \[2, 4, 5\], expected a tensor \[N, 1, 4, 5\]"),
        ("chunk_gated_delta_rule", {"cu_seqlens": torch.tensor([0, T])}, ValueError,
         "cu_seqlens: got one with a batch of 2"),
        ("chunk_gated_delta_rule", {"initial_state": torch.zeros(1, HV, K, V).double()}, ValueError,
         "initial_state: got shape"),
    ],
)  # fmt: skip
def test_errors_name_flas_arguments(name, changes, error, said):
    with pytest.raises(error, match=said):
        call(name, {**draw(name), **changes})


def test_former_name_of_state_v_first():
    x = draw("chunk_gated_delta_rule")
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is the former name"):
        _, state = fla.chunk_gated_delta_rule(**x, output_final_state=True, transpose_state_layout=True)
    assert state.shape == (B, HV, V, K)
    with pytest.raises(ValueError, match="transpose_state_layout: got a value beside state_v_first"):
        fla.chunk_gated_delta_rule(**x, state_v_first=True, transpose_state_layout=True)


def test_compiles_whole():
    """FLA's functions are opaque to the compiler; these are not."""
    tensors = {letter: x.detach().float() for letter, x in draw("chunk_gated_delta_rule").items()}
    compiled = torch.compile(fla.chunk_gated_delta_rule, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors)[0], fla.chunk_gated_delta_rule(**tensors)[0])
