"""Models of every family are exported, loaded in transformers, and compute and write there what
they do here (needs the extra `interop`)."""

import pytest

from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.export import export
from duquantpp_jax.commands.options.export import ExportOptions
from tests.checkpoints.test_layouts import exported, quantized
from tests.conftest import byte_tokenizer, mixture, relative
from tests.interop.parity import TOKENS, assert_writes, kl, logits_in_transformers, logits_of

pytest.importorskip("compressed_tensors", reason="needs the extra interop")


FAMILY = {
    "LlamaForCausalLM": {"attention_bias": True, "sliding_window": None},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": False},
    "Gemma3ForCausalLM": {"hidden_size": 96, "head_dim": 32, "tie_word_embeddings": False},
}
SHORT = ("Qwen2ForCausalLM", "Gemma3ForCausalLM")


@pytest.mark.parametrize(
    "architecture",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY],
)
def test_every_dense_family_computes_and_writes_in_transformers_what_it_does_here(
    architecture, tmp_path
):
    from duquantpp_jax.interop import load_transformers

    model = relative(architecture, **FAMILY[architecture])
    save(model, byte_tokenizer().to_str(), tmp_path / "m")
    quantized(tmp_path / "m", tmp_path / "q", recipe="duquantpp", serve="transformers")
    export(ExportOptions(tmp_path / "q", serve="transformers", out=tmp_path / "e", check=True))
    loaded, ours = load_transformers(tmp_path / "e"), logits_of(tmp_path / "q")
    assert kl(ours(TOKENS), logits_in_transformers(loaded, TOKENS)) < 1e-6
    assert_writes(loaded, ours)


def test_experts_of_gpt_oss_are_loaded_from_its_own_layout_their_inputs_as_they_are(tmp_path):
    from duquantpp_jax.interop import load_transformers

    save(mixture("GptOssForCausalLM"), byte_tokenizer().to_str(), tmp_path / "m")
    some = {"include": ("*.mlp.*",)}
    for name, recipe, format in (("a", "identity", "bf16"), ("b", "identity", "even"),
                                 ("c", "block_hadamard", "bf16")):  # fmt: skip
        more = {"recipe": recipe, "activation_formats": (format,), **some}
        quantized(tmp_path / "m", tmp_path / name, **more)
        exported(tmp_path / name, tmp_path / f"{name}.e", "gpt-oss")
    loaded, ours = load_transformers(tmp_path / "a.e"), logits_of(tmp_path / "a")
    assert kl(ours(TOKENS), logits_in_transformers(loaded, TOKENS)) < 1e-4
    assert_writes(loaded, ours)
    with pytest.warns(UserWarning, match="activations in bf16, not mxfp4:even"):
        load_transformers(tmp_path / "b.e")
    with pytest.raises(ValueError, match="the inputs of its experts are moved"):
        load_transformers(tmp_path / "c.e")
