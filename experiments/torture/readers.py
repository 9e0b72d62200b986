"""The readers that fuzz.py tries, each with valid files: what a command does to read them."""

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load_config, load_tokenizer
from duquantpp_jax.checkpoints.hugging_face import chat_prompt
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.mxfp4 import asked_for, unpacked
from duquantpp_jax.checkpoints.packed import load_packed
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.generate import left_out
from duquantpp_jax.evaluation import own_text
from duquantpp_jax.evaluation.rows import TARGETS, read_text, rows_of_text
from duquantpp_jax.interop.asked import asked
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.families import FAMILIES
from experiments.torture import mutations, our_files, subjects
from experiments.torture.fuzz import Reader, contents

FILES = [
    "files/__init__.py", "checkpoints/bpe.py", "checkpoints/directory.py", "checkpoints/experts.py",
    "checkpoints/fits.py", "checkpoints/gguf.py", "checkpoints/hugging_face.py",
    "checkpoints/job.py", "checkpoints/lazy.py", "checkpoints/llama_cpp.py",
    "checkpoints/mxfp4.py", "checkpoints/online.py", "checkpoints/packed.py",
    "checkpoints/seal.py", "checkpoints/sentencepiece.py", "checkpoints/shards.py",
    "checkpoints/source.py", "models/config.py", "models/fields.py", "models/rope.py",
    "formats/tensors.py", "transforms/storage.py", "learning/state.py", "lab/records.py",
    "lab/claims.py", "evaluation/rows.py", "evaluation/own_text.py", "interop/asked.py",
]  # fmt: skip
"""Files of the package that read what others wrote; some also write."""


def _whole(place: Path) -> None:
    """All that a command reads of a float model."""
    checkpoint = Checkpoint(place)
    checkpoint.source.sha256()
    for number in range(checkpoint.config.num_hidden_layers):
        checkpoint.layer(number)
    list(checkpoint.outside())


def families(place: Path) -> Reader:
    """config.json of each family and packing, by itself."""
    made = {f"{name}.json": subjects.fields_of(name) for name in FAMILIES}
    made["Gemma3ForCausalLM.json"]["torch_dtype"] = "bfloat16"
    for name, packing in subjects.PACKINGS.items():
        own = "GptOssForCausalLM" if name == subjects.GPT_OSS else "LlamaForCausalLM"
        more = {"expert_dtype": "fp4"} if name == subjects.DEEPSEEK else {}
        made[f"{name}.json"] = subjects.fields_of(own, quantization_config=packing, **more)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    made["scaled.json"] = subjects.fields_of(rope_scaling=scaling)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    parameters = {"rope_theta": 1e6, **yarn}
    made["yarn.json"] = subjects.fields_of("Qwen3ForCausalLM", rope_parameters=parameters)

    def read(place: Path) -> None:
        for path in sorted(place.iterdir()):
            fields = files.read_json(path)
            DecoderConfig.from_dict(unpacked(fields))
            asked_for(fields)

    return Reader({name: files.to_json(fields) for name, fields in made.items()}, read)


def config(place: Path) -> Reader:
    """config.json with generation_config.json, of a Gemma 3 that also sees."""
    text = subjects.fields_of("Gemma3ForCausalLM", torch_dtype="bfloat16")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    whole |= {"text_config": text, "vision_config": {"hidden_size": 8}, "torch_dtype": "bfloat16"}
    said = {"eos_token_id": [1, 256], "bos_token_id": 256, "temperature": 0.6, "do_sample": True}
    given = {"config.json": files.to_json(whole), "generation_config.json": files.to_json(said)}

    def read(place: Path) -> None:
        load_config(place)
        left_out(place)

    return Reader(given, read)


def tokenizer(place: Path) -> Reader:
    """tokenizer.json and tokenizer_config.json, and a text encoded by them."""
    place.mkdir()
    made = subjects.tokenizer()
    made.add_special_tokens(["<|endoftext|>"])
    settings = {"added_tokens_decoder": {"256": {"content": "<|endoftext|>"}}}
    settings |= {"bos_token": "<|endoftext|>", "extra_special_tokens": ["<|endoftext|>"]}
    given = {
        "config.json": files.to_json(subjects.fields_of()),
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": files.to_json(settings),
    }
    both = ("tokenizer.json", "tokenizer_config.json")
    return Reader(given, lambda place: load_tokenizer(place).encode("It is <|endoftext|>é"), both)


def chat(place: Path) -> Reader:
    """A chat template, in its sandbox."""
    template = (
        "{% for m in messages %}{{ bos_token }}<|{{ m['role'] }}|>{{ m['content'] | trim }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = {
        "config.json": files.to_json(subjects.fields_of()),
        "tokenizer_config.json": files.to_json({"bos_token": "<s>", "chat_template": "{{ 1 }}"}),
        "chat_template.jinja": template.encode(),
    }
    both = ("tokenizer_config.json", "chat_template.jinja")
    return Reader(given, lambda place: chat_prompt(place, "hello"), both)


def safetensors(place: Path) -> Reader:
    """A float model in two shards."""
    return Reader(contents(subjects.write_model(place, shards=2)), _whole)


def packed(packing: str) -> Callable[[Path], Reader]:
    """A packed model, used as it is stored."""

    def make(place: Path) -> Reader:
        def read(place: Path) -> None:
            load_packed(Checkpoint(place), None)

        written = subjects.write_model(place, packing)
        return Reader(contents(written), read, ("config.json", ".safetensors"))

    return make


def exported(place: Path) -> Reader:
    """What `export` wrote: packed weights, and matrices that move their inputs."""
    out = our_files.quantized_model(
        place, recipe="random_hadamard:shared", weight_formats=("mxfp4",)
    )
    export(ExportOptions(out, out=place / "e"))
    config = json.loads((place / "e" / "config.json").read_text())
    config["quantization_config"].pop("quantization_status", None)
    (place / "e" / "config.json").write_bytes(files.to_json(config))

    def read(own: Path) -> None:
        load_packed(Checkpoint(own), None)

    return Reader(contents(place / "e"), read, ("config.json", ".safetensors"))


def gguf(pieces: bool) -> Callable[[Path], Reader]:
    """A GGUF file with its tokenizer: of merged bytes, or of pieces."""
    return lambda _: Reader({"model.gguf": gguf_file(pieces)}, _gguf)


def _gguf(place: Path) -> None:
    path = place / "model.gguf"
    _whole(path)
    load_tokenizer(path)
    left_out(path)


def gguf_file(pieces: bool) -> bytes:
    """A small llama as llama.cpp stores it."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def array(kind: int, values: list[Any], packed: Callable[[Any], bytes]) -> tuple[int, bytes]:
        joined = b"".join(map(packed, values))
        return 9, struct.pack("<IQ", kind, len(values)) + joined

    def number(value: float) -> tuple[int, bytes]:
        return (6, struct.pack("<f", value)) if isinstance(value, float) else (
            4, struct.pack("<I", value)
        )  # fmt: skip

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if pieces:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        kinds = [2, 3, 3] + [6] * 256
        tokens += ["▁", "t", "h", "e", "th", "the", "▁the"]
        kinds += [1] * 7
    else:
        tokens, kinds = ["<|endoftext|>", *letters, "th", "the"], [3] + [1] * 258
    sizes = {"embedding_length": 32, "feed_forward_length": 64, "block_count": 1}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "context_length": 2048}
    sizes |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}
    keys = {"general.architecture": (8, string("llama")), "general.alignment": number(32)}
    keys |= {f"llama.{name}": number(value) for name, value in sizes.items()}
    model = "tokenizer.ggml.model"
    keys |= {model: (8, string("llama" if pieces else "gpt2"))}
    keys |= {"tokenizer.ggml.pre": (8, string("default"))}
    keys |= {"tokenizer.ggml.tokens": array(8, tokens, string)}
    keys |= {"tokenizer.ggml.token_type": array(5, kinds, lambda n: struct.pack("<i", n))}
    if pieces:
        scores = [-float(n) for n in range(len(tokens))]
        keys["tokenizer.ggml.scores"] = array(6, scores, lambda x: struct.pack("<f", x))
    else:
        keys["tokenizer.ggml.merges"] = array(8, ["t h", "th e"], string)
    keys |= {f"tokenizer.ggml.{n}_token_id": number(i) for n, i in {"bos": 1, "eos": 2}.items()}
    shapes = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    layer = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    layer |= {"attn_output": (32, 32), "ffn_norm": (32,), "ffn_up": (64, 32)}
    layer |= {"ffn_gate": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    random, data, tensors = np.random.default_rng(0), b"", []
    for name, shape in shapes.items():
        kind, size = 0, 4 * int(np.prod(shape))
        content = np.ones(shape, "<f4").tobytes()
        if name.endswith(("up.weight", "down.weight")):  # Q8_0: a half and 32 bytes a block
            kind, size = 8, 34 * int(np.prod(shape)) // 32
            blocks = [np.float16(0.01).tobytes() + random.bytes(32) for _ in range(int(size) // 34)]
            content = b"".join(blocks)
        tensors.append((name.encode(), [*shape[::-1]], kind, len(data)))
        data += content + bytes(-len(content) % 32)
    named = [(name.encode(), *value) for name, value in keys.items()]
    return mutations.gguf_of(named, tensors, data)


def texts(place: Path) -> Reader:
    """A text, lines of JSON, and packed texts."""
    text = "It was a dark night.<|endoftext|>Ünd sie schwieg. " * 20
    lines = [json.dumps({"text": f"{text} {n}", "id": n, "other": [1]}) for n in range(3)]
    given = {"a.txt": text, "b.jsonl": "\n".join(lines)}
    encoded = {name: content.encode() for name, content in given.items()}
    encoded |= {"a.txt.gz": gzip.compress(encoded["a.txt"])}
    encoded |= {"b.jsonl.xz": lzma.compress(encoded["b.jsonl"])}
    tokenizer = subjects.tokenizer()

    def read(own: Path) -> None:
        for name in encoded:
            rows_of_text(read_text(own / name), tokenizer, 256)

    return Reader(encoded, read)


def own_rows(place: Path) -> Reader:
    """Rows that a model wrote for itself."""
    config = DecoderConfig.from_dict(subjects.fields_of())
    tokens = np.full((own_text.batch_rows(config), TARGETS + 1), 256, np.int32)
    files.write_tensors(place / "r.safetensors", {"tokens": tokens}, {})
    return Reader(
        contents(place),
        lambda own: own_text._kept(own / "r.safetensors", config),
        believe=(files,),
    )


def requests(place: Path) -> Reader:
    """Bodies of requests to `serve`."""
    completion = {"model": "m", "prompt": ["a", "b"], "max_tokens": 4, "temperature": 0.5, "n": 2}
    completion |= {"stop": ["x"], "seed": 3, "stream": True, "logprobs": 2, "echo": False}
    completion |= {"stream_options": {"include_usage": True}, "top_p": 0.9, "logit_bias": {}}
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    talk = {"model": "m", "messages": [message, {"role": "assistant", "content": "a"}]}
    talk |= {"max_completion_tokens": 3, "top_logprobs": 2, "logprobs": True, "tools": []}

    def read(own: Path) -> None:
        for kind in ("completions", "chat"):
            asked((own / f"{kind}.json").read_bytes(), kind, "m")

    given = {"completions": completion, "chat": talk}
    return Reader({f"{name}.json": files.to_json(body) for name, body in given.items()}, read)


MAKERS: dict[str, Callable[[Path], Reader]] = {
    "config.json": config,
    "config.json of families": families,
    "tokenizer.json": tokenizer,
    "chat template": chat,
    "safetensors": safetensors,
    "gguf": gguf(pieces=False),
    "gguf of pieces": gguf(pieces=True),
    **{f"packed, {name}": packed(name) for name in subjects.PACKINGS},
    "exported": exported,
    "quantized directory": our_files.quantized,
    "quantization.json": our_files.job,
    "MX arrays": our_files.mx,
    "transforms": our_files.transforms,
    "fits": our_files.fits,
    "learning": our_files.learning,
    "records": our_files.record,
    "claims": our_files.claim,
    "texts": texts,
    "rows of a model": own_rows,
    "requests": requests,
}
"""What makes a reader with its valid files in a directory that is not there, by its name."""
