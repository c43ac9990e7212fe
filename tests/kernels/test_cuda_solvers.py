"""``sigdelta`` and ``substitution`` as CUDA kernels: systems of every shape, and the engine on top of them."""

import pytest
import torch

import parallelflow as pf
from parallelflow.solvers import SOLVERS
from parallelflow.solvers.cuda import COMPILED, nvrtc
from parallelflow.testing import Sizes, relative_error
from tests.cases import MODELS, by_name, gradients, require_grad

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not nvrtc.available(), reason="needs an NVIDIA GPU and NVRTC"
)

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SHAPES = [(1, 1, 3), (1, 17, 33), (1, 64, 256), (1, 256, 40), (2, 33, 130), (3, 21, 64), (4, 64, 100)]
KINDS = [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
         (torch.float64, torch.float32)]  # fmt: skip


def system(rank, tokens, columns, systems=3, correlated=False):
    """G in float64 of rows that read -k / rank and write k, and a right side."""
    generator = torch.Generator().manual_seed(rank * tokens)
    rows = rank * tokens
    keys = torch.randn(systems, rows, 32, generator=generator, dtype=torch.float64)
    if correlated:
        keys = torch.nn.functional.normalize(keys, dim=-1) * 0.02 + torch.ones(32) / 32**0.5
    keys = torch.nn.functional.normalize(keys, dim=-1)
    token = torch.arange(rows) // rank
    gram = -keys @ keys.mT / rank * (token[:, None] > token[None, :])
    right = torch.randn(systems, rows, columns, generator=generator, dtype=torch.float64)
    return gram.cuda(), right.cuda()


def check_solves(name, rank, tokens, columns, number, element):
    """As near as a backward stable method gets, a rounding a stage; the same bits again, and without the others."""
    for correlated in (False, True):
        gram, right = (x.to(dtype) for x, dtype in zip(system(rank, tokens, columns, correlated=correlated),
                                                       (number, element), strict=True))  # fmt: skip
        exact = torch.eye(gram.shape[-1], dtype=torch.float64, device="cuda") - gram.double()
        factors = COMPILED[name](gram, rank)
        rounding = UNIT[number] * float(torch.linalg.cond(exact).max()) * (2 * rank * tokens) ** 0.5
        for found, matrix in ((factors.solve(right), exact), (factors.solve_transposed(right), exact.mT)):
            assert found.dtype == element
            assert relative_error(found, torch.linalg.solve(matrix, right.double())) <= rounding + UNIT[element]
        found = factors.solve(right)
        assert torch.equal(factors.solve(right), found)
        assert torch.equal(factors[1:2].solve(right[1:2]), found[1:2])


@pytest.mark.parametrize(("rank", "tokens", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_solve_and_its_transpose(name, rank, tokens, columns):
    check_solves(name, rank, tokens, columns, torch.float32, torch.float32)


@pytest.mark.parametrize(("number", "element"), KINDS, ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_dtypes_of_systems(name, number, element):
    check_solves(name, 2, 33, 130, number, element)


@pytest.mark.parametrize("name", COMPILED)
def test_more_than_shared_memory_holds(name):
    check_solves(name, 1, 256, 40, torch.float64, torch.float64)


def test_right_sides_of_any_layout():
    gram, right = system(1, 20, 30)
    factors = COMPILED["sigdelta"](gram, 1)
    expected = factors.solve(right)
    assert torch.equal(factors.solve(right.mT.contiguous().mT), expected)
    wide = COMPILED["sigdelta"](gram[:1], 1).solve(right)
    assert torch.equal(wide[1], COMPILED["sigdelta"](gram[:1], 1).solve(right[1:2])[0])
    assert factors.solve(right[..., :0]).shape == (3, 20, 0)


def test_what_is_not_solved_is_refused():
    gram, right = system(1, 20, 30)
    factors = COMPILED["sigdelta"](gram, 1)
    with pytest.raises(TypeError, match=r"gram: got torch\.float16"):
        COMPILED["sigdelta"](gram.half(), 1)
    with pytest.raises(ValueError, match=r"right: got 19 rows .* expected 20"):
        factors.solve(right[:, 1:])
    with pytest.raises(RuntimeError, match="right: got a system that autograd records"):
        factors.solve(right.requires_grad_())


SERVED = {"delta_rule", "gated_delta_rule", "kimi_delta_attention", "comba", "delta_product-2-none", "rwkv7",
          "low_rank_flow-2-simultaneous-vector-raw", "low_rank_flow-4-simultaneous-scalar-raw",
          "low_rank_flow-4-sequential-scalar-decayed"}  # fmt: skip
READING = [model for model in MODELS if model.name in SERVED]
assert len(READING) == len(SERVED)


def run(model, inputs, state, **options):
    tensors = require_grad({**inputs, "initial_state": state})
    result = model(tensors, return_final_state=True, **options)
    return {"output": result.output.detach(), "state": result.final_state.detach(),
            **gradients([result.output, result.final_state], tensors)}  # fmt: skip


def compare(model, sizes, dtype, starts=None, change=None, **options):
    """At most twice the error that rounding makes (16 bits), or the plain float32 engine."""
    inputs = model.inputs(sizes)
    if change is not None:
        change(inputs)
    numbers = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {name: x.to(dtype if x.ndim > 3 and name != "log_decay" else numbers) for name, x in inputs.items()}
    inputs = {name: x.cuda() for name, x in inputs.items()}
    count = sizes.batch if starts is None else len(starts) - 1
    shape = (count, sizes.value_heads, sizes.key_size, model.state_value_size(sizes.value_size))
    state = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 3).to("cuda", numbers)
    packed = {} if starts is None else {"cu_seqlens": torch.tensor(starts, device="cuda")}
    found = run(model, inputs, state, **packed, **options)
    again = run(model, inputs, state, **packed, **options)
    exact = run(model, {name: x.double() for name, x in inputs.items()}, state.double(), backend="torch", **packed)
    single = {} if dtype == torch.float64 else run(
        model, {name: x.float() for name, x in inputs.items()}, state, backend="torch", **packed)  # fmt: skip
    for name, expected in exact.items():
        if name != "log_decay":  # summed by index_add_, which has no fixed order on a GPU
            assert torch.equal(found[name], again[name]), f"{name}: other bits in a second run"
        error = relative_error(found[name], expected)
        rounding = (4 if numbers is dtype else 3) * UNIT[dtype]
        allowed = 2 * max(relative_error(single[name], expected), rounding) if single else 1e-12
        assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("solver", COMPILED)
@pytest.mark.parametrize("model", READING, ids=by_name)
def test_the_engine(model, solver):
    compare(model, Sizes(2, 37, 1, 2, 20, 18, model.rows), torch.float32, solver=solver, backend="cuda", chunk_size=16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = next(model for model in READING if model.name == "gated_delta_rule")
    compare(model, Sizes(1, 70, 1, 2, 32, 32, 1), dtype, solver="sigdelta", backend="cuda", chunk_size=32)


@pytest.mark.parametrize("aggregate", ["associative", "segmented"])
def test_aggregates_and_packed_lines(aggregate):
    model = next(model for model in READING if model.name == "delta_product-2-none")
    compare(model, Sizes(1, 40, 1, 2, 16, 16, 2), torch.float32, starts=[0, 21, 21, 40], solver="sigdelta",
            backend="cuda", chunk_size=8, aggregate=aggregate)  # fmt: skip


def test_decays_of_every_strength():
    model = next(model for model in READING if model.name == "kimi_delta_attention")

    def change(inputs):
        decay = inputs["log_decay"]
        choice = torch.randint(0, 5, decay.shape, generator=torch.Generator().manual_seed(2))
        for place, value in enumerate((-100.0, -1e-6, 0.0)):
            decay.masked_fill_(choice == place, value)

    compare(model, Sizes(1, 70, 1, 1, 16, 16, 1), torch.float32, change=change, solver="sigdelta", backend="cuda")


def test_correlated_keys_and_beta_of_two():
    """Where a float32 G would not do: the kernel takes it in float64."""
    model = next(model for model in READING if model.name == "delta_rule")

    def change(inputs):
        inputs["key"].mul_(0.02).add_(1).div_(inputs["key"].norm(dim=-1, keepdim=True))
        inputs["beta"].fill_(2)

    compare(model, Sizes(1, 64, 1, 1, 16, 16, 1), torch.float32, change=change, solver="sigdelta", backend="cuda")


def test_auto_takes_the_kernel_and_torch_does_not(monkeypatch):
    model = next(model for model in READING if model.name == "delta_rule")
    inputs = {name: x.float().cuda() for name, x in model.inputs(Sizes(1, 40, 1, 1, 16, 16, 1)).items()}
    launches, solve = [], nvrtc.Kernel.launch
    monkeypatch.setattr(nvrtc.Kernel, "launch", lambda self, *a: launches.append(1) or solve(self, *a))
    expected = model(inputs, solver="sigdelta", backend="torch").output
    model(inputs)
    assert not launches
    found = model(inputs, solver="sigdelta").output
    assert launches
    assert relative_error(found, expected.double()) <= 1e-6
    launches.clear()
    model(inputs, solver="sigdelta", chunk_size=512)  # more rows than the kernel has
    assert not launches
    with pytest.raises(ValueError, match="backend: got 'cuda' with chunks of 512 rows, expected at most 256"):
        model(inputs, solver="sigdelta", chunk_size=512, backend="cuda")


def test_gradients_of_gradients_and_compiled_graphs():
    key = torch.nn.functional.normalize(torch.randn(1, 9, 1, 8, device="cuda", dtype=torch.float64), dim=-1)
    beta = torch.rand(1, 9, 1, device="cuda", dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (key.clone(), key, key.clone(), beta)]

    def call(*tensors):
        return pf.delta_rule(*tensors, solver="sigdelta", chunk_size=4, backend="cuda").output

    assert torch.autograd.gradgradcheck(call, leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*leaves), call(*leaves))


def test_threads_that_have_no_context_yet():
    """Autograd's threads, and any other."""
    from concurrent.futures import ThreadPoolExecutor

    gram, right = system(1, 20, 30)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(COMPILED["sigdelta"](gram, 1).solve, right).result()
    assert relative_error(found, SOLVERS["sigdelta"](gram, 1).solve(right)) <= 1e-14
