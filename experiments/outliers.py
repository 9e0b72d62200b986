"""At what outlier strength does which method break?

Hypothesis: plain rounding first; Hadamard when one channel outweighs the sum of its block;
  smoothing last, since what is imposed here is what it undoes.
Method: channel maxima as a real model has them are imposed on this one, leaving its function as it
  is: the input of a linear is multiplied channel by channel by s = p^strength and the columns of
  its weights are divided by s. p is the profile of a site of Llama-3.2-1B (channel maximum over the
  median, layers matched by depth, quantiles matched to the width), its channels in random order.
  The factors go into the norm before q/k/v and gate/up, the rows of up_proj before down_proj, and
  the rows of v_proj before o_proj (the mean of log s over the heads that share them). Strength 0 is
  the model itself, 1 the real model's profile on top of its own. Without --data, p is 1 but for one
  channel of each site, 1150.
Caveat: this flatters smoothing, which undoes it exactly in the activations, and makes rotation
  without smoothing look worse than on a model that grew its outliers: real ones belong to few
  tokens, these to all, and here the small columns of the weights pay for them. It is a test of
  what a method withstands, not a model of real outliers.
Command: duquantpp ablate experiments/outliers.py --table --data llama-3.2-1b.channel_absmax.npz
  or python -m experiments.outliers --table, with --model DIR --text FILE --calibration-text FILE
  for another model than the embedded one (a Llama without biases).
Cost: 75 cells; the float model is computed anew for each strength.
Last result, 2026-11-25 (commit 8eab31d), 65,408 targets, floor, H100s, profile of Llama-3.2-1B
  (results/grid_outliers_*.json), KL on gutenberg-27m at strengths 0, .25, .5, .75, 1:
    rtn                .139   .146   .201   .322   .442
    block_hadamard     .119   .135  3.37   7.13   6.94
    greedy             .120   .127  3.73   7.25   7.46
    smooth             .137   .139   .136   .136   .136
    smooth_hadamard    .115   .113   .112   .113   .116
    duquantpp          .115   .114   .115   .115   .117
    wush               .109   .109   .111   .149  6.56
    wush_conditioned   .109   .110   .125  5.86   7.28
  and the same order on the embedded model and on WikiText-2, where smooth costs .239 to .255,
  smooth_hadamard .207 to .210 and duquantpp .203 to .215 at every strength. The hypothesis is wrong
  about what breaks first: not plain rounding, which the wide channels cost little else than
  themselves, but rotations without smoothing, which spread them over 31 others whose weights are
  large (see the caveat). Random signs do not help. Smoothing does not notice. WUSH, whose condition
  number may reach what undoes the outlier, holds on longer than with the number bounded at 10.
"""

import dataclasses
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.lab import Cell
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder
from experiments.seeding import seeded

RECIPES = (
    "rtn",
    "block_hadamard",
    "random_hadamard",
    "smooth",
    "smooth_hadamard",
    "greedy",
    "duquantpp",
    "wush",
    "wush_conditioned",
)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SPIKE = 1150.0
"""The largest channel over the median of Llama-3.2-1B, before the second down_proj."""

_NORMS = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Impose:
    """Imposes channel profiles on a Llama, leaving its function as it is.

    Attributes:
      strength: Exponent of the profile.
      profile: npz of channel maxima by the names of a Hugging Face Llama's linears; None for one
        large channel at each site.
      seed: Of the order of channels.
    """

    strength: float
    profile: Path | None = None
    seed: int = 0

    def __call__(self, model: Decoder) -> Decoder:
        """The changed model.

        Raises:
          ValueError: The model has biases, which would have to move too.
        """
        config = model.config
        if config.biases:
            raise ValueError("outliers are imposed on models without biases: choose a Llama")
        parameters = {name: np.array(a, np.float64) for name, a in model.parameters().items()}
        layers = config.num_hidden_layers
        profiles = None if self.profile is None else _read(self.profile)
        random = np.random.default_rng(self.seed)
        groups = config.num_attention_heads // config.num_key_value_heads
        for layer in range(layers):
            for site in SITES:
                at = {
                    name: parameters[f"model.layers.*.{name}"][layer]
                    for name in (*SITE_WEIGHTS[site], *_NORMS.values(), *_SOURCES.values())
                }
                width = at[SITE_WEIGHTS[site][0]].shape[-1]
                depth = layer / max(layers - 1, 1)
                p = _spike(width) if profiles is None else _profile(profiles[site], depth, width)
                s = random.permutation(p) ** self.strength
                if site == "attention_out":
                    heads = s.reshape(config.num_key_value_heads, groups, config.head_dim)
                    shared = np.exp(np.mean(np.log(heads), axis=1, keepdims=True))
                    s = np.broadcast_to(shared, heads.shape).reshape(-1)
                    at["self_attn.v_proj"] *= shared.reshape(-1, 1)
                elif site == "mlp_out":
                    at["mlp.up_proj"] *= s[:, None]
                else:
                    at[_NORMS[site]] *= s
                for name in SITE_WEIGHTS[site]:
                    at[name] /= s
        return Decoder(config, {name: jnp.float32(a) for name, a in parameters.items()})


_SOURCES = {"attention_out": "self_attn.v_proj", "mlp_out": "mlp.up_proj"}
"""Whose rows make the input of a site that no norm makes."""


def _read(path: Path) -> dict[str, list[Float[np.ndarray, " k"]]]:
    """Of each site, channel maxima over their median in every layer of the file, sorted."""
    found: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = 1 + max(int(i) for i in re.findall(r"layers\.(\d+)\.", " ".join(file)))
            for layer in range(layers):
                for site in SITES:
                    maxima = file[f"model.layers.{layer}.{SITE_WEIGHTS[site][0]}"]
                    found[site].append(np.sort(maxima.astype(np.float64) / np.median(maxima)))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no npz of channel maxima by linear ({error}): give --data another"
        ) from None
    return found


def _profile(
    layers: list[Float[np.ndarray, " k"]], depth: float, width: int
) -> Float[np.ndarray, " width"]:
    """The quantiles of the layer at a depth in [0, 1], the least and the largest among them."""
    maxima = layers[round(depth * (len(layers) - 1))]
    return np.interp(np.linspace(0, 1, width), np.linspace(0, 1, len(maxima)), maxima)


def _spike(width: int) -> Float[np.ndarray, " width"]:
    return np.r_[np.ones(width - 1), SPIKE]


def CELLS(options: AblateOptions) -> list[Cell]:
    """The grid, with the profile of --data."""
    return [
        cell
        for strength in STRENGTHS
        for recipe in RECIPES
        for cell in seeded(Cell(recipe, "floor", change=Impose(strength, options.data)))
    ]


BASELINE = "block_hadamard"


def COLUMNS(cell: Cell) -> str:
    """The strength."""
    return f"strength {cell.change.strength:g}"


if __name__ == "__main__":
    main(sys.modules[__name__])
