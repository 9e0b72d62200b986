"""Shapes for scaled_matmul, shared by tests, proof, cost model and benchmark."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1, E4M3
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.scaled_matmul.tiling import Tiling, choose_tiling

__all__ = ["LLAMA_3_8B", "PROOF", "SMALL", "TOKENS", "Case", "Format"]

Format = Literal["mxfp4", "nvfp4", "mxfp8"]

LLAMA_3_8B = {  # linear: (outputs, inputs); config.json of meta-llama/Meta-Llama-3-8B
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
TOKENS = (1, 16, 128, 2048, 8192)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product out[m, n] = a[m, k] b[n, k]^T.

    Attributes:
      format: Of both operands.
      out: Name of the output type.
      tiling: How the work is cut, where the case is about that; else the kernel chooses.
      label: What it is in a model.
    """

    m: int
    n: int
    k: int
    format: Format = "mxfp4"
    out: str = "bfloat16"
    tiling: Tiling | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Shape and format in short."""
        return f"{self.format} {self.m}x{self.n}x{self.k}"

    @property
    def block(self) -> int:
        """Elements that share one scale."""
        return 16 if self.format == "nvfp4" else 32

    @property
    def dtype(self) -> Any:
        """Storage type of the elements."""
        return E4M3.dtype if self.format == "mxfp8" else E2M1.dtype

    @property
    def used_tiling(self) -> Tiling:
        """The given tiling, or what the kernel chooses on a B200."""
        return self.tiling or choose_tiling(
            self.m, self.n, self.k, self.dtype, self.block, out_dtype=jnp.dtype(self.out)
        )

    @property
    def bytes_per_element(self) -> float:
        """A half for four bits."""
        return 1.0 if self.format == "mxfp8" else 0.5

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Bytes that have to move at least: operands with scales in, the product out."""
        row = int(self.k * self.bytes_per_element) + self.k // self.block
        return (self.m + self.n) * row + self.m * self.n * jnp.dtype(self.out).itemsize

    def operands(self, key: Key[Array, ""]) -> tuple[Operand, Operand]:
        """Random codes, all of them possible, and scales of a few powers of two."""
        a, b = jax.random.split(key)
        return self._operand(a, self.m), self._operand(b, self.n)

    def _operand(self, key: Key[Array, ""], rows: int) -> Operand:
        element = E4M3 if self.format == "mxfp8" else E2M1
        for_codes, for_scales, for_tensor = jax.random.split(key, 3)
        low, sign = 1 << (element.bits - 1), jnp.uint8(1 << (element.bits - 1))
        codes = jax.random.randint(for_codes, (rows, self.k), 0, 2 * low).astype(jnp.uint8)
        magnitude = jnp.minimum(codes & (sign - 1), element.max_code)  # E4M3 has a NaN above
        shape = (rows, self.k // self.block)
        tensor_scale = None
        if self.format == "nvfp4":
            scales = jax.random.uniform(for_scales, shape, minval=0.5, maxval=448)
            scales = scales.astype(jnp.float8_e4m3fn)
            tensor_scale = jax.random.uniform(for_tensor, (), minval=0.001, maxval=0.01)
        else:
            byte = jax.random.randint(for_scales, shape, 118, 136).astype(jnp.uint8)
            scales = jax.lax.bitcast_convert_type(byte, jnp.float8_e8m0fnu)
        mx = MXArray(
            elements=element.store(magnitude | codes & sign),
            scales=scales,
            tensor_scale=tensor_scale,
            element=element,
            block_size=self.block,
        )
        return Operand.from_mx(mx)


def _one_cta(columns: int = 128, stages: int = 4, cores: int = 3, splits: int = 1) -> Tiling:
    return Tiling(columns, stages, collective=False, splits=splits, cores=cores)


# Small enough for an interpreter; few cores, so that each walks over several tiles.
SMALL = (
    Case(256, 256, 1024, tiling=_one_cta()),
    Case(256, 512, 1280, tiling=_one_cta(256, stages=3, cores=2), label="accumulators overlap"),
    Case(128, 384, 256, tiling=_one_cta(cores=2), label="one step of K"),
    Case(200, 328, 512, tiling=_one_cta(cores=2), label="edges in m and n"),
    Case(1, 128, 512, tiling=_one_cta(), label="one token"),
    Case(40, 132, 1056, tiling=_one_cta(cores=2), label="edges in m, n and k"),
    Case(96, 256, 2048, tiling=_one_cta(splits=2), label="k split"),
    Case(129, 130, 800, out="bfloat16", tiling=_one_cta(), label="bfloat16 out"),
    Case(256, 256, 1024, "nvfp4", tiling=_one_cta(256, stages=3, cores=2)),
    Case(130, 140, 272, "nvfp4", tiling=_one_cta(), label="edges"),
    Case(256, 256, 640, "mxfp8", tiling=_one_cta()),
    Case(72, 200, 352, "mxfp8", tiling=_one_cta(256, stages=3), label="edges"),
)
SMALL = tuple(
    case if case.label == "bfloat16 out" else dataclasses.replace(case, out="float32")
    for case in SMALL
)

PROOF = (
    *(
        Case(m, n, k, label=f"Llama-3-8B {name}")
        for name, (n, k) in LLAMA_3_8B.items()
        for m in TOKENS
    ),
    Case(8192, 8192, 8192, label="square"),
    Case(8192, 8192, 8192, out="float32", label="square, float32 out"),
    Case(
        8192,
        8192,
        8192,
        tiling=choose_tiling(8192, 8192, 8192, E2M1.dtype, 32, collective=False),
        label="square, one CTA",
    ),
    Case(8192, 57344, 8192, label="QuTLASS's benchmark"),
    Case(1000, 1000, 1056, label="edges in m, n and k"),
    Case(16, 4096, 4096, "nvfp4", label="q, o"),
    Case(8192, 8192, 8192, "nvfp4", label="square"),
    Case(16, 4096, 4096, "mxfp8", label="q, o"),
    Case(8192, 8192, 8192, "mxfp8", label="square"),
)
