"""What a format chooses by name: how the scale follows from a block, how x / scale is rounded."""

from __future__ import annotations

import enum


class Named(enum.Enum):
    """A choice by its name, as in ScaleRule("even"); for another name, ValueError lists them."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        names = ", ".join(member.value for member in cls)
        raise ValueError(f"{value!r} is no {cls.__name__}: choose one of {names}")


class ScaleRule(Named):
    """How the largest magnitude of a block becomes its power-of-two scale (formats/scales.py)."""

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"
    RCEIL = "rceil"
    RCEIL_FLOAT = "rceil_float"
    MSE = "mse"


class ElementRounding(Named):
    """How x / scale becomes an element; all saturate and keep the sign (formats/elements.py)."""

    NEAREST_EVEN = "nearest_even"
    STOCHASTIC = "stochastic"
    AWAY = "away"
    TOWARD_ZERO = "toward_zero"

    @property
    def without_key(self) -> ElementRounding:
        """The rounding by which errors are measured: NEAREST_EVEN for STOCHASTIC."""
        return ElementRounding.NEAREST_EVEN if self is ElementRounding.STOCHASTIC else self
