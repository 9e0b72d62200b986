"""Cases of scaled_matmul, shared by tests, proof, cost model and benchmark."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from duquantpp_jax.core import Element, MXArray
from duquantpp_jax.formats import E2M1, E4M3
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.scaled_matmul.tiling import Tiling, choose_tiling

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
      format: Format of both operands.
      out: Name of the output type.
      tiling: How the work is cut; by default the kernel chooses.
      label: The place of the product in a model, or what it tests.
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
        """Format and shape."""
        return f"{self.format} {self.m}x{self.n}x{self.k}"

    @property
    def block(self) -> int:
        """Elements that share one scale."""
        return 16 if self.format == "nvfp4" else 32

    @property
    def element(self) -> Element:
        """Type of the elements."""
        return E4M3 if self.format == "mxfp8" else E2M1

    @property
    def used_tiling(self) -> Tiling:
        """The given tiling, or the choice of the kernel on a B200."""
        shape, dtype = (self.m, self.n, self.k), jnp.dtype(self.out)
        return self.tiling or choose_tiling(*shape, self.element.dtype, self.block, out_dtype=dtype)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Least bytes to move: operands with scales in, the product out."""
        row = self.k * self.element.bits // 8 + self.k // self.block
        return (self.m + self.n) * row + self.m * self.n * jnp.dtype(self.out).itemsize

    def operands(self, key: Key[Array, ""]) -> tuple[Operand, Operand]:
        """Random operands: any code, and scales from 2^-9 to 2^8 (NVFP4: .5 to 448)."""
        a, b = jax.random.split(key)
        return self._operand(a, self.m), self._operand(b, self.n)

    def _operand(self, key: Key[Array, ""], rows: int) -> Operand:
        element = self.element
        for_bytes, for_tensor = jax.random.split(key)
        sign = jnp.uint8(1 << (element.bits - 1))
        # All bytes in one draw: each draw of another shape is half a second of compiling.
        drawn = jax.random.bits(for_bytes, (rows, self.k + self.k // self.block), jnp.uint8)
        codes, byte = drawn[:, : self.k], drawn[:, self.k :]
        magnitude = jnp.minimum(codes & (sign - 1), element.max_code)  # E4M3 has a NaN above
        tensor_scale = None
        if self.format == "nvfp4":
            scales = jax.lax.bitcast_convert_type(0x30 + byte % 0x4F, jnp.float8_e4m3fn)
            tensor_scale = jax.random.uniform(for_tensor, (), minval=0.001, maxval=0.01)
        else:
            scales = jax.lax.bitcast_convert_type(118 + byte % 18, jnp.float8_e8m0fnu)
        elements = element.store(magnitude | codes & sign)
        mx = MXArray(elements, scales, tensor_scale, element=element, block_size=self.block)
        return Operand.from_mx(mx)


def _small(m, n, k, format: Format = "mxfp4", label: str = "", out: str = "float32", **cut: int):
    """A case for an interpreter: few cores, so that one of them computes 2, 4 or 12 tiles."""
    tiling = Tiling(**{"columns": 128, "stages": 4, "cores": 3} | cut, collective=False)
    return Case(m, n, k, format, out, tiling, label)


_EDGES = "edges in m, n and k"
SMALL = (
    _small(256, 256, 1024),
    _small(256, 512, 1280, label="accumulators overlap", columns=256, stages=3, cores=2),
    _small(512, 384, 256, label="one step of K", cores=1),
    _small(200, 328, 512, label="edges in m and n", cores=2),
    _small(1, 128, 512, label="one token"),
    _small(40, 132, 1056, label=_EDGES, cores=2),
    _small(96, 256, 2048, label="k split", splits=2, cores=1),
    _small(129, 130, 800, label="bfloat16 out", out="bfloat16"),
    _small(256, 256, 1024, "nvfp4", columns=256, stages=3, cores=2),
    _small(130, 140, 272, "nvfp4", "edges"),
    _small(256, 256, 640, "mxfp8"),
    _small(72, 200, 352, "mxfp8", "edges", columns=256, stages=3),
)
_SQUARE = (8192, 8192, 8192)
_ONE_CTA = choose_tiling(*_SQUARE, E2M1.dtype, 32, collective=False)
PROOF = (
    *(Case(m, *nk, label=f"Llama-3-8B {name}") for name, nk in LLAMA_3_8B.items() for m in TOKENS),
    Case(*_SQUARE, label="square"),
    Case(*_SQUARE, out="float32", label="square, float32 out"),
    Case(*_SQUARE, tiling=_ONE_CTA, label="square, one CTA"),
    Case(8192, 57344, 8192, label="QuTLASS's benchmark"),
    Case(1000, 1000, 1056, label=_EDGES),
    Case(16, 4096, 4096, "nvfp4", label="q, o"),
    Case(*_SQUARE, "nvfp4", label="square"),
    Case(16, 4096, 4096, "mxfp8", label="q, o"),
    Case(*_SQUARE, "mxfp8", label="square"),
)
