"""Cases of rotate_quantize, shared by tests, proof, cost model and benchmark."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Key

from duquantpp_jax.core import ScaleRule


@dataclasses.dataclass(frozen=True)
class Case:
    """One activation matrix x [m, k].

    Attributes:
      shared: Whether all blocks have the same matrix; else each has its own.
      smooth: Whether x is divided by a smoothing vector first.
      label: The place of x in a model, or what it tests.
    """

    m: int
    k: int
    shared: bool = True
    smooth: bool = False
    scale_rule: ScaleRule = ScaleRule.FLOOR
    label: str = ""

    @property
    def name(self) -> str:
        """Shape, kind of rotation and scale rule."""
        kind = "shared R" if self.shared else "R per block"
        return f"{self.m}x{self.k} {kind}{', smooth' if self.smooth else ''} {self.scale_rule.name}"

    @property
    def flops(self) -> int:
        """Operations of the rotation: 32 multiplications and additions an element."""
        return 2 * self.m * self.k * 32

    @property
    def bytes(self) -> int:
        """Least bytes to move: x in bfloat16, codes, scale bytes, and the matrices."""
        matrices = 1 if self.shared and not self.smooth else self.k // 32
        return self.m * (2 * self.k + self.k // 2 + self.k // 32) + matrices * 2 * 32 * 32 * 2

    def inputs(
        self, key: Key[Array, ""]
    ) -> tuple[BFloat16[Array, "m k"], Float[Array, "blocks 32 32"], Float[Array, " k"] | None]:
        """Random activations with outlier channels, rotations, and a smoothing vector."""
        for_x, for_row, for_column, for_r, for_s = jax.random.split(key, 5)
        x = jax.random.normal(for_x, (self.m, self.k), jnp.bfloat16)
        rows = jax.random.randint(for_row, (self.m, 1), -20, 20).astype(jnp.float32)
        outlier = jax.random.bernoulli(for_column, 0.02, (self.k,))
        x = x * jnp.exp2(rows).astype(jnp.bfloat16) * jnp.where(outlier, 64, 1).astype(jnp.bfloat16)
        blocks = 1 if self.shared else self.k // 32
        gaussian = jax.random.normal(for_r, (blocks, 32, 32), jnp.float32)
        rotation = jnp.linalg.qr(gaussian)[0]
        smooth = jnp.exp2(jax.random.normal(for_s, (self.k,), jnp.float32)) if self.smooth else None
        return x, rotation, smooth


# Small enough for an interpreter.
SMALL = (
    *(Case(256, 512, scale_rule=rule) for rule in ScaleRule),
    Case(256, 512, shared=False, label="rotation per block"),
    Case(264, 384, shared=False, smooth=True, label="smoothing; edges in m"),
    Case(200, 352, scale_rule=ScaleRule.RCEIL, label="edges in m and k"),
    Case(1, 96, label="one token"),
)

_LLAMA = {"Llama-3-8B hidden": 4096, "Llama-3-8B intermediate": 14336}
PROOF = (
    *(Case(m, k, label=name) for name, k in _LLAMA.items() for m in (1, 16, 128, 2048, 8192)),
    *(Case(16384, 8192, scale_rule=rule) for rule in ScaleRule),
    Case(16384, 8192, shared=False),  # the kernel with smoothing is the same
    Case(1000, 1056, shared=False, label="edges in m and k"),
)
