"""FLA itself, apart, on a CPU: its signatures, its kernels in Triton's interpreter, ``install`` in it.

    python -m tests.compat.fla_itself signatures states install layers context transformers
    python -m tests.compat.fla_itself chunk_kda chunk_comba …

Prints JSON, a line each. A process of its own, with ``TRITON_INTERPRET=1``: Transformers takes FLA's kernels wherever
FLA is importable, on a CPU too, where they do not run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import warnings

import numpy as np
import torch

import tests.kernels.conftest  # noqa: F401  mends the interpreter
from benchmarks.beside_fla import Sizes, check, variants
from benchmarks.check_fla import without_tuning
from parallelflow.compat import fla as ours
from parallelflow.compat.fla.context import boundaries

SMALL = Sizes(batch=1, time=16, key_heads=1, value_heads=2, key_dim=16, value_dim=16, packed=(0, 7, 8, 16))


FAMILY_OF = {name: family for family, names in ours.FAMILIES.items() for name in names}


def theirs(name: str):
    return getattr(importlib.import_module(f"fla.ops.{FAMILY_OF[name]}"), name)


def signatures() -> None:
    """Of each function: its parameters and defaults, and what it reads from its ``**kwargs``."""
    for name in FAMILY_OF:
        function = inspect.unwrap(theirs(name))
        parameters = inspect.signature(function).parameters.values()
        read = set(re.findall(r"kwargs\.(?:get|pop)\(['\"](\w+)", inspect.getsource(function)))
        read |= set(re.findall(r"['\"](\w+)['\"] in kwargs", inspect.getsource(function)))
        told = [
            (p.name, "required" if p.default is p.empty else repr(p.default))
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        taken = any(p.kind is p.VAR_KEYWORD for p in parameters)
        print(json.dumps({"signature": name, "parameters": told, "read": sorted(read), "further": taken}))


class Whole(int):
    """A loop's counter, of which FLA's kernels ask ``.to(tl.int64)`` as of a tensor."""

    def to(self, dtype, **_):
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        kind = np.int64 if dtype == tl.int64 else np.int32
        return tl.tensor(TensorHandle(np.array([int(self)], dtype=kind), dtype), dtype)


def counted(*bounds):
    return (Whole(i) for i in range(*bounds))


def mend_modules() -> None:
    """What FLA's modules hold by name and the interpreter can only replace in ``triton.language``, or does not know."""
    import triton.language as tl

    for module in [module for name, module in sys.modules.items() if name.startswith(("fla.ops", "fla.modules"))]:
        module.range = counted
        if hasattr(module, "gather"):
            module.gather = lambda *args, **keywords: tl.gather(*args, **keywords)
        if hasattr(module, "SAFE_GATE_DOT_PRECISION"):
            module.SAFE_GATE_DOT_PRECISION = tl.constexpr("ieee")


def kernels(name: str) -> None:
    """A function beside ours, in float16 (the interpreter multiplies the bits of bfloat16), gradients included."""
    function = theirs(name)
    mend_modules()
    for options in variants(name, SMALL):
        print(json.dumps(check(name, options, function, SMALL, "cpu", torch.float16)), flush=True)


def states_between_chunks() -> None:
    """``return_intermediate_states``: FLA's third result, beside ours."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 1, 70, 1, 16).half()
    tensors = {"q": q / 4, "k": k / k.norm(dim=-1, keepdim=True), "v": v, "g": -g.float().abs()}
    for packed in (None, torch.tensor([0, 3, 70])):
        extra = {
            "beta": torch.rand(1, 70, 1).half(),
            "initial_state": torch.randn(1 if packed is None else 2, 1, 16, 16),
        }
        options = {"output_final_state": True, "return_intermediate_states": True, "cu_seqlens": packed}
        function = theirs("chunk_kda")
        mend_modules()
        with torch.inference_mode():
            reference = function(**tensors, **extra, **options)
            actual = ours.chunk_kda(**tensors, **extra, **options)
        told = [{"shape": list(x.shape), "dtype": str(x.dtype)} for x in (reference[2], actual[2])]
        error = ((reference[2].float() - actual[2].float()).norm() / actual[2].float().norm()).item()
        print(json.dumps({"results": [len(reference), len(actual)], "states": told, "error": error}), flush=True)


def install() -> None:
    """In the library itself, by names imported before and after: ours runs, then FLA's own objects are back."""
    held = {name: theirs(name) for name in FAMILY_OF}
    user = type(sys)("user_of_fla")
    sys.modules["user_of_fla"] = user
    exec("from fla.ops.kda import chunk_kda as before; import fla.ops", user.__dict__)
    x = torch.rand(1, 5, 1, 4)
    tensors = {"q": x, "k": x / x.norm(dim=-1, keepdim=True), "v": x, "g": -x, "beta": x[..., 0]}
    with ours.install():
        exec(
            "from fla.ops.kda.chunk import chunk_kda as later; from fla.layers.kda import chunk_kda as layer",
            user.__dict__,
        )
        for function in (user.before, user.later, user.layer, user.fla.ops.chunk_kda):
            assert torch.equal(function(**tensors)[0], ours.chunk_kda(**tensors)[0])
        for name in FAMILY_OF:
            assert theirs(name).__wrapped__ is getattr(ours, name), name
            assert str(inspect.signature(theirs(name))) == str(inspect.signature(getattr(ours, name))), name
    for name, function in held.items():
        assert theirs(name) is function, name
    for function in (user.before, user.later, user.layer, user.fla.ops.chunk_kda):
        assert function is held["chunk_kda"]
    print(json.dumps({"installed": True}))


def transformers_model() -> None:
    """Transformers takes FLA's kernels for its layers; accelerated, they run on a CPU nevertheless."""
    from parallelflow.compat.transformers import accelerate
    from tests.compat.test_transformers import build, prompt

    model, ids = build("qwen3_next"), prompt(9)
    modeling = sys.modules[type(model).__module__]
    taken = inspect.getclosurevars(modeling.torch_chunk_gated_delta_rule).nonlocals["implementation"]
    with torch.no_grad(), accelerate(model):
        logits = model(ids).logits[0, -1].tolist()
    print(json.dumps({"taken": taken.__module__, "logits": logits}), flush=True)


def context() -> None:
    """What FLA's contexts of all ranks say, put together: the boundaries that they were made from."""
    from fla.ops.cp.context import get_cp_cu_seqlens

    for size in (1, 2, 3, 4):
        for starts in ([0, 24], [0, 1, 6, 12, 13, 24], [0, 6, 12, 18, 24], [0, 23, 24]):
            pieces = []
            for rank in range(size):
                own = get_cp_cu_seqlens(torch.tensor(starts), world_size=size, rank=rank)
                pieces.append((own.is_first_rank, own.cu_seqlens.tolist()))
            print(json.dumps({"ranks": size, "starts": starts, "line": boundaries(pieces)}))


LAYERS = {
    "gated_deltanet.GatedDeltaNet": {"head_dim": 16, "expand_v": 1},
    "gated_deltaproduct.GatedDeltaProduct": {"head_dim": 16, "expand_v": 1},
    "kda.KimiDeltaAttention": {"head_dim": 16},
    "comba.Comba": {"head_dim": 16, "expand_v": 1},
    "delta_net.DeltaNet": {},
    "gla.GatedLinearAttention": {},
    "multiscale_retention.MultiScaleRetention": {},
    "linear_attn.LinearAttention": {},
    "rwkv7.RWKV7Attention": {"head_dim": 16, "num_heads": None, "layer_idx": 0, "num_hidden_layers": 4},
}


def layers() -> None:
    """FLA's own layers, in float16: as they are, and while ours is installed."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 16, 32).half()
    for path, options in LAYERS.items():
        place, kind = path.split(".")
        module = importlib.import_module(f"fla.layers.{place}")
        layer = getattr(module, kind)(hidden_size=32, **{"num_heads": 2, **options}).half().train()
        for parameter in layer.parameters():
            if not parameter.any():  # RWKV-7's output projection begins at 0
                torch.nn.init.normal_(parameter, std=0.1)
        mend_modules()
        reference = layer(tokens)[0].float()
        with ours.install():
            held = [name for name in FAMILY_OF if name in vars(module)]
            replaced = all(getattr(module, name).__wrapped__ is getattr(ours, name) for name in held)
            output = layer(tokens)[0].float()
        error = ((output - reference).norm() / reference.norm()).item()
        print(json.dumps({"layer": kind, "functions": held, "replaced": replaced, "error": error}), flush=True)


COMMANDS = {
    "layers": layers,
    "context": context,
    "signatures": signatures,
    "states": states_between_chunks,
    "install": install,
    "transformers": transformers_model,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    without_tuning()
    for asked in sys.argv[1:]:
        if asked in FAMILY_OF:
            kernels(asked)
        else:
            COMMANDS[asked]()
