"""Models of real shapes with random weights, float and quantized, for what only takes time."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax.evaluation import Predictor
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.models import SITES, Decoder, DecoderConfig
from duquantpp_jax.models.parameters import LAYER, LINEARS, parameter_shapes
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, lower
from experiments.synthetic_checkpoint import SHAPES

FORMAT = MXFP4(scale_rule="even")
BLOCK = FORMAT.block_size
SMOLLM2 = DecoderConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
)
LLAMA = DecoderConfig.from_dict(SHAPES | {"num_hidden_layers": 32})
LLAMA_1B = dataclasses.replace(
    LLAMA,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    tie_word_embeddings=True,
)
SMALL = dataclasses.replace(
    SMOLLM2,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=257,
)


def random_model(config: DecoderConfig) -> Decoder:
    """A decoder in bfloat16 with normal weights, all layers alike."""
    parameters = {}
    for number, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("norm"):
            parameters[name] = jnp.ones(shape, jnp.bfloat16)
            continue
        own, key = shape[1:] if name.startswith(LAYER) else shape, jax.random.key(number)
        array = _normal(key, own)
        parameters[name] = _repeated(array, shape[0]) if name.startswith(LAYER) else array
    return Decoder(config, parameters)


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (jnp.float32(0.02) * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="count")
def _repeated(array: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(array, (count, *array.shape))


def starts(model: Decoder) -> dict[str, BlockAffine]:
    """The identity for each block of every site, stacked over layers: where learning starts."""
    found = {}
    for site in SITES:
        layers, _, width = model.weights(site)[0].shape
        eyes = jnp.broadcast_to(jnp.eye(BLOCK), (layers, width // BLOCK, BLOCK, BLOCK))
        found[site] = BlockAffine(eyes, eyes)
    return found


def quantized(model: Decoder, transforms: dict[int, Any]) -> Predictor:
    """The model with all linears in W4A4, their inputs moved by the transform of their width."""
    count = model.config.num_hidden_layers

    @jax.jit
    def stored(weight: jax.Array) -> Any:
        q = FORMAT.encode(weight.astype(jnp.float32))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), q).stored()

    state = {}
    for site in SITES:
        ws = tuple(stored(weight[0]) for weight in model.weights(site))
        state[site] = QuantizedSite(transforms[ws[0].shape[-1]], ws)
    rest = {n: a for n, a in model.parameters().items() if n.removeprefix(LAYER) not in LINEARS}
    decoder = Decoder(model.config, rest, linears=False)
    return Predictor(decoder, QuantizedLinear(FORMAT), state)


Matrices = Literal["none", "shared", "block"]


def rotations(config: DecoderConfig, matrices: Matrices) -> dict[int, Any]:
    """For each width what moves inputs: nothing, or an orthogonal matrix, for all blocks or for
    each."""
    widths = {config.hidden_size, config.intermediate_size}
    widths |= {config.num_attention_heads * config.head_dim}
    if matrices == "none":
        return dict.fromkeys(widths, Identity())
    random, found = np.random.default_rng(0), {}
    for width in widths:
        shape = (width // BLOCK if matrices == "block" else 1, BLOCK, BLOCK)
        drawn = np.linalg.qr(random.standard_normal(shape, np.float32))[0]
        moved = lower(BlockRotation(jnp.asarray(drawn)), width, BLOCK)
        repeat = functools.partial(_repeated, count=config.num_hidden_layers)
        found[width] = jax.tree.map(repeat, moved)
    return found
