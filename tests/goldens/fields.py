"""Golden list: the fields of a checkpoint's JSON files that the transformers library reads.

    python tests/goldens/fields.py
        pip install torch==2.14.1 transformers==5.24.0

writes tests/goldens/fields.json: for each file the names that transformers' own code reads, found
in its source: attributes of a configuration class, `config.NAME`, `getattr(config, "NAME")`, keys
that are popped or looked up. A later version that reads another name makes another list, and
tests/checkpoints/test_fields.py fails until docs/fields.md says what becomes of it.
"""

import ast
import dataclasses
import inspect
import json
import pathlib
from collections.abc import Iterable, Iterator

PLACE = pathlib.Path(__file__).parent / "fields.json"
FAMILIES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3": "Gemma3TextConfig",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "gpt_oss": "GptOssConfig",
}
ARGUMENTS = [
    "cache_dir", "commit_message", "config", "force_download", "gguf_file", "init_inputs",
    "local_files_only", "name_or_path", "proxies", "repo_id", "return_unused_kwargs", "revision",
    "save_jinja_files", "subfolder", "token", "tokenizer_file", "tokenizer_object",
    "transformers_weights", "trust_remote_code", "use_source_tokenizer", "verbose",
    "files_loaded", "is_local", "model_specific_special_tokens", "add_generation_prompt",
    "sanitize_control_tokens", "max_target_length", "tokenizer", "vocab", "merges", "vocab_file",
    "initial_alphabet", "unk_id", "post_processor", "continuing_subword_prefix",
    "end_of_word_suffix",
]  # fmt: skip
"""What callers of from_pretrained and other functions pass in the same mapping; no fields."""


def _attributes(tree: ast.AST, owners: tuple[str, ...]) -> Iterator[str]:
    """Names read as `owner.NAME` or `getattr(owner, "NAME")`; owner may be self.owner."""

    def owned(node: ast.AST) -> bool:
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        return isinstance(node, ast.Name | ast.Attribute) and name in owners

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and owned(node.value):
            yield node.attr
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in ("getattr", "hasattr") and owned(node.args[0]):
            yield from [n.value for n in node.args[1:2] if isinstance(n, ast.Constant)]


def _keys(tree: ast.AST, owners: tuple[str, ...]) -> Iterator[str]:
    """Names read as `owner["NAME"]`, `owner.get("NAME")`, `.pop("NAME")`, `"NAME" in owner`."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))):
                found = name, key
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="get" | "pop" | "setdefault"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                found = name, key
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[ast.Name(id=name)]):
                found = name, key
            case _:
                continue
        if found[0] in owners:
            yield found[1]


def _tree(thing: object) -> ast.AST:
    return ast.parse(inspect.cleandoc("\n" + inspect.getsource(thing)))


def _fields(names: Iterable[str], methods: type) -> list[str]:
    """Public names in order, without arguments, and without what the class itself defines."""
    public = {n for n in names if not n.startswith("_")} - {*ARGUMENTS}

    def defined(name: str) -> bool:
        value = inspect.getattr_static(methods, name, None)
        if isinstance(value, property):
            return value.fset is None
        return hasattr(methods, name) and name not in getattr(methods, "__dataclass_fields__", {})

    return sorted(name for name in public if not defined(name))


def main() -> None:
    """Reads the source and writes the list."""
    import importlib

    import transformers
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        cache_utils,
        configuration_utils,
        masking_utils,
        modeling_rope_utils,
        modeling_utils,
        tokenization_utils_base,
        tokenization_utils_tokenizers,
    )
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin
    from transformers.quantizers import auto

    shared = [cache_utils.get_layer_types_and_kwargs, PreTrainedConfig, modeling_rope_utils]
    shared += [masking_utils, modeling_utils, configuration_utils, auto]
    trees = [_tree(part) for part in shared]
    found: dict[str, list[str]] = {}
    for family, named in FAMILIES.items():
        place = f"transformers.models.{family}"
        settings = importlib.import_module(f"{place}.configuration_{family}")
        kind = getattr(settings, named)
        model = ast.parse(inspect.getsource(importlib.import_module(f"{place}.modeling_{family}")))
        names = {field.name for field in dataclasses.fields(kind)} | {"model_type"}
        names |= {*kind.attribute_map, *kind.attribute_map.values()}
        for tree in (model, *trees, _tree(kind)):
            names |= {*_attributes(tree, ("config", "layer_config", "text_config"))}
        names |= {*_keys(_tree(kind), ("kwargs",)), *_keys(trees[1], ("kwargs",))}
        rotary = _tree(RotaryEmbeddingConfigMixin)
        names |= {*_keys(rotary, ("kwargs",)), *_attributes(rotary, ("self",))}
        found[f"config.json, {family}"] = _fields(names, kind)
    owners = ("rope_parameters", "rope_parameters_dict", "rope_scaling")
    found["rope_parameters"] = sorted({*_keys(trees[2], owners)})
    names = vars(GenerationConfig()).keys() | {*_keys(_tree(GenerationConfig), ("kwargs",))}
    found["generation_config.json"] = _fields(names, type)
    parts = (tokenization_utils_base, tokenization_utils_tokenizers)
    names = {n for part in parts for n in _keys(_tree(part), ("kwargs", "init_kwargs"))}
    for place in ("llama.tokenization_llama", "qwen2.tokenization_qwen2"):
        module = importlib.import_module(f"transformers.models.{place}")
        kind = next(c for n, c in vars(module).items() if n in ("LlamaTokenizer", "Qwen2Tokenizer"))
        names |= {*inspect.signature(kind.__init__).parameters} - {"self", "kwargs"}
    found["tokenizer_config.json"] = _fields(names, type)
    about = {"transformers": transformers.__version__}
    PLACE.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
