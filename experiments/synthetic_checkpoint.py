"""What does quantizing a model of Llama-3.1-8B's size cost in time and memory?

Writes a checkpoint of its shapes with random weights, for `duquantpp quantize` to be timed on
where the real one is not at hand: a Hugging Face directory of sharded safetensors in bfloat16,
tensors normal with standard deviation 0.02, norms 1. Its outputs mean nothing; sizes, shapes and
the work per layer are those of the real one.
Command: python -m experiments.synthetic_checkpoint [--layers N] [--seed N] --out DIR
    duquantpp quantize --model DIR --recipe block_hadamard --calibration-text TEXT --out OUT
    (TEXT needs a tokenizer.json in DIR; any byte-level one will do)
Cost: 32 layers are 15 GiB on disk; eight shards (a layer, or an embedding) are in memory at a time.
Last result: 2026-11-25, block_hadamard with RTN, 64 rows of random ids, two layers on two CPU cores
    shared with other work: 277 s of CPU time, peak resident memory 4.8 GiB. One H100, jax 0.11.2,
    64 rows of 512 random ids: RTN, all 32 layers 225 s, peak host memory 4.2 GiB; GPTQ, 8 layers
    201 s (167 of them until the first layer was done, most of it compiling), 4.4 GiB; four times
    that, 802 s, bounds 32 layers.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from duquantpp_jax import files
from duquantpp_jax.checkpoints.shards import INDEX
from duquantpp_jax.models import DecoderConfig, parameter_shapes
from duquantpp_jax.models.parameters import LAYER

SHAPES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "torch_dtype": "bfloat16",
}
"""config.json of the checkpoint but for its number of layers."""


def write(out: Path, layers: int, seed: int, shapes: dict = SHAPES) -> None:
    """Writes the checkpoint.

    Args:
      out: A new directory.
      layers: Layers of the model.
      seed: Seed of the weights.
      shapes: The other fields of config.json.
    """
    out.mkdir(parents=True)
    fields = shapes | {"num_hidden_layers": layers}
    places: dict[str, str] = {}
    stacked = parameter_shapes(DecoderConfig.from_dict(fields))
    outside = {name: shape for name, shape in stacked.items() if not name.startswith(LAYER)}
    inside = {name: shape[1:] for name, shape in stacked.items() if name.startswith(LAYER)}
    shards = [{name: shape} for name, shape in outside.items()]
    shards += [
        {name.replace("*", str(number)): shape for name, shape in inside.items()}
        for number in range(layers)
    ]

    def write_shard(number: int) -> str:
        random, shard = np.random.default_rng((seed, number)), shards[number - 1]
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {f"{name}.weight": _tensor(name, shape, random) for name, shape in shard.items()}
        save_file(tensors, out / file, {"format": "pt"})
        return file

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for shard, file in zip(
            shards, threads.map(write_shard, range(1, len(shards) + 1)), strict=True
        ):
            places |= dict.fromkeys((f"{name}.weight" for name in shard), file)
            print(f"{file}: {(out / file).stat().st_size / 2**20:.0f} MiB")
    files.write_whole(out / INDEX, files.to_json({"metadata": {}, "weight_map": places}))
    files.write_whole(out / "config.json", files.to_json(fields))


def _tensor(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if name.endswith("norm"):
        return np.ones(shape, ml_dtypes.bfloat16)
    # A table of normal numbers, drawn from: ten times as fast as drawing them one by one.
    table = (0.02 * random.standard_normal(1 << 16)).astype(ml_dtypes.bfloat16).view(np.uint16)
    return table[random.integers(0, 1 << 16, shape, np.uint16)].view(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers, arguments.seed)


if __name__ == "__main__":
    main()
