"""How weights stand in memory while a model runs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.formats import MXFP4, MXFP8
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.kernels import implementation
from duquantpp_jax.kernels.matvec import api, move, triton
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.models.cache import empty_cache
from duquantpp_jax.ptq import layout, store
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, layer_of, pad_channels
from duquantpp_jax.transforms.basic import Identity, Permute, Smooth
from duquantpp_jax.transforms.block import BlockRotation
from tests.conftest import tiny_decoder

GPU = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**40})


def _transform(kind, layers, width):
    if kind == "nothing":
        return Identity()
    draw = np.random.default_rng(0)
    if kind == "permutation":
        order = np.stack([draw.permutation(width) for _ in range(layers)])
        return Permute(jnp.asarray(order, jnp.int32))
    scales = jnp.asarray(draw.uniform(0.25, 4, (layers, width)), jnp.float32)
    matrices = np.linalg.qr(draw.standard_normal((layers, width // 32, 32, 32)))[0]
    return Smooth(scales).then(BlockRotation(jnp.asarray(matrices, jnp.float32)))


def _quantized(kind):
    """A model, and its state with inputs moved by transforms of this kind."""
    model, format, state = tiny_decoder(), MXFP4(scale_rule="even"), {}
    for site in SITES:
        weights = tuple(pad_channels(w, -(-w.shape[-1] // 32) * 32) for w in model.weights(site))
        transform = _transform(kind, *weights[0].shape[::2])
        moved = (jax.vmap(lambda t, w: t.weights(w))(transform, w) for w in weights)
        state[site] = QuantizedSite(transform, tuple(map(format.quantize, moved)))
    return model, QuantizedLinear(format), state


def _interpret(monkeypatch, given):
    """Kernels of packed weights run on a CPU; what they are given is noted."""
    name = {"quantized_matvec": "triton"}
    monkeypatch.setattr(api, "choose", lambda kernel, *_: name.get(kernel, "reference"))
    move_to, multiply = move.to_tokens, triton.matvec

    def to_tokens(x, *others):
        given.append(x)
        return move_to(x, *others, interpret=True)

    monkeypatch.setattr(move, "to_tokens", to_tokens)
    monkeypatch.setattr(triton, "matvec", lambda *others: multiply(*others, interpret=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["permutation", "rotation in Triton"])
def test_a_model_writes_with_packed_weights_what_it_writes_without(kind, monkeypatch):
    """Prompts, a token, two at a time; moved inside the kernel or, where that cannot be, before.

    Kernels that move a token apply its norm or activation, too, and products add the residual.
    """
    kind, *by_triton = kind.split(" in ")
    model, linear, state = _quantized(kind)
    assert layout.for_writing(linear, state, jax.devices()[0]) is state  # a CPU
    monkeypatch.setattr(layout, "why_not_nvidia", lambda: None)
    packed = layout.for_writing(linear, state, GPU)
    assert layout.is_packed(packed)
    given = []
    if by_triton:
        _interpret(monkeypatch, given)
    for site in packed.values():
        assert site.weights == ()
        assert (site.packed.arrays.matrices is not None) == (kind == "rotation")
    draw = np.random.default_rng(1)
    tokens = jnp.asarray(draw.integers(0, model.config.vocab_size, (1, 8)), jnp.int32)

    @jax.jit
    def logits(state):
        cache = empty_cache(model.config, store("bf16", model.config.head_dim), 1, 8)
        found = []
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            y, cache = model.extend(part, cache, linear, state)
            found.append(y[:, -1].ravel())
        return jnp.concatenate(found)

    # Sums in another order move a number across a tie now and then; nothing else differs.
    wanted = logits(state)
    difference = np.abs(logits(packed) - wanted)
    assert np.median(difference) < 1e-4
    assert np.max(difference) < 0.5
    if by_triton:  # of each site: a token, and two
        what = [(x.gain is None, x.activation is None, x.residual is None) for x in given]
        every = [(False, True, True), (True, True, False)] * 2
        every[3] = (True, False, False)
        assert what == 2 * every
    if kind == "permutation":
        return
    # The same where the layers come in several runs, as those of recipes that differ do.
    runs = tuple(jax.tree.map(lambda a: a[n : n + 1], state) for n in range(2))  # noqa: B023
    np.testing.assert_allclose(logits(runs), wanted, atol=1e-4)


def test_kernels_of_inputs_are_named_for_a_model_that_has_some(monkeypatch):
    linear = QuantizedLinear(MXFP4())
    assert layout.implemented(linear, "xla").implementation == "xla"
    assert layout.implemented(linear, None) is linear
    monkeypatch.setattr(layout, "why_not_nvidia", lambda: None)
    assert layout.implemented(linear, "triton").implementation == "triton"
    for other in (QuantizedLinear(MXFP4(scale_rule="mse")), QuantizedLinear(None), dense):
        with pytest.raises(ValueError, match="of this model: it moves and rounds inputs in MXFP4"):
            layout.implemented(other, "triton")


def test_a_line_says_what_runs_in_kernels(monkeypatch):
    assert layout.kernels_here() is None  # a CPU
    monkeypatch.setattr(layout, "why_not_nvidia", lambda: None)
    monkeypatch.setattr(layout, "why_not_by_default", lambda: None)
    assert "attention and moving and rounding of inputs" in (layout.kernels_here() or "")
    assert (layout.kernels_here(inputs=False) or "").endswith(": attention")
    assert layout.kernels_here(attention=False, inputs=False) is None
    monkeypatch.setattr(layout, "why_not_by_default", lambda: "not measured here")
    assert "attention" not in (layout.kernels_here() or "attention")
    amd = types.SimpleNamespace(platform="gpu", compute_capability="gfx90a")
    monkeypatch.setattr(implementation, "current_device", lambda: amd)
    assert "AMD's gfx90a" in (implementation.why_not_nvidia() or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("rotation", None),
        ("rotation", BFloat16()),
        ("permutation", BFloat16()),
        ("nothing", None),
        ("rotation", MXFP8()),
    ],
)
def test_packed_weights_are_multiplied_with_inputs_of_other_formats(kind, format, monkeypatch):
    """A token and three, in bfloat16 and float32, by kernels; then a prompt, decoded."""
    _, _, state = _quantized(kind)
    monkeypatch.setattr(layout, "why_not_nvidia", lambda: None)
    linear = QuantizedLinear(format)
    packed = layout.for_writing(linear, state, GPU, "triton")
    assert layout.is_packed(packed)
    draw = np.random.default_rng(4)
    for site in ("attention_in", "mlp_out"):
        (own, rows), before = (packed[site], packed[site].packed), layer_of(state[site], 1)
        moved = kind == "rotation" and not isinstance(format, MXFP8)
        assert (rows.arrays.matrices is not None) == moved
        assert own.weights == ()
        after = dataclasses.replace(
            layer_of(dataclasses.replace(own, packed=None), 1),
            packed=dataclasses.replace(rows, layer=jnp.int32(1)),
        )
        for shape, dtype in (((1, 1), jnp.bfloat16), ((3, 1), jnp.float32), ((1, 7), jnp.float32)):
            x = jnp.asarray(draw.standard_normal((*shape, before.weights[0].shape[-1])), dtype)
            for y, wanted in zip(
                *(linear(site, x, (), own)[0] for own in (after, before)), strict=True
            ):
                assert y.shape == wanted.shape
                np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_an_implementation_that_is_not_for_a_model_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no implementation triton here: it needs an NVIDIA GPU"):
        layout.for_writing(QuantizedLinear(MXFP4()), {}, jax.devices()[0], "triton")
    monkeypatch.setattr(layout, "why_not_nvidia", lambda: None)
    with pytest.raises(ValueError, match="no implementation triton of this model"):
        layout.for_writing(QuantizedLinear(None), {}, GPU, "triton")


@pytest.mark.slow
def test_operands_of_tensor_cores_give_what_weights_give():
    """By the references of the kernels, which round a bfloat16 input as the model does."""
    _, linear, state = _quantized("rotation")
    operands = layout.for_tensor_cores(linear, state)
    for site in SITES:
        before, after = (layer_of(own[site], 1) for own in (state, operands))
        draw = np.random.default_rng(3).standard_normal((2, 3, before.weights[0].shape[-1]))
        x = jnp.asarray(draw, jnp.bfloat16)
        for y, wanted in zip(
            *(linear(site, x, (), own)[0] for own in (after, before)), strict=True
        ):
            np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_what_would_fall_back_from_tensor_cores_is_named():
    _, linear, state = _quantized("permutation")
    with pytest.raises(ValueError, match="site attention_in moves its inputs across blocks of 32"):
        layout.for_tensor_cores(linear, state)
    with pytest.raises(ValueError, match="site attention_in has weights or inputs that are not"):
        layout.for_tensor_cores(QuantizedLinear(None), state)
    with pytest.raises(ValueError, match="its linears are not quantized"):
        layout.for_tensor_cores(linear, None)
