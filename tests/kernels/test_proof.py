"""The proof without the chip: the code that it reads, its failures, and, with wheels, the kernels.

The wheels come with the extra `blackwell`; the proof compiles in a process of its own.
"""

import dataclasses
import json

import pytest

from duquantpp_jax.commands.options.common import Terminal
from duquantpp_jax.kernels import compiling, proof, sass, target
from duquantpp_jax.kernels.scaled_matmul.cases import LLAMA_3_8B, PROOF, TOKENS, Case

needs_wheels = pytest.mark.skipif(
    bool(target.missing_wheels()), reason=f"no {', '.join(target.missing_wheels())}"
)

SASS = """
.text.example:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   UTCOMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
.L_x_0:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   UTCOMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0050*/                   UTCOMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*0060*/                   BRA.U UP0, `(.L_x_0) ;
        /*0070*/                   UTCBAR [UR4] ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   NANOSLEEP 0x10 ;
        /*00a0*/                   BRA `(.L_x_1) ;
"""
PTX = ".target sm_100a\nmov.b32 %r39, 512;\ntcgen05.alloc.cta_group::2 \t[%r56], %r39;"
PTXAS = "0 bytes stack frame, {} bytes spill stores, {} bytes spill loads\nUsed 53 registers"
HOST = (
    "call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 148, i32 1, i32 1, i32 2, i32 1, i32 1, "
    "i32 256, i32 1, i32 1, i32 159844, i32 0, ptr %1)"
)


def compiled(tmp_path, spilled: int = 0, code: str = SASS) -> sass.Kernel:
    (tmp_path / "example_0.ptx").write_text(PTX)
    (tmp_path / "example_0.ptxas").write_text(PTXAS.format(spilled, spilled))
    (tmp_path / "example_0.ll").write_text(HOST)
    (tmp_path / "example_0.sass").write_text(code)
    (kernel,) = sass.read(tmp_path)
    return kernel


def test_machine_code_is_read(tmp_path):
    kernel = compiled(tmp_path)
    assert (kernel.instructions["UTCOMMA"], kernel.instructions["UTCOMMA.2CTA"]) == (1, 2)
    assert kernel.tensor_core_in_loop() == {"UTCOMMA": 2}  # with the block moved out of line
    assert kernel.loops["multiply"]["NANOSLEEP"] == 1
    assert "UTCBAR" not in kernel.loops["multiply"]
    assert (kernel.registers, kernel.spill_bytes) == (53, 0)
    assert (kernel.shared_bytes, kernel.tensor_columns) == (159844, 512)
    assert (kernel.ctas, kernel.cluster) == (148, 2)


def record(compiled: sass.Kernel, implied: int = 2) -> proof.Record:
    return compiling.record("scaled_matmul", Case(8, 8, 64), "mxfp4", implied, compiled)


def test_a_kernel_is_proved_or_says_why_not(tmp_path):
    assert record(compiled(tmp_path)).failures == []
    assert "4 UTCOMMA implied" in record(compiled(tmp_path), implied=4).failures[0]
    assert "16 bytes of registers spill" in record(compiled(tmp_path, spilled=8)).failures[0]
    other = compiled(tmp_path, code=SASS.replace("UTCOMMA", "UTCQMMA"))
    assert "UTCOMMA expected, UTCQMMA found" in record(other).failures[0]
    none = compiled(tmp_path, code=SASS.replace("UTCOMMA.2CTA", "HMMA").replace("UTCOMMA", "HMMA"))
    assert "none found" in record(none).failures[0]
    nvfp4 = compiled(tmp_path, code=SASS.replace("UTCOMMA.2CTA", "UTCOMMA.2CTA.4X"))
    assert "UTCOMMA expected" in record(nvfp4).failures[0]


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (8, 1)])
def test_the_exit_code_says_whether_all_is_proved(tmp_path, monkeypatch, capsys, spilled, code):
    monkeypatch.setattr(target, "missing_wheels", lambda: [])
    row = record(compiled(tmp_path, spilled))
    monkeypatch.setattr(proof, "prove", lambda options: iter([row]))
    assert proof.run(proof.Options()) == code
    assert "UTCOMMA" in capsys.readouterr().out
    assert proof.run(proof.Options(terminal=Terminal(json=True))) == code
    assert json.loads(capsys.readouterr().out)["kernels"][0]["found"] == 2


def test_without_wheels_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(target, "missing_wheels", lambda: ["nvidia-cuda-nvcc"])
    assert proof.run(proof.Options()) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert "nvidia-cuda-nvcc" in out
    assert "duquantpp_jax[blackwell]" in out


def test_every_linear_of_llama_3_8b_is_a_case():
    shapes = {(case.m, case.n, case.k) for case in PROOF if case.format == "mxfp4"}
    assert {(m, n, k) for n, k in LLAMA_3_8B.values() for m in TOKENS} <= shapes


@pytest.fixture(scope="module")
def proved():
    """The records of every kernel and case, compiled once."""
    return [*proof.prove(proof.Options())]


def of(records, text):
    """The records that `only` chooses by this text."""
    return [r for r in records if text.lower() in f"{r.kernel} {r.case} {r.label}".lower()]


@needs_wheels
@pytest.mark.slow
def test_every_kernel_and_case_holds_on_blackwell(proved):
    assert [dataclasses.asdict(r) for r in proved if r.failures] == []
    assert len(proved) >= 54


@needs_wheels
@pytest.mark.slow
def test_the_kernels_of_each_format_hold_on_blackwell(proved):
    records = of(proved, "8192x8192x8192")
    assert {r.instruction for r in records} == {"UTCOMMA", "UTCOMMA.4X", "UTCQMMA"}
    for each in records:
        assert each.failures == []
        assert each.found == each.implied
        assert each.spill_bytes == 0
        assert each.tensor_columns == 512


@needs_wheels
@pytest.mark.slow
def test_rotate_quantize_holds_and_passes_over_memory_once(proved):
    records = of(proved, "16384x8192 R")
    assert records
    for each in records:
        assert each.failures == []
        assert each.other_kernels == 1  # the two parts of R, 2 MB
        assert each.instructions["F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C"] == 64  # 128 a row


@needs_wheels
@pytest.mark.slow
def test_the_rule_that_tries_three_scales_fits_into_registers(proved):
    (each,) = of(proved, "16384x8192 shared R MSE")
    assert each.failures == []


@needs_wheels
@pytest.mark.slow
def test_a_mapped_quantized_linear_is_these_two_kernels(proved):
    first, second = of(proved, "quantized_linear")
    assert (first.instruction, second.instruction) == ("UTCHMMA", "UTCOMMA")
    assert first.failures == second.failures == []
