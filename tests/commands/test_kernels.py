"""`kernels --model`: what is told of a compiled step, and, with wheels, a model compiled whole."""

import json

import pytest

from duquantpp_jax import cli
from duquantpp_jax.commands import whole_model
from duquantpp_jax.kernels import sass, target

needs_wheels = pytest.mark.skipif(
    bool(target.missing_wheels()), reason=f"no {', '.join(target.missing_wheels())}"
)


def _call(kernel):
    return f'custom-call(), custom_call_target="mosaic_gpu_v2", op_name="jit(a)/{kernel}/mpmd_map"'


def _kernel(opcode, spilled=0):
    about = {"registers": 40, "spill_bytes": spilled, "shared_bytes": 0, "tensor_columns": 512}
    loops = {"multiply": {opcode: 4}}
    return sass.Kernel(target="sm_100a", instructions={}, loops=loops, ctas=1, cluster=1, **about)


def test_a_step_is_proved_if_each_linear_is_on_tensor_cores():
    calls = [_call("scaled_matmul")] * 7 + [_call("rotate_quantize")] * 4
    kernels = [_kernel("UTCOMMA.2CTA"), _kernel("UTCHMMA")]
    found = whole_model.told("\n".join(calls), kernels)
    assert found["failures"] == []
    assert (found["linears"], found["scaled_matmul"], found["utcomma"]) == (7, 7, 4)
    (said,) = whole_model.told("\n".join(calls[1:]), kernels)["failures"]
    assert said == "7 linears a layer, 6 on tensor cores"
    (said,) = whole_model.told("\n".join(calls[:-1]), kernels)["failures"]
    assert said == "4 inputs a layer, 3 rotated by the kernel"
    (said,) = whole_model.told("\n".join(calls), kernels[1:])["failures"]
    assert said == "no kernel has UTCOMMA"
    spilled = whole_model.told("\n".join(calls), [kernels[0], _kernel("UTCHMMA", spilled=8)])
    assert spilled["failures"] == ["8 bytes of registers spill"]


@needs_wheels
def test_a_quantized_model_is_compiled_whole(tmp_path, capsys):
    out = str(tmp_path / "q")
    assert cli.main(["quantize", "--recipe", "rtn", "--rows", "1", "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(["kernels", "--model", out, "--tokens", "128", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["step"], step["tokens"]) for step in steps] == [("prefill", 128), ("decode", 1)]
    for step in steps:
        assert step["failures"] == []
        assert (step["linears"], step["scaled_matmul"], step["rotate_quantize"]) == (7, 7, 4)
        assert step["utcomma"] > 0


@needs_wheels
def test_a_float_model_is_refused_in_a_line(capsys):
    assert cli.main(["kernels", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
