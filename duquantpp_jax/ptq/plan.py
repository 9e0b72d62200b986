"""What is done to which linears of a model."""

import dataclasses
import fnmatch
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from duquantpp_jax.core import Fitted, Format, Needs, Recipe
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import (
    LAYER,
    LINEARS,
    experts,
    layer_prefix,
    parameter_shapes,
)
from duquantpp_jax.ptq.site import QuantizedLinear


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to which linears of a model.

    Attributes:
      recipes: The method of each site.
      include: Patterns of the linears that are quantized, such as `*.mlp.*` or `model.layers.3.*`.
      exclude: Patterns of linears among these that are left in float.
      pad: Widen inputs that blocks do not divide, with zeros (exact).
      seed: For fits that draw random numbers.
      sequential: Calibrate each layer on what the quantized layers before it give.
      fits: For each site what moves it, stacked over layers; None where the recipes fit that.
      fuse: Fold into the layer, before it is rounded, what of the transforms can be; smoothing
        before o_proj is made the same in the query heads that share a value head.
    """

    config: DecoderConfig
    recipes: Mapping[str, Recipe]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    pad: bool = False
    seed: int = 0
    sequential: bool = False
    fuse: bool = False
    fits: Mapping[str, Fitted] | None = None

    @staticmethod
    def of(config: DecoderConfig, recipe: Recipe, **options: Any) -> "Plan":
        """The plan that treats all sites by one recipe."""
        return Plan(config, dict.fromkeys(SITES, recipe), **options)

    @property
    def formats(self) -> tuple[tuple[str, Format], ...]:
        """The activation format of each site."""
        return tuple((site, self.recipes[site].activation_format) for site in SITES)

    @property
    def linear(self) -> QuantizedLinear:
        """What a model calls with the state of this plan."""
        return QuantizedLinear(self.formats)

    def names(self, site: str, number: int) -> tuple[str, ...]:
        """The linears of a layer's site that are quantized, by name inside the layer."""
        return _chosen(site, number, self.include, self.exclude)

    def widths(self, number: int) -> dict[str, int]:
        """Input width of each site of a layer that has a linear to quantize, zeros included.

        Raises:
          ValueError: Blocks do not divide it and `pad` was not asked for; names the linear.
        """
        widths, shapes = {}, linear_shapes(self.config)
        for site, recipe in self.recipes.items():
            if not (names := self.names(site, number)):
                continue
            width = shapes[names[0]][1]
            block = max(recipe.weight_format.block_size, recipe.activation_format.block_size)
            widths[site] = -(-width // block) * block
            if widths[site] != width and not self.pad:
                raise ValueError(
                    f"{layer_prefix(number)}{names[0]} has input width {width}, which is not a "
                    f"multiple of block {block}: give --pad to widen it to {widths[site]} with "
                    "zeros (exact)"
                )
        return widths

    def fit_needs(self, number: int) -> Needs:
        """What the fits of a layer need of the Stats of their inputs."""
        needs = (self.recipes[site].needs for site in self.widths(number))
        return functools.reduce(operator.or_, needs, Needs.NOTHING)

    def rounding_needs(self, number: int) -> Needs:
        """What the roundings of a layer need of the Stats of the moved and quantized inputs."""
        needs = (self.recipes[site].rounding.needs for site in self.widths(number))
        return functools.reduce(operator.or_, needs, Needs.NOTHING)

    @property
    def compares(self) -> bool:
        """Whether a rounding compares the quantized path with the float one."""
        layers = range(self.config.num_hidden_layers)
        return any(Needs.CROSS in self.rounding_needs(number) for number in layers)

    @property
    def passes(self) -> int:
        """How often the walk runs a layer, at most."""
        if self.compares:
            return 3 + 2 * len(SITES)
        twice = any(self.rounding_needs(number) for number in range(self.config.num_hidden_layers))
        return 1 + twice + self.sequential

    def check(self) -> None:
        """Raises ValueError where this cannot be carried out on such a model."""
        layers = range(self.config.num_hidden_layers)
        names = [layer_prefix(number) + name for number in layers for name in LINEARS]
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise ValueError(
                        f"{option} {pattern!r} matches no linear: their names are like {names[0]}"
                    )
        if self.config.num_experts and self.compares:
            raise ValueError(
                "a rounding that compares the quantized path with the float one (asymmetric) is "
                "not for experts: the two may send a token to different ones; use gptq"
            )
        calibrated = any(f.calibrated_scale(jnp.float32(1)) is not None for _, f in self.formats)
        if self.config.num_experts and calibrated:
            raise ValueError(
                "activations under a tensor scale from calibration are not for experts: use nvfp4"
            )
        if not any(self.widths(number) for number in layers):
            raise ValueError("--include and --exclude leave nothing to quantize")
        for site in {site for n in layers for site in self.widths(n)} if self.fits else ():
            fitted = (self.fits or {}).get(site)
            count, leaves = experts(self.config, site), jax.tree.leaves(fitted)
            axes = (len(layers), count) if count else (len(layers),)
            if fitted is None or any(leaf.shape[: len(axes)] != axes for leaf in leaves):
                raise ValueError(
                    f"the fits that are given have none for {site} of {len(layers)} layers: give "
                    "every site that is quantized a Fitted that is stacked over the layers"
                    f"{f', and over the {count} experts of each' if count else ''}"
                )


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears of a layer, or of one of their experts, by name inside it."""
    shapes = parameter_shapes(config)
    return {name: shapes[LAYER + name][-2:] for name in LINEARS}  # type: ignore[misc]


@functools.lru_cache(maxsize=4096)
def _chosen(
    site: str, number: int, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[str, ...]:
    names = {name: layer_prefix(number) + name for name in SITE_WEIGHTS[site]}
    return tuple(
        name
        for name, whole in names.items()
        if any(fnmatch.fnmatchcase(whole, pattern) for pattern in include)
        and not any(fnmatch.fnmatchcase(whole, pattern) for pattern in exclude)
    )
