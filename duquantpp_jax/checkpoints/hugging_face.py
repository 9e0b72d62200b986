"""Hugging Face directories, in and out: config.json, safetensors with or without an index.

A table made from config.json says which parameter, and which layer of it, every tensor name fills
(`model.layers.3.mlp.up_proj.weight` is layer 3 of `model.layers.*.mlp.up_proj`). Names, shapes and
dtypes are held against it before an array is allocated. Whatever is wrong raises ValueError with
one line that says what was wrong and what would be right.

Source: the directory layout that transformers' `save_pretrained` writes.
"""

import functools
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from safetensors.numpy import save as serialize
from tokenizers import Tokenizer

from duquantpp_jax import files
from duquantpp_jax.checkpoints.experts import (
    FLOATS,
    View,
    Wanted,
    linears,
    tensors_of,
    views,
    wanted,
)
from duquantpp_jax.checkpoints.mxfp4 import INPUT_SCALE, unpacked
from duquantpp_jax.checkpoints.online import matrix_tensors, moved_online
from duquantpp_jax.checkpoints.shards import SINGLE, Stored
from duquantpp_jax.checkpoints.source import CONFIG, TOKENIZER, TOKENIZER_CONFIG, Source, source
from duquantpp_jax.files import one_line
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder
from duquantpp_jax.models.parameters import parameter_shapes, tensor_name

# Rotary frequencies are derived from rope_theta; old checkpoints store them all the same.
_HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Place(NamedTuple):
    """The parameter that a tensor fills, at which index (its layer, or Ellipsis), in what shape."""

    key: str
    index: Any
    shape: tuple[int, ...]


def load_config(directory: str | os.PathLike[str]) -> DecoderConfig:
    """The configuration that config.json or a GGUF file states; ValueError says what is wrong.

    >>> from duquantpp_jax.checkpoints import testbed  # or any Hugging Face directory
    >>> load_config(testbed.directory()).architecture
    'LlamaForCausalLM'
    """
    fields = source(directory).fields()
    try:
        return DecoderConfig.from_dict(unpacked(fields))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def headers(
    directory: str | os.PathLike[str],
) -> tuple[Source, DecoderConfig, dict[str, Stored | View], dict[str, Place]]:
    """Reads config.json and the headers of the shards: where each tensor lies, and what it fills.

    Tensors have the names of parameters: those of experts are views (experts.py).

    Raises:
      ValueError: One line naming the file or tensor, what was wrong and what would be right.
    """
    model = source(directory)
    config, found = load_config(directory), {**model.tensors()}
    shapes = parameter_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in found:
        found.setdefault("model.embed_tokens.weight", found["lm_head.weight"])
        shapes["lm_head"] = shapes["model.embed_tokens"]  # some writers store the tied head too
    places = _places(config, shapes)
    right = wanted(config, {name: place.shape for name, place in places.items()}, found)
    stored, widths = linears(config), {}
    for name, parts in stored.items():
        widths |= dict.fromkeys(parts, places[tensor_name(name)].shape[-1])
    moved = moved_online(model.fields(), [*widths])
    for name, side in matrix_tensors(moved, widths, found).items():
        right[name] = Wanted((side, side), (*FLOATS, "F64"))
    for name in (part + INPUT_SCALE for part in widths):
        if name in found:  # of packed NVFP4
            right[name] = Wanted((1,), ("F32",))
    for name, (shape, _) in right.items():
        if name not in found:
            near = next((n for n in found if n.endswith(name) or name.endswith(n)), None)
            near = near or next((n for n in found if n.endswith(name.split(".", 1)[1])), None)
            raise ValueError(
                f"{directory}: tensor {name} is missing{f' (found {near})' if near else ''}: the "
                f"model that config.json describes has one of shape {list(shape)}"
            )
    for name, tensor in found.items():
        if _HARMLESS.fullmatch(name):
            continue
        if name not in right:
            raise ValueError(
                f"tensor {name!r} has no place in a {config.architecture} of "
                f"{config.num_hidden_layers} layers: config.json must belong to these weights"
            )
        shape, dtypes = right[name]
        if tensor.shape != shape:
            raise ValueError(
                f"tensor {name} has shape {list(tensor.shape)}: config.json asks for {list(shape)}"
            )
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"tensor {name} has dtype {tensor.dtype}: it must be one of {', '.join(dtypes)}"
            )
    return model, config, views(config, found), places


def load_tokenizer(
    directory: str | os.PathLike[str], config: DecoderConfig | None = None
) -> Tokenizer:
    """The tokenizer in `directory`/tokenizer.json, or that a GGUF file describes.

    >>> from duquantpp_jax.checkpoints import testbed  # or any Hugging Face directory
    >>> tokenizer = load_tokenizer(testbed.directory())
    >>> tokenizer.decode(tokenizer.encode("It was late").ids)
    'It was late'

    Raises:
      ValueError: There is none, it cannot be read, or it has ids that the model has not.
    """
    path = Path(directory) / TOKENIZER
    config = config or load_config(directory)
    companions = source(directory).companions()
    if TOKENIZER not in companions:
        raise ValueError(f"{directory} has no tokenizer.json: add the model's own")
    content = companions[TOKENIZER]()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer ({one_line(error)}): "
            "it must be the JSON that the tokenizers library writes"
        ) from None
    tokenizer.no_padding()  # what a file may ask for, and transformers leaves out of encoding
    tokenizer.no_truncation()
    try:
        _apply_settings(tokenizer, _settings(companions))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"it is broken ({error!r:.80})"
        raise ValueError(f"{directory}/{TOKENIZER_CONFIG}: {said}") from None
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= config.vocab_size:
        raise ValueError(
            f"{path} has token {last}, but config.json says vocab_size {config.vocab_size}: "
            "both must come from one model"
        )
    return tokenizer


def _settings(companions: Mapping[str, Callable[[], bytes]]) -> dict[str, Any]:
    """The fields of tokenizer_config.json, if there is one."""
    try:
        fields = json.loads(companions.get(TOKENIZER_CONFIG, lambda: b"{}")())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{TOKENIZER_CONFIG} is not JSON ({one_line(error)})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{TOKENIZER_CONFIG} is a {type(fields).__name__}: it must be an object")
    return fields


def _apply_settings(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """What tokenizer_config.json changes in tokenizer.json; docs/fields.md has every field."""
    if fields.get("fix_mistral_regex"):
        raise ValueError(
            "fix_mistral_regex = true is not supported: put the split that it means into "
            "tokenizer.json"
        )
    tokenizer.encode_special_tokens = bool(fields.get("split_special_tokens"))
    listed: dict[str, int | None] = {}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        given = fields.get(name) or ()
        for token in given.values() if isinstance(given, dict) else given:
            listed[token if isinstance(token, str) else token["content"]] = None
    for number, token in (fields.get("added_tokens_decoder") or {}).items():
        listed[token["content"]] = int(number)
    for text, number in listed.items():
        found = tokenizer.token_to_id(text)
        if found is None or number not in (None, found):
            wanted = "an id" if number is None else f"id {number}"
            raise ValueError(
                f"the special token {text!r} has {wanted} and in tokenizer.json "
                f"{'none' if found is None else found}: both must come from one model"
            )


def chat_prompt(
    directory: str | os.PathLike[str],
    messages: str | Sequence[Mapping[str, str]],
    *,
    answered: bool = False,
) -> str:
    """Messages in the model's own chat template, up to where the answer begins.

    Args:
      messages: Each with a role and a content; or what a user says.
      answered: The last message is the answer's beginning: do not begin another.

    Raises:
      ValueError: jinja2 is not installed, there is no template, or it fails in its sandbox.

    Source: transformers 5.24, utils/chat_template_utils.py, for what a template may use.
    """
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, LoopControlExtension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("--chat needs jinja2: pip install 'duquantpp_jax[chat]'") from None

    class Generation(Extension):
        """`{% generation %}` of transformers, which marks answers in training: its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(reason: str) -> NoReturn:
        raise ValueError(reason)

    companions = source(directory).companions()
    try:
        settings = _settings(companions)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if "chat_template.jinja" in companions:
            template = companions["chat_template.jinja"]().decode()
        if template is None:
            refuse("no chat_template.jinja, and no chat_template in tokenizer_config.json")
        tokens = {n: t["content"] if isinstance(t, dict) else t for n, t in settings.items()
                  if n.endswith("_token") and isinstance(t, (str, dict))}  # fmt: skip
        blocks = {"trim_blocks": True, "lstrip_blocks": True}
        made = ImmutableSandboxedEnvironment(
            **blocks, extensions=[LoopControlExtension, Generation]
        )
        made.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        made.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        said = {"messages": [*messages], "add_generation_prompt": not answered}
        text = made.from_string(template).render(**tokens, tools=None, documents=None, **said)
        return text.encode().decode()  # half of a surrogate pair is no text
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"{directory} has no chat template that works ({one_line(error)}): give plain text"
        ) from None


def sha256(directory: str | os.PathLike[str]) -> str:
    """Which model this is; of a GGUF file its SHA-256.

    >>> from duquantpp_jax.checkpoints import testbed  # or any Hugging Face directory
    >>> len(sha256(testbed.directory()))
    64
    """
    return source(directory).sha256()


def save(model: Decoder, tokenizer_json: str, directory: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face directory, whole or not at all, in bfloat16 (to nearest, even).

    >>> from duquantpp_jax.checkpoints import testbed
    >>> tokenizer = (testbed.directory() / "tokenizer.json").read_text(encoding="utf-8")
    >>> save(testbed.load(), tokenizer, "copy")
    >>> load("copy").config == testbed.load().config
    True

    Raises:
      ValueError: `directory` exists and is not an empty directory.
    """
    arrays = {name: np.asarray(array) for name, array in model.parameters().items()}
    with files.new_directory(Path(directory)) as partial:
        tensors = {
            name: arrays[place.key][place.index].astype(ml_dtypes.bfloat16)
            for name, place in _places(model.config, parameter_shapes(model.config)).items()
        }
        tensors = tensors_of(model.config, tensors)
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        config = json.dumps(model.config.to_dict(), indent=1)
        (partial / CONFIG).write_text(config + "\n", encoding="utf-8")
        (partial / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (partial / SINGLE).write_bytes(serialize(tensors, metadata={"format": "pt"}))


def _places(config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """The table from checkpoint names to parameters."""
    places = {}
    for key, shape in shapes.items():
        tensor = tensor_name(key)
        if "*" not in key:
            places[tensor] = Place(key, ..., shape)
            continue
        for layer in range(config.num_hidden_layers):
            places[tensor.replace("*", str(layer))] = Place(key, layer, shape[1:])
    return places
