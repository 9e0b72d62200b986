"""A model in one GGUF file, read as a Hugging Face directory: what llama.cpp's names mean.

config.json and tokenizer.json are made from the file's own keys, so that the file is read as a
directory is, and a model quantized from it is complete. A key of the architecture that may change
the arithmetic and is not known here is refused.

Source: llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/constants.py.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax import files
from duquantpp_jax.checkpoints import bpe
from duquantpp_jax.checkpoints.gguf import Blocks, read_contents
from duquantpp_jax.models import parameters
from duquantpp_jax.models.families import FAMILIES, InGGUF
from duquantpp_jax.models.rope import Llama3, rotary_frequencies, write_scaling

ARCHITECTURES = {f.gguf.name: name for name, f in FAMILIES.items() if f.gguf is not None}
"""general.architecture to the name in config.json."""

_OUTSIDE = {
    "token_embd": parameters.EMBEDDING,
    "output_norm": parameters.NORM,
    "output": parameters.HEAD,
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": parameters.HEAD_NORMS[0],
    "attn_k_norm": parameters.HEAD_NORMS[1],
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_KNOWN = {*_SCALING, "vocab_size", "rope.dimension_count", "attention.value_length"}


@functools.lru_cache(maxsize=2)
def _contents(path: Path, mtime: int, size: int) -> tuple[dict[str, Any], dict[str, Blocks]]:
    return read_contents(path)


class GGUFModel:
    """A GGUF file with a whole model, as a source.

    Raises:
      ValueError: It is broken, or of an architecture that is not supported.
    """

    def __init__(self, path: Path):
        self.path, state = path, path.stat()
        self.keys, self._blocks = _contents(path, state.st_mtime_ns, state.st_size)
        self._name = str(self.keys.get("general.architecture"))
        if self._name not in ARCHITECTURES:
            raise self._refusal("general.architecture", self._name, " or ".join(ARCHITECTURES))
        self._family = FAMILIES[ARCHITECTURES[self._name]]
        self._gguf = self._family.gguf or InGGUF(self._name)
        if self.keys.get("split.count", 1) != 1:
            raise ValueError(f"{path} is a part of a model: join it by llama-gguf-split --merge")

    def _refusal(self, key: str, found: Any, right: str) -> ValueError:
        return ValueError(
            f"{self.path}: {key} = {found!r:.60} is not supported: it must be {right}"
        )

    def _own(self, key: str) -> Any:
        """The value of a key of the architecture."""
        return self.keys.get(f"{self._name}.{key}")

    def fields(self) -> dict[str, Any]:
        """The config.json; raises ValueError if a key asks for what the decoder does not have."""
        fields = {**_FIELDS, **self._gguf.keys}
        for name, value in self.keys.items():
            own = name.removeprefix(f"{self._name}.")
            if own != name and own not in {*fields, *_KNOWN} and value not in (0, None):
                raise self._refusal(name, value, "absent")
            if own != name and own in fields and type(value) not in (int, float):
                raise self._refusal(name, value, "a number")
        found = {name: self._own(key) for key, name in fields.items()}
        heads, width = found["num_attention_heads"], found["hidden_size"]
        head = found["head_dim"] = found["head_dim"] or (heads and width and width // heads)
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._own(key) not in (None, head):
                raise self._refusal(f"{self._name}.{key}", self._own(key), f"the head's {head}")
        family, tensors = self._family, self.tensors()
        found |= {
            name: any(tensor.endswith(f"{linears[0]}.bias") for tensor in tensors)
            for name, linears in family.biases_if.items()
        }
        ids = {n: self.keys.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "eot")}
        embedding = tensors.get(f"{parameters.EMBEDDING}.weight")
        return {
            "architectures": [ARCHITECTURES[self._name]],
            "model_type": family.model_type,
            **{name: value for name, value in found.items() if value is not None},
            **self._gguf.derived(found),
            "vocab_size": embedding and embedding.shape[0],
            "tie_word_embeddings": f"{parameters.HEAD}.weight" not in tensors,
            "rope_scaling": self._scaling(found["rope_theta"] or 10000.0, head),
            "bos_token_id": ids["bos"],
            "eos_token_id": [ids["eos"], ids["eot"]] if ids["eot"] is not None else ids["eos"],
            **{name: only for name, only in family.only.items() if only is not None},
            "torch_dtype": "float32",
        }

    def _scaling(self, theta: float, head: Any) -> dict[str, Any] | None:
        """The rope_scaling that the keys ask for, or a tensor of factors, which are Llama 3's."""
        given = {name: self._own(key) for key, name in _SCALING.items()}
        scaling = None
        if given["rope_type"] not in (None, "none"):
            scaling = {name: value for name, value in given.items() if value is not None}
        if ROPE_FACTORS not in self._blocks:
            return scaling
        factors = np.asarray(self._blocks[ROPE_FACTORS].read(), np.float64)
        llama3 = Llama3(float(factors.max()), 1.0, 4.0, 8192)
        if scaling is None and type(head) is int and factors.shape == (head // 2,):
            with np.errstate(all="ignore"):
                plain = rotary_frequencies(theta, head, None).astype(np.float64)
                if np.allclose(plain / llama3.rescale(plain, theta), factors, rtol=1e-4):
                    return write_scaling(llama3)
        raise self._refusal(ROPE_FACTORS, factors, "Llama 3's, of length 8192 and factors 1 and 4")

    def tensors(self) -> dict[str, Blocks]:
        """Every tensor but the rotary factors, under the names of a Hugging Face checkpoint."""
        heads, key_heads = self._own("attention.head_count"), self._own("attention.head_count_kv")
        turned = {".q_proj.": heads, ".k_proj.": heads if key_heads is None else key_heads}
        offset, found = self._family.layer.get("norm_offset", 0.0), {}
        for name, blocks in self._blocks.items():
            if name == ROPE_FACTORS:
                continue
            name = self._hugging_face(name)
            if self._gguf.paired:
                heads = next((n for part, n in turned.items() if part in name), None)
                blocks = blocks._replace(heads=heads)
            if name.endswith("norm.weight"):  # whose gain is stored
                blocks = blocks._replace(less=offset)
            found[name] = blocks
        return found

    def _hugging_face(self, name: str) -> str:
        """A tensor's name in a Hugging Face checkpoint; unknown names stay."""
        stem, _, end = name.rpartition(".")
        layer, named = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem), {**_OF_LAYER, **self._gguf.tensors}
        if layer and layer[2] in named:
            return f"model.layers.{layer[1]}.{named[layer[2]]}.{end}"
        return f"{_OUTSIDE[stem]}.{end}" if stem in _OUTSIDE else name

    def sha256(self) -> str:
        """SHA-256 of the file."""
        return files.sha256(self.path)

    def companions(self) -> dict[str, Callable[[], bytes]]:
        """What a directory has beside config.json and weights, made from the keys."""
        config = self.fields()
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        return {
            "tokenizer.json": lambda: bpe.tokenizer(self.keys, str(self.path)).to_str().encode(),
            "tokenizer_config.json": lambda: files.to_json(bpe.settings(self.keys)),
            "generation_config.json": lambda: files.to_json(ids),
        }

    def beside(self) -> dict[str, str]:
        """Nothing: all is in the one file."""
        return {}
