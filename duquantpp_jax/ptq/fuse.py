"""Folding transforms into the model: what moves each channel alone costs nothing at run time.

A site's input x is made by something that comes before it. If that can give out x T_1 instead,
then of x' = x T_1 T_2 only T_2 is left to do online, and W T_1^-T stands for W from the start:

    attention_in, mlp_in    x = n(h) g       g' = g / s                     smoothing
    mlp_out                 x = silu(gate) up    rows of up / s             smoothing
                                                 rows of up and gate        permutations
    attention_out           x = heads of a v     rows of v / s              smoothing
                                                 rows of v                  permutations

n(h) cannot be permuted alone: the residual stream h is read and written elsewhere too. With
grouped-query attention several query heads read one head of v, so smoothing folds into v only if
its scales are the same in all of them, and a permutation only if it keeps every channel in its
head and is the same in all of them; else they stay online, for all layers. (silu is not linear:
a scale folds into up, and the gate is left as it is. Head norms of queries and keys and biases of
the site itself do not see its input's scale; biases of up, gate and v move with their rows.)

The float function is unchanged but for rounding. What is quantized afterwards is not: rows of v and
up, and norms, are scaled before they are rounded, so results with folded and with online transforms
differ, and a table should say which it shows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from duquantpp_jax.core import Chain, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder
from duquantpp_jax.transforms.basic import Identity, Smooth, links
from duquantpp_jax.transforms.permutation import Permute

_LAYER = "model.layers.*."
_NORMS = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
_VALUE, _UP, _GATE = "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"


class Folding(NamedTuple):
    """What of one site's transform can be folded.

    Attributes:
      folded: Its first links that can, in order; widened channels cut off.
      rest: The others, which stay online; Identity where nothing is left.
    """

    folded: tuple[Transform, ...]
    rest: Transform


def foldings(model: Decoder, transforms: Mapping[str, Transform]) -> dict[str, Folding]:
    """What `fuse` folds and what it leaves online, at each site.

    Args:
      model: The float model.
      transforms: As of `fuse`.

    Raises:
      ValueError: As `fuse`.
    """
    if unknown := set(transforms) - set(SITES):
        raise ValueError(f"{min(unknown)!r} is no site: use {', '.join(SITES)}")
    layers = model.config.num_hidden_layers
    plan = {}
    for site, transform in transforms.items():
        if any(leaf.shape[:1] != (layers,) for leaf in jax.tree.leaves(transform)):
            raise ValueError(f"the transform of {site} is not stacked over the {layers} layers")
        width = model.weights(site)[0].shape[-1]
        chain = [link for link in links(transform) if not isinstance(link, Identity)]
        folded: list[Transform] = []
        while len(folded) < len(chain):
            link = _cut(chain[len(folded)], width)
            if link is None or _producer(site, link, model) is None:
                break
            folded.append(link)
        left = chain[len(folded) :]
        rest = left[0] if len(left) == 1 else Chain(tuple(left)) if left else Identity()
        plan[site] = Folding(tuple(folded), rest)
    return plan


def fuse(
    model: Decoder, transforms: Mapping[str, Transform]
) -> tuple[Decoder, dict[str, Transform]]:
    """Folds what can be folded into the model; see the top of this file.

    The new model's linears expect their inputs moved by what was folded, and get them so. Its
    float function is that of the old one; with the transforms that are returned, all of them moved
    as the given ones move them. `foldings` says which parts were folded.

    Args:
      model: The float model.
      transforms: For each site its transform, stacked over layers; sites left out stay as they are.

    Returns:
      The new model, and for each given site what stays online.

    Raises:
      ValueError: A key is no site, or a transform is not stacked over the layers.
    """
    plan = foldings(model, transforms)
    parameters = dict(model.parameters())
    for site, folding in plan.items():
        for link in folding.folded:
            for name in SITE_WEIGHTS[site]:
                key = _LAYER + name
                parameters[key] = jax.vmap(lambda t, w: t.weights(w))(link, parameters[key])
            made = _producer(site, link, model)
            if made is None:
                raise ValueError(f"{site}: nothing before it takes up {type(link).__name__}")
            for name, move in made.items():
                _move_rows(parameters, _LAYER + name, move)
    fused = type(model)(model.config, parameters, dtype=model.dtype)
    return fused, {site: folding.rest for site, folding in plan.items()}


def _move_rows(parameters: dict[str, Array], name: str, move: Transform) -> None:
    """Moves what comes out of a norm, or of a linear: its rows and its bias."""
    act = jax.vmap(lambda t, x: t.activations(x))
    if parameters[name].ndim == 2:  # a norm's gain
        parameters[name] = act(move, parameters[name])
        return
    parameters[name] = act(move, parameters[name].swapaxes(1, 2)).swapaxes(1, 2)
    if (bias := f"{name}.bias") in parameters:
        parameters[bias] = act(move, parameters[bias])


def _producer(site: str, link: Transform, model: Decoder) -> dict[str, Transform] | None:
    """The parameters that make the site's input and how each is moved; None if it cannot be."""
    match site, link:
        case (("attention_in" | "mlp_in"), Smooth()):
            return {_NORMS[site]: link}
        case "mlp_out", Smooth():
            return {_UP: link}
        case "mlp_out", Permute():
            return {_UP: link, _GATE: link}
        case "attention_out", (Smooth() | Permute()):
            one = _of_value_heads(link, model)
            return None if one is None else {_VALUE: one}
    return None


def _of_value_heads(link: Smooth | Permute, model: Decoder) -> Transform | None:
    """The same on the heads of v, if all query heads that read one of them agree."""
    config = model.config
    heads, kv_heads, side = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def agreed(values: np.ndarray) -> np.ndarray | None:
        grouped = values.reshape(len(values), kv_heads, heads // kv_heads, side)
        return grouped[:, :, 0] if np.all(grouped == grouped[:, :, :1]) else None

    if isinstance(link, Smooth):
        scale = agreed(np.asarray(link.scale))
        return None if scale is None else Smooth(jnp.asarray(scale.reshape(len(scale), -1)))
    order = np.asarray(link.order).reshape(-1, heads, side)
    inside = order - side * np.arange(heads)[:, None]
    if np.any((inside < 0) | (inside >= side)) or (within := agreed(inside)) is None:
        return None
    whole = within + side * np.arange(kv_heads)[:, None]
    return Permute(jnp.asarray(whole.reshape(len(order), -1), jnp.int32))


def _cut(link: Transform, width: int) -> Transform | None:
    """The link on the first `width` channels, if it keeps them apart from those beyond."""
    match link:
        case Smooth():
            return Smooth(link.scale[:, :width])
        case Permute() if np.all(np.asarray(link.order)[:, :width] < width):
            return Permute(link.order[:, :width])
    return None
