"""Every field that transformers reads has a row in docs/fields.md, and every row is true."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import processors

from duquantpp_jax.checkpoints import load_config, load_tokenizer
from duquantpp_jax.commands.generate import left_out
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.families import FAMILIES
from tests.checkpoints.spoiling import rewrite

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fields.md").read_text(encoding="utf-8")
READ = json.loads((ROOT / "tests" / "goldens" / "fields.json").read_text())
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 2.0},
}


def rows(heading):
    """(field, examples, what becomes of it in each column) of the tables under a heading."""
    part = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    for line in re.findall(r"^\| `.*\|$", part, re.MULTILINE):
        fields, examples, *becomes, _ = [cell.strip() for cell in line.strip("|").split(" |")]
        values = [json.loads(example) for example in re.findall(r"`([^`]+)`", examples)]
        for field in re.findall(r"`([^`]+)`", fields):
            yield field, values, [cell.strip() for cell in becomes]


@pytest.mark.parametrize("file", [name for name in READ if name != "about"])
def test_every_field_that_transformers_reads_has_a_row(file):
    heading = file.partition(",")[0]
    listed = [field for field, *_ in rows(heading)]
    assert len(listed) == len({*listed})
    assert {*READ[file]} - {*listed} == set()
    read = {name for other, names in READ.items() if other.startswith(heading) for name in names}
    only_here = {"truncate", "pretraining_tp", "sliding_window_pattern", "router_jitter_noise"}
    assert {*listed} - read <= only_here


def verdict(before, read, fields):
    """What becomes of fields whose value is given to `read`, and what is said of them."""
    try:
        return ("honoured" if read(fields) != before else "no effect"), ""
    except ValueError as error:
        return "refused", str(error)


def untrue(heading, column, read, named):
    """The rows under a heading that are not true, with what becomes of the field."""
    before, wrong = read({}), {}
    for field, examples, becomes in rows(heading):
        found = dict(verdict(before, read, {field: example}) for example in examples)
        what = max(found, key=("no effect", "honoured", "refused").index)
        right = what == becomes[column if len(becomes) > 1 else 0]
        if not right or any(
            "\n" in said or named(field) not in said for said in found.values() if said
        ):
            wrong[field] = found
    return wrong


def config_of(architecture, fields):
    family, yarn = FAMILIES[architecture], {"rope_type": "yarn", "factor": 4.0}
    gemma = family.scaled_embedding
    base = {
        "architectures": [architecture],
        "hidden_size": 80,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "rms_norm_eps": 1e-5,
        "head_dim": 16,
        "torch_dtype": "bfloat16",
        "rope_parameters": {"full_attention": yarn} if gemma else yarn,
    }
    if family.windows == "periodic":
        base |= {"sliding_window": 8}
    if family.windows in ("used", "listed"):
        base |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    if family.experts is not None:
        base |= {family.experts.count: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return DecoderConfig.from_dict(base | fields)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_field_of_config_json_becomes_what_the_page_says(architecture):
    column = [*FAMILIES].index(architecture)

    def named(field):
        return field.removesuffix("s")

    def read(fields):
        return config_of(architecture, fields)

    assert not untrue("config.json", column, read, named)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ROPES)
def test_a_field_of_a_rotary_scaling_becomes_what_the_page_says(kind, place):
    def read(fields):
        scaling = {"rope_type": kind, **ROPES[kind], **fields}
        return config_of("LlamaForCausalLM", {"rope_parameters": None, place: scaling})

    def named(field):
        return "rope_scaling" if field == "rope_type" else field

    assert not untrue("rope_parameters", [*ROPES].index(kind), read, named)


def test_a_field_of_generation_config_json_becomes_what_the_page_says(directory):
    place = directory / "generation_config.json"
    plain = load_config(directory)
    config = (directory / "config.json").read_text()
    for field, (example,), (what,) in rows("generation_config.json"):
        place.write_text(json.dumps({field: example}))
        assert (load_config(directory) != plain) == (what == "honoured"), field
        said = left_out(directory)
        assert (said is not None) == (what == "said"), field
        assert said is None or f"{field} = {json.dumps(example)}" in said
        place.unlink()
        if what == "said":
            rewrite(directory, **{field: example})
            assert left_out(directory) == said.replace("generation_config", "config")
            (directory / "config.json").write_text(config)


def test_a_field_of_tokenizer_config_json_becomes_what_the_page_says(directory):
    """Of a tokenizer that begins text with the letter a, for which ids are listed of all places."""
    tokenizer = load_tokenizer(directory)
    a = tokenizer.token_to_id("a")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A", special_tokens=[("a", a)]
    )
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    base = {"bos_token": "c", "eos_token": {"content": "d"}}

    def read(fields):
        (directory / "tokenizer_config.json").write_text(json.dumps(base | fields))
        return load_tokenizer(directory).encode("x<|endoftext|>").ids

    def named(field):
        return "<new>" if "special" in field or "added" in field else field

    assert not untrue("tokenizer_config.json", 0, read, named)
