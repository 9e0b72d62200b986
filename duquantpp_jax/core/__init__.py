"""The five nouns and the one law that everything here is made of.

    Format     how numbers are rounded          x ~ element * scale, one scale a block
    MXArray    what quantizing gives            elements, scales
    Transform  how a linear's input is moved    t.activations(x) @ t.weights(w).T == x @ w.T
    Stats      what calibration keeps           a fold whose merge is associative
    Recipe     a whole method                   fit, rounding, two formats

A new method is a new value of one of them. Here are the types, with what it takes to read them;
how their values are made is in the rooms beside this one, and arrows point from them to here.
"""

from duquantpp_jax.core.arrays import (
    Element,
    ElementRounding,
    ElementRoundingField,
    Format,
    MXArray,
    ScaleRule,
    ScaleRuleField,
    choice,
    times_power_of_two,
)
from duquantpp_jax.core.recipe import Fit, Fitted, Recipe, Rounding, Weights, stack
from duquantpp_jax.core.stats import Needs, Stats
from duquantpp_jax.core.transform import Blocks, Chain, Channels, Cost, Transform, diagonal_blocks

__all__ = [
    "Blocks",
    "Chain",
    "Channels",
    "Cost",
    "Element",
    "ElementRounding",
    "ElementRoundingField",
    "Fit",
    "Fitted",
    "Format",
    "MXArray",
    "Needs",
    "Recipe",
    "Rounding",
    "ScaleRule",
    "ScaleRuleField",
    "Stats",
    "Transform",
    "Weights",
    "choice",
    "diagonal_blocks",
    "stack",
    "times_power_of_two",
]
