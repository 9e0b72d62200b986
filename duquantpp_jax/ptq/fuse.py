"""Folding transforms into a layer: what moves each channel alone costs nothing at run time.

A site's input x is made by something that comes before it. If that can give out x T_1 instead,
then of x' = x T_1 T_2 only T_2 is left to do online, and W T_1^-T stands for W from the start:

    attention_in, mlp_in    x = n(h) g       g' = g / s                     smoothing
    mlp_out                 x = act(gate) up     rows of up / s             smoothing
                                                 rows of up and gate        permutations
    attention_out           x = heads of a v     rows of v / s              smoothing
                                                 rows of v                  permutations

n(h) cannot be permuted alone: the residual stream h is read and written elsewhere too. With
grouped-query attention several query heads read one head of v, so smoothing folds into v only if
its scales are the same in all of them (`grouped` makes them so), and a permutation only if it keeps
every channel in its head and is the same in all of them; else they stay online. act is not linear:
a scale folds into up, and the gate is left as it is. Biases of up, gate and v move with their rows.
Of a norm whose gain is g = 1 + w, w' = g' - 1 is stored.

The float function is unchanged but for rounding. What is quantized afterwards is not: rows of v and
up are scaled before they are rounded, so results with folded and with online transforms differ.

Sources: SmoothQuant, arXiv 2211.10438, for norms; AWQ, arXiv 2306.00978, for v and up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from duquantpp_jax.core import Chain, Channels, Cost, Fitted, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import Parameters, experts, input_norms
from duquantpp_jax.transforms.basic import Identity, Smooth

_VALUE, _UP, _GATE = "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"


class Fused(NamedTuple):
    """A layer with transforms folded in; the parameters that were moved are in float32.

    Attributes:
      fits: What is left to do online at each given site.
      folded: For each given site what its input has been moved by; Identity where by nothing.
    """

    parameters: dict[str, Any]
    fits: dict[str, Fitted]
    folded: dict[str, Transform]


def fuse_layer(
    config: DecoderConfig,
    parameters: Parameters,
    fits: Mapping[str, Fitted],
    linears: Mapping[str, tuple[str, ...]] = SITE_WEIGHTS,
) -> Fused:
    """Folds what can be folded into one layer; see the top of this file.

    The linears of the new layer expect their inputs moved by what was folded, and get them so. Its
    float function is that of the given layer, with the new fits as with the given ones.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax.checkpoints import testbed
    >>> from duquantpp_jax.core import Fitted
    >>> from duquantpp_jax.ptq.calibration import layers_of
    >>> from duquantpp_jax.transforms import Smooth
    >>> model = testbed.load()
    >>> fits = {"attention_in": Fitted(Smooth(jnp.full(256, 2.0)))}
    >>> layer, fits, folded = fuse_layer(model.config, next(layers_of(model)), fits)
    >>> fits["attention_in"].transform  # nothing is left to do while the model runs
    Identity()

    Args:
      fits: For each site what was fitted, of this layer; sites left out stay as they are.
      linears: Of each site those that the weights of its fit belong to, by name inside the layer.

    Raises:
      ValueError: A key is no site.
    """
    if unknown := set(fits) - set(SITES):
        raise ValueError(f"{min(unknown)!r} is no site: use {', '.join(SITES)}")
    moved, new, folded = dict(parameters), dict(fits), {}
    for site in fits:
        width = parameters[SITE_WEIGHTS[site][0]].shape[-1]
        folding = split(config, site, fits[site].transform, width)
        folded[site] = folding.folded
        new[site] = dataclasses.replace(new[site], transform=folding.rest)
        for channels, made in folding.moves:
            for name in SITE_WEIGHTS[site]:
                moved[name] = channels.weights(jnp.asarray(moved[name], jnp.float32))
            if (given := new[site].weights) is not None:
                # The columns beyond the input's width meet the zeros that widen it.
                parts = ((channels.weights(w[:, :width]), w[:, width:]) for w in given)
                weights = tuple(jnp.concatenate(part, axis=1) for part in parts)
                new[site] = dataclasses.replace(new[site], weights=weights)
            for name, rows in made.items():
                if site in input_norms(config):
                    moved[name] = moved_gain(config, moved[name], rows)
                else:
                    _move_rows(moved, name, rows)
                for other, names in linears.items():
                    if name in names and other in new and (given := new[other].weights) is not None:
                        pairs = zip(names, given, strict=True)
                        weights = (rows.activations(w.T).T if n == name else w for n, w in pairs)
                        new[other] = dataclasses.replace(new[other], weights=tuple(weights))
    return Fused(moved, new, folded)


class Folding(NamedTuple):
    """What of one site's transform is folded.

    Attributes:
      folded: The links that are, as one transform; Identity where there is none.
      moves: For each of them, how it moves the input and the parameters that make the input.
      rest: The other links, which stay online; Identity where there is none.
    """

    folded: Transform
    moves: tuple[tuple[Channels, dict[str, Channels]], ...]
    rest: Transform


def split(config: DecoderConfig, site: str, transform: Transform, width: int) -> Folding:
    """The first links of a site's transform, as far as they fold, and the rest.

    The transform is of one layer, and the width that of the input before zeros widen it. Nothing
    folds into what experts share.
    """
    if experts(config, site):
        return Folding(Identity(), (), transform)
    chain = _moving_links(transform, width)
    moves: list[tuple[Channels, dict[str, Channels]]] = []
    for _, channels in chain:
        cut = None if channels is None else _cut(channels, width)
        if cut is None or (made := producers(config, site, cut)) is None:
            break
        moves.append((cut, made))
    kept = [link for link, _ in chain]
    return Folding(_chained(kept[: len(moves)]), tuple(moves), _chained(kept[len(moves) :]))


def producers(config: DecoderConfig, site: str, channels: Channels) -> dict[str, Channels] | None:
    """The parameters that make the site's input and how each is moved; None if it cannot be."""
    if (norm := input_norms(config).get(site)) is not None:
        return {norm: channels} if channels.in_place else None
    if site == "attention_out":
        rows = _of_value_heads(config, channels)
        return None if rows is None else {_VALUE: rows}
    if channels.in_place:
        return {_UP: channels}
    return {_UP: channels, _GATE: Channels(channels.order, np.ones_like(channels.divisor))}


def grouped(fitted: Fitted, config: DecoderConfig) -> Fitted:
    """The fit before o_proj, its smoothing the same in all query heads that read one value head.

    Each channel's scale becomes the geometric mean over those heads, so that it folds into v.
    Scales that are not all positive (random signs), and a transform whose first link is no
    smoothing, stay as they are.
    """
    first, *others = fitted.transform.flat_links()
    width = config.num_attention_heads * config.head_dim
    channels = first.as_channels(width)
    if channels is None or not (channels.in_place and np.all(channels.divisor > 0)):
        return fitted
    shape, scale = (config.num_key_value_heads, -1, config.head_dim), channels.divisor
    heads = np.log(scale[:width].astype(np.float64)).reshape(shape)
    mean = np.exp(np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape))
    shared = np.concatenate([mean.ravel(), scale[width:]]).astype(np.float32)
    transform = _chained([Smooth(jnp.asarray(shared)), *others])
    return dataclasses.replace(fitted, transform=transform)


def online_cost(transform: Transform, width: int) -> Cost:
    """What moving a site's input costs while the model runs; of one layer, after folding.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax.transforms import BlockRotation
    >>> online_cost(BlockRotation(jnp.eye(32)[None]), 64).multiply_adds
    32
    """
    return moving(transform, width).cost(width)


def moving(transform: Transform, width: int) -> Transform:
    """The transform of one layer without the links that leave an input as it is."""
    return _chained([link for link, _ in _moving_links(transform, width)])


def _moving_links(transform: Transform, width: int) -> list[tuple[Transform, Channels | None]]:
    """The links that do not leave an input as it is, and each as channels, where it is that."""
    pairs = [(link, link.as_channels(width)) for link in transform.flat_links()]
    return [(link, to) for link, to in pairs if to is None or not to.moves_nothing]


def _chained(transforms: Sequence[Transform]) -> Transform:
    if len(transforms) == 1:
        return transforms[0]
    return Chain(tuple(transforms)) if transforms else Identity()


def moved_gain(
    config: DecoderConfig, weight: Float[Array | np.ndarray, " k"], channels: Channels
) -> Float32[Array, " k"]:
    """The weight of a norm of which `channels` move what it gives out."""
    gain = jnp.asarray(weight).astype(jnp.float32) + config.norm_offset
    return channels.activations(gain) - config.norm_offset


def _move_rows(parameters: dict[str, Any], name: str, rows: Channels) -> None:
    """Moves what comes out of a linear: its rows and its bias."""
    parameters[name] = rows.activations(jnp.asarray(parameters[name], jnp.float32).T).T
    if (bias := f"{name}.bias") in parameters:
        parameters[bias] = rows.activations(jnp.asarray(parameters[bias], jnp.float32))


def _of_value_heads(config: DecoderConfig, channels: Channels) -> Channels | None:
    """The channels of v that give `channels` of o_proj's input; None if query heads disagree.

    The query heads that read one value head must be smoothed and permuted alike.
    """
    kv_heads, side = config.num_key_value_heads, config.head_dim
    inside = channels.order.reshape(-1, side)
    inside = inside - side * np.arange(len(inside))[:, None]
    if np.any((inside < 0) | (inside >= side)):
        return None
    within = inside.reshape(kv_heads, -1, side)
    divisor = channels.divisor.reshape(kv_heads, -1, side)
    if np.any(within != within[:, :1]) or np.any(divisor != divisor[:, :1]):
        return None
    order = within[:, 0] + side * np.arange(kv_heads)[:, None]
    return Channels(order.ravel(), divisor[:, 0].ravel())


def _cut(channels: Channels, width: int) -> Channels | None:
    """The first `width` channels, if they are kept apart from those beyond."""
    if np.any(channels.order[:width] >= width):
        return None
    return Channels(channels.order[:width], channels.divisor[:width])
