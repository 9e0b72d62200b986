"""config.json: what is read from it, and what is refused by name."""

import pytest

from duquantpp_jax.checkpoints import load, sha256
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.families import FAMILIES
from tests.checkpoints.spoiling import refusal, rewrite
from tests.conftest import TINY

OF = {
    family.model_type: {"architectures": [name], "model_type": family.model_type}
    for name, family in FAMILIES.items()
}
GEMMA = OF["gemma3_text"]

CONFIGS = {
    "another architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        ["GPT2LMHeadModel", "use LlamaForCausalLM"],
    ),
    "experts": (
        {"architectures": ["Qwen2MoeForCausalLM"]},
        ["Qwen2MoeForCausalLM", "a mixture of experts", "use LlamaForCausalLM"],
    ),
    "more experts": (
        {"architectures": ["PhiMoEForCausalLM"]},
        ["PhiMoEForCausalLM", "a mixture of experts"],
    ),
    "Gemma": ({"architectures": ["Gemma2ForCausalLM"]}, ["Gemma2ForCausalLM", "softcapping"]),
    "soft-capping": (
        {**GEMMA, "final_logit_softcapping": 30.0},
        ["final_logit_softcapping = 30.0", "must be null"],
    ),
    "attention to what comes after": (
        {**GEMMA, "use_bidirectional_attention": True},
        ["use_bidirectional_attention = True", "must be false"],
    ),
    "embeddings scaled in no type": (
        {**GEMMA, "torch_dtype": ...},
        ["torch_dtype = None", "one of bfloat16, float16, float32"],
    ),
    "one rope for layers of two kinds": (
        {**GEMMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ["rope_parameters", "must have full_attention and sliding_attention"],
    ),
    "a scaling that transformers passes over": (
        {**GEMMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ["rope_scaling of type 'linear'", '"rope_type"'],
    ),
    "local layers that are scaled": (
        {**GEMMA, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        ["rope_parameters", "rope_type default"],
    ),
    "local layers without a window": (
        {**GEMMA, "sliding_window": None},
        ["layer_types", "needs a sliding_window"],
    ),
    "no architecture": ({"architectures": ...}, ["architectures", "LlamaForCausalLM"]),
    "two architectures": ({"architectures": ["A", "B"]}, ["architectures"]),
    "unknown rope scaling": (
        {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
        ["rope_scaling 'dynamic'", "linear, llama3, yarn"],
    ),
    "rope scaling as transformers 5 writes it": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}},
        ["rope_scaling 'longrope'", "llama3"],
    ),
    "rope scaling of another type": ({"rope_scaling": "yarn"}, ["rope_scaling 'yarn'"]),
    "rope scaling without a factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        ["factor is missing"],
    ),
    "rope scaling with more than is known": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
        ["mscale = 0.7", "beta_fast"],
    ),
    "rope scaling out of order": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        },
        ["low_freq_factor 4.0", "high_freq_factor 1.0"],
    ),
    "rope_parameters of another type": ({"rope_parameters": [1]}, ["rope_parameters"]),
    "partial rotary in rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor = 0.5", "1.0"],
    ),
    "biases that are missing": ({"attention_bias": True}, ["self_attn.q_proj.bias is missing"]),
    "bias of another type": ({"mlp_bias": 1}, ["mlp_bias = 1", "true or false"]),
    "a bias that a family lacks": (
        {**OF["mistral"], "mlp_bias": True},
        ["mlp_bias = True", "MistralForCausalLM", "must be false"],
    ),
    "layers of unknown attention": (
        {**OF["qwen2"], "layer_types": ["full_attention", "linear"]},
        ["layer_types", "'linear'", "sliding_attention"],
    ),
    "a sliding layer without a window": (
        {**OF["qwen3"], "layer_types": 2 * ["sliding_attention"]},
        ["layer_types", "use_sliding_window"],
    ),
    "too few layer types": (
        {**OF["qwen3"], "layer_types": ["full_attention"]},
        ["layer_types", "2 layers"],
    ),
    "a window of nothing": (
        {**OF["mistral"], "sliding_window": 0},
        ["sliding_window = 0", "above 0"],
    ),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0"]),
    "already quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        ["quantization_config", "already quantized", "float"],
    ),
    "missing": ({"hidden_size": ...}, ["hidden_size is missing"]),
    "misspelt": ({"hidden_size": ..., "hiden_size": 64}, ["hidden_size is missing", "hiden_size"]),
    "text": ({"hidden_size": "64"}, ["hidden_size = '64'", "integer"]),
    "a truth value": ({"vocab_size": True}, ["vocab_size = True", "integer"]),
    "a fraction": ({"num_hidden_layers": 1.5}, ["num_hidden_layers = 1.5"]),
    "zero": ({"num_attention_heads": 0}, ["num_attention_heads = 0", "above 0"]),
    "too large": ({"vocab_size": 2**40}, ["vocab_size", "below 2147483648"]),
    "endless": ({"num_hidden_layers": 2**30}, ["num_hidden_layers", "below 10000"]),
    "negative": ({"rms_norm_eps": -1e-5}, ["rms_norm_eps = -1e-05"]),
    "no epsilon": ({"rms_norm_eps": ...}, ["rms_norm_eps is missing"]),
    "not finite": ({"rope_theta": float("inf")}, ["rope_theta = inf", "finite"]),
    "tied by a number": ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
    "key heads that do not divide": ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
    "odd heads": ({"head_dim": 15}, ["head_dim 15", "even"]),
    "heads that do not divide": (
        {"head_dim": ..., "num_attention_heads": 6, "num_key_value_heads": 2},
        ["hidden_size 64", "num_attention_heads 6"],
    ),
    "token beyond the vocabulary": ({"bos_token_id": 257}, ["bos_token_id = 257", "257"]),
    "end token of another type": ({"eos_token_id": [1, "2"]}, ["eos_token_id = '2'"]),
}


@pytest.mark.parametrize(("changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_an_unsupported_or_wrong_config_is_refused_by_name(directory, changes, words):
    rewrite(directory, **changes)
    message = refusal(lambda: load(directory))
    assert str(directory) in message
    for word in words:
        assert word in message


def test_the_defaults_of_the_format_are_used_for_fields_that_older_files_lack():
    fields = TINY.to_dict()
    for name in ("rope_theta", "num_key_value_heads", "head_dim", "attention_bias", "bos_token_id"):
        del fields[name]
    inside = {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    assert DecoderConfig.from_dict(fields | inside).rope_theta == 7.0
    config = DecoderConfig.from_dict(fields | {"rope_scaling": {"type": "default"}})
    assert (config.rope_theta, config.num_key_value_heads, config.head_dim) == (10000.0, 4, 16)


def test_rope_theta_is_found_where_transformers_5_puts_it():
    fields = TINY.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del fields["rope_theta"]
    assert DecoderConfig.from_dict(fields).rope_theta == 5e5


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "config.json" in refusal(lambda: load(directory))


def test_a_directory_without_config_is_refused(tmp_path):
    assert "has no config.json" in refusal(lambda: load(tmp_path))
    assert "is not a directory" in refusal(lambda: load(tmp_path / "absent"))
    assert "has no config.json" in refusal(lambda: sha256(tmp_path))


def test_of_two_scalings_and_two_lengths_those_are_taken_that_transformers_takes():
    fields, linear = TINY.to_dict(), {"type": "linear", "factor": 2.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    both = DecoderConfig.from_dict(fields | {"rope_scaling": linear, "rope_parameters": yarn})
    assert both == DecoderConfig.from_dict(fields | {"rope_scaling": linear})
    outside = {"rope_scaling": yarn, "original_max_position_embeddings": 32}
    scaling = DecoderConfig.from_dict(fields | outside).rope_scaling
    assert scaling.original_max_position_embeddings == 32
