"""transformers knows an export for QuTLASS, does not load it where it would compute otherwise, and
with the kernels' arithmetic in its linears has our logits (needs the extra `interop`)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load_any
from duquantpp_jax.ptq.site import QuantizedSite
from tests.checkpoints.test_fp_quant import decoded, rounded, served  # noqa: F401
from tests.decompress import tensors_of
from tests.interop.parity import TOKENS, kl, logits_in_transformers

transformers = pytest.importorskip("transformers", reason="needs the extra interop")


def test_transformers_accepts_the_configuration_and_refuses_a_cpu(served):  # noqa: F811
    fields = json.loads((served[1] / "config.json").read_text())["quantization_config"]
    known = transformers.FPQuantConfig(**fields).to_dict()
    assert {name: known[name] for name in fields} == fields
    with pytest.raises(NotImplementedError, match="FPQuant quantization is only supported on GPU"):
        transformers.AutoModelForCausalLM.from_pretrained(served[1])


def test_with_the_kernels_arithmetic_in_its_linears_the_whole_model_has_our_logits(served):  # noqa: F811
    """In float32, with the matrices as they are stored, in bfloat16."""
    import torch

    tensors = {n: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a
               for n, a in tensors_of(served[1]).items()}  # fmt: skip

    class Kernels(torch.nn.Module):
        """A linear of QuTLASS, in NumPy."""

        def __init__(self, name):
            super().__init__()
            own = {n.rpartition(".")[2]: a for n, a in tensors.items() if n.startswith(f"{name}.")}
            codes = np.stack([own["qweight"] & 15, own["qweight"] >> 4], axis=-1)
            self.weight = decoded(codes.reshape(len(codes), -1), own["scales"])
            self.matrix = own["forward_hadamard_matrix"]
            self.unit = own["weight_global_scale"] * own["act_global_scale"]

        def forward(self, x):
            blocks = x.numpy().reshape(*x.shape[:-1], -1, 32) @ self.matrix
            codes, byte, _ = rounded(blocks.reshape(x.shape), "abs_max")
            y = decoded(codes, byte) @ self.weight.T / self.unit
            return torch.from_numpy(y.astype(np.float32))

    config = transformers.AutoConfig.from_pretrained(served[0].parent / "e")
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    floats = {n: torch.from_numpy(np.array(a)) for n, a in tensors.items() if a.dtype == np.float32}
    model.load_state_dict(floats, strict=False)
    model.tie_weights()
    linears = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    for name in linears:
        model.set_submodule(name, Kernels(name))
    assert len(linears) == 12
    decoder, linear, state = load_any(served[0])

    def stored(site):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), site.transform)
        return dataclasses.replace(site, transform=half)

    state = jax.tree.map(stored, state, is_leaf=lambda each: isinstance(each, QuantizedSite))
    wanted = jax.jit(lambda tokens: decoder(tokens, linear, state)[0])(TOKENS)
    assert kl(wanted, logits_in_transformers(model, TOKENS)) < 1e-6
