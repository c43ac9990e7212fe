"""The engine on the CUDA solvers: what takes them, what is refused, and forward and gradients through their source."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch

import parallelflow as pf
from parallelflow.kernels.cpu.build import COMPILER
from parallelflow.solvers import Factorisation, cuda
from parallelflow.solvers.cuda import nvrtc
from parallelflow.solvers.cuda import solve as compiled
from parallelflow.testing import Sizes, relative_error
from tests.cases import MODELS, gradients, require_grad
from tests.solvers_cuda.on_cpu import layout_of, solve

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class OnCpu(Factorisation):
    """What stands for ``Compiled`` without a GPU: the same source, compiled as plain C++."""

    solved = 0

    def __init__(self, name, gram, block):
        self.name, self.gram, self.block, self.dtype = name, gram, block, gram.dtype

    def solve(self, right, transposed=False):
        OnCpu.solved += 1
        assert self.dtype == torch.float64
        assert not torch.is_grad_enabled() or not right.requires_grad
        batch = torch.broadcast_shapes(self.gram.shape[:-2], right.shape[:-2])
        gram, z = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (self.gram, right.double()))
        rows = gram.shape[-1]
        layout = layout_of(compiled.KERNELS[self.name], 8, rows // self.block, self.block)
        found = solve(gram, z, layout, transposed=transposed)[0]
        return found.unflatten(0, batch).to(right.dtype)

    def solve_transposed(self, right):
        return self.solve(right, True)

    def apply(self, right):
        return self.solve(right)

    def __getitem__(self, index):
        return OnCpu(self.name, self.gram[index], self.block)


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Tensors on the CPU pass for tensors on a Hopper GPU, and the kernels run on the CPU."""
    refusal = cuda.refusal
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    monkeypatch.setattr(cuda, "refusal", lambda name, device, *a: refusal(name, torch.device("cuda"), *a))
    for name in cuda.COMPILED:
        monkeypatch.setitem(cuda.COMPILED, name, lambda gram, block, name=name: OnCpu(name, gram, block))
    monkeypatch.setattr(OnCpu, "solved", 0)


def draw(name, sizes):
    model = next(model for model in MODELS if model.name == name)
    return model, model.inputs(sizes._replace(rows=model.rows))


@needs_compiler
@pytest.mark.parametrize("solver", cuda.COMPILED)
@pytest.mark.parametrize(("name", "chunk", "aggregate"), [
    ("delta_rule", 16, "sequential"), ("kimi_delta_attention", 5, "associative"),
    ("delta_product-2-none", 8, "segmented"), ("low_rank_flow-2-simultaneous-vector-raw", 7, "sequential"),
])  # fmt: skip
def test_forward_and_gradients(as_if_cuda, name, chunk, aggregate, solver):
    model, inputs = draw(name, Sizes(2, 23, 1, 2, 6, 5))
    found = []
    for options in ({"backend": "torch"}, {"backend": "cuda", "solver": solver}):
        tensors = require_grad(inputs)
        result = model(tensors, return_final_state=True, chunk_size=chunk, aggregate=aggregate, **options)
        found.append([*result, *gradients(result, tensors).values()])
    assert OnCpu.solved > 0
    for expected, got in zip(*found, strict=True):
        assert relative_error(got, expected) <= 1e-12


@needs_compiler
def test_packed_float32_and_states(as_if_cuda):
    model, inputs = draw("gated_delta_rule", Sizes(1, 30, 1, 2, 6, 5))
    options = {"cu_seqlens": torch.tensor([0, 11, 11, 30]), "return_final_state": True, "solver": "sigdelta"}
    exact = model(inputs, backend="torch", **options)
    found = model({key: x.float() for key, x in inputs.items()}, backend="cuda", chunk_size=16, **options)
    assert found.output.dtype == torch.float32
    assert relative_error(found.output, exact.output) <= 5e-7
    assert relative_error(found.final_state, exact.final_state) <= 5e-7


@needs_compiler
def test_gradients_of_gradients(as_if_cuda):
    _, inputs = draw("delta_rule", Sizes(1, 7, 1, 1, 3, 2))
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call(*tensors):
        return pf.delta_rule(*tensors, solver="sigdelta", chunk_size=4, backend="cuda").output

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@needs_compiler
def test_a_compiled_graph_has_the_choice_too(as_if_cuda):
    model, inputs = draw("delta_rule", Sizes(1, 9, 1, 1, 3, 2))
    graph = torch.compile(lambda **x: model(x, solver="sigdelta", backend="cuda").output, backend="aot_eager")
    assert relative_error(graph(**inputs), model(inputs).output) <= 1e-13
    assert OnCpu.solved > 0


@needs_compiler
def test_auto_takes_the_kernel_for_these_solvers_only(as_if_cuda):
    model, inputs = draw("delta_rule", Sizes(1, 20, 1, 1, 3, 2))
    for options, taken in (
        ({}, False), ({"solver": "sequential"}, False), ({"solver": "sigdelta", "backend": "torch"}, False),
        ({"solver": "sigdelta"}, True), ({"solver": "substitution"}, True),
        ({"solver": "sigdelta", "chunk_size": 256}, True), ({"solver": "sigdelta", "chunk_size": 257}, False),
    ):  # fmt: skip
        OnCpu.solved = 0
        model(inputs, **options)
        assert (OnCpu.solved > 0) == taken, options


@pytest.mark.parametrize(("options", "why"), [
    ({}, "solver='tensor_inverse', expected one of 'sigdelta', 'substitution'"),
    ({"solver": "sequential"}, "solver='sequential', expected one of"),
    ({"solver": "sigdelta", "chunk_size": 257}, "chunks of 257 rows, expected at most 256"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(as_if_cuda, options, why):
    model, inputs = draw("delta_rule", Sizes(1, 20, 1, 1, 3, 2))
    with pytest.raises(ValueError, match=f"backend: got 'cuda' with {why}"):
        model(inputs, backend="cuda", **options)


def test_rows_that_do_not_fit_are_refused(as_if_cuda):
    options = {"backend": "cuda", "solver": "sigdelta"}
    model, inputs = draw("ssd", Sizes(1, 20, 1, 1, 3, 2))
    with pytest.raises(ValueError, match="backend: got 'cuda' with no rows that read"):
        model(inputs, **options)
    key = torch.randn(1, 9, 5, 1, 4)
    with pytest.raises(ValueError, match="backend: got 'cuda' with 5 rows a token at once, expected at most 4"):
        pf.low_rank_flow(key[:, :, 0], key, read=-key, write=key, chunk_size=4, **options)
    with pytest.raises(ValueError, match="backend: got 'cuda' with chunks of 320 rows"):
        pf.delta_product(key[:, :, 0], key, key, torch.rand(1, 9, 5, 1), **options)


def test_another_device_is_refused():
    model, inputs = draw("delta_rule", Sizes(1, 20, 1, 1, 3, 2))
    with pytest.raises(ValueError, match="backend: got 'cuda' with tensors on cpu, expected a CUDA device"):
        model(inputs, backend="cuda", solver="sigdelta")
    with pytest.raises(ValueError, match="gram: got tensors on cpu, expected a CUDA device"):
        cuda.COMPILED["sigdelta"](torch.zeros(1, 4, 4), 1)


def test_older_cards_and_a_missing_compiler_are_refused(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "another GPU" in cuda.refusal("sigdelta", device, 16, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "available", lambda: False)
    assert "no NVRTC" in cuda.refusal("sigdelta", device, 16, 1)


@needs_compiler
def test_the_kernel_itself_is_well_formed(tmp_path):
    """``kernel.cu`` with CUDA's words given a meaning; a GPU compiler sees it where there is one."""
    words = "#define __global__\n#define __shared__\n#define __launch_bounds__(n)\ninline void __syncthreads() {}\n"
    words += "struct Three { unsigned x; };\ninline Three threadIdx, blockIdx;\n"
    for name in compiled.KERNELS.values():
        layout = layout_of(name, 4, 64, 2)
        defined = "".join(f"#define {key} {value}\n" for key, value in layout.definitions("float", "BFloat16").items())
        path = tmp_path / "kernel.cpp"
        path.write_text(defined + words + (compiled.SOURCE / "kernel.cu").read_text())
        command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{compiled.SOURCE}", str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC")
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", compiled.KERNELS.values())
def test_it_compiles_for_a_gpu(name, element):
    layout = layout_of(name, 4, 64, 2)
    assert compiled.machine_code(layout, torch.float32, element, "sm_90")[:4] == b"\x7fELF"
    with pytest.raises(nvrtc.Unavailable, match="NVRTC does not compile the kernel"):
        compiled.machine_code(replace(layout, solver="Nothing"), torch.float32, element, "sm_90")
