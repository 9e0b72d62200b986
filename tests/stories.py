"""Converts stories260K, a Llama in the format of llama2.c, to a Hugging Face directory.

Seven integers (width, ffn, layers, heads, key heads, tokens, positions), then float32 tensors.
Its rotation turns neighbouring channels (2i, 2i + 1) where Hugging Face's turns (i, i + d/2), so
the rows of Wq and Wk are put in that order. Its tokenizer merges the pair whose result scores
highest, which is what a list of merges in the order of scores does.

Source: llama2.c, export of version 0 and tokenizer.bin; karpathy/tinyllamas, stories260K, MIT.
"""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

BOS, EOS = 1, 2


def convert(source: Path, directory: Path) -> Path:
    """Writes the directory; returns it."""
    raw = (source / "stories260K.bin").read_bytes()
    hidden, ffn, layers, heads, kv_heads, vocab, positions = struct.unpack("7i", raw[:28])
    numbers, taken = np.frombuffer(raw, np.float32, offset=28), 0
    head_dim, tensors = hidden // heads, {}

    def take(*shape: int) -> np.ndarray:
        nonlocal taken
        taken += int(np.prod(shape))
        return numbers[taken - int(np.prod(shape)) : taken].reshape(shape)

    def halves(w: np.ndarray) -> np.ndarray:
        pairs = w.reshape(layers, -1, head_dim // 2, 2, hidden)
        return pairs.swapaxes(2, 3).reshape(w.shape)

    key = kv_heads * head_dim
    tensors["model.embed_tokens.weight"] = take(vocab, hidden)
    stacked = {
        "input_layernorm": take(layers, hidden),
        "self_attn.q_proj": halves(take(layers, hidden, hidden)),
        "self_attn.k_proj": halves(take(layers, key, hidden)),
        "self_attn.v_proj": take(layers, key, hidden),
        "self_attn.o_proj": take(layers, hidden, hidden),
        "post_attention_layernorm": take(layers, hidden),
        "mlp.gate_proj": take(layers, ffn, hidden),
        "mlp.down_proj": take(layers, hidden, ffn),
        "mlp.up_proj": take(layers, ffn, hidden),
    }
    tensors["model.norm.weight"] = take(hidden)
    assert taken + positions * head_dim == len(numbers)  # the rest are tables of cos and sin
    for name, array in stacked.items():
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = array[layer]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors")
    _tokenizer(source / "tok512.bin", vocab).save(str(directory / "tokenizer.json"))
    return directory


def _tokenizer(path: Path, vocab: int) -> Tokenizer:
    raw, place, pieces, scores = path.read_bytes(), 4, [], []
    for _ in range(vocab):
        score, length = struct.unpack_from("fi", raw, place)
        pieces.append(raw[place + 8 : place + 8 + length].decode().strip("\n").replace(" ", "▁"))
        scores.append(score)
        place += 8 + length
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (scores[number], piece[:cut], piece[cut:])
        for piece, number in ids.items()
        if number > 258
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = Tokenizer(
        models.BPE(ids, [m[1:] for m in merges], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(pieces[number]) for number in (0, BOS, EOS)])
    return tokenizer
