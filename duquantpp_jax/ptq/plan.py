"""What is done to which linears of a model."""

import dataclasses
import fnmatch
from collections.abc import Mapping

from duquantpp_jax.core import Recipe
from duquantpp_jax.models import (
    SITE_WEIGHTS,
    SITES,
    DecoderConfig,
    linear_names,
    parameter_shapes,
)
from duquantpp_jax.models.parameters import LAYER
from duquantpp_jax.ptq.calibration import Formats, padded_width
from duquantpp_jax.ptq.site import MixedLinear


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to which linears of a model.

    Attributes:
      config: Of the model.
      recipes: The method of each site.
      include: Patterns of the linears that are quantized, such as `*.mlp.*` or `model.layers.3.*`.
      exclude: Of those, the ones that are left in float all the same.
      pad: Widen inputs that blocks do not divide, with zeros (exact).
      seed: For fits that draw.
      sequential: Calibrate each layer on what the quantized layers before it give.
    """

    config: DecoderConfig
    recipes: Mapping[str, Recipe]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    pad: bool = False
    seed: int = 0
    sequential: bool = False

    @property
    def formats(self) -> Formats:
        """The activation format of each site."""
        return tuple((site, self.recipes[site].activation_format) for site in SITES)

    @property
    def linear(self) -> MixedLinear:
        """What a model calls with the state of this plan."""
        return MixedLinear(self.formats)

    def chosen(self, site: str, number: int) -> tuple[bool, ...]:
        """Which linears of a layer's site are quantized."""

        def matches(name: str, patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        return tuple(
            matches(name, self.include) and not matches(name, self.exclude)
            for name in linear_names(site, number)
        )

    def widths(self, number: int) -> dict[str, int]:
        """Input width of each site of a layer that has a linear to quantize.

        Raises:
          ValueError: Blocks do not divide it and `pad` was not asked for; names the linear.
        """
        shapes = linear_shapes(self.config)
        return {
            site: padded_width(
                linear_names(site, number)[self.chosen(site, number).index(True)],
                shapes[SITE_WEIGHTS[site][0]][1],
                max(recipe.weight_format.block_size, recipe.activation_format.block_size),
                pad=self.pad,
            )
            for site, recipe in self.recipes.items()
            if any(self.chosen(site, number))
        }

    def check(self) -> None:
        """Raises ValueError where this cannot be carried out on such a model."""
        layers = range(self.config.num_hidden_layers)
        names = [name for n in layers for site in SITES for name in linear_names(site, n)]
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise ValueError(
                        f"{option} {pattern!r} matches no linear: their names are like {names[0]}"
                    )
        if not any(self.widths(number) for number in layers):
            raise ValueError("--include and --exclude leave nothing to quantize")


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears of a layer, by name inside it."""
    shapes = parameter_shapes(config)
    return {
        name: shapes[LAYER + name][1:]  # type: ignore[misc]
        for names in SITE_WEIGHTS.values()
        for name in names
    }
