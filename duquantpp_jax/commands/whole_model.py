"""The worker of `kernels --model`: compiles a model's steps, and prints a line of JSON for each.

A process has only one architecture, so `commands.kernels` starts one of its own. The environment
names the directory in which Mosaic writes machine code.
"""

import collections
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from duquantpp_jax.checkpoints import load_any
from duquantpp_jax.kernels import sass, target
from duquantpp_jax.models import SITES
from duquantpp_jax.models.cache import empty_cache
from duquantpp_jax.models.parameters import SITE_WEIGHTS
from duquantpp_jax.ptq.layout import for_tensor_cores
from duquantpp_jax.ptq.stores import store

KERNELS = ("scaled_matmul", "rotate_quantize")


def main(name: str, place: str, tokens: str) -> None:
    """Prefill of so many tokens, and a token after them."""
    directory = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    model, linear, state = load_any(pathlib.Path(place))
    model, config = model.computing(jnp.bfloat16), model.config
    operands = for_tensor_cores(linear, state)
    kind, capacity = store("bf16", config.head_dim), int(tokens) + 1

    def step(model: Any, tokens: Any, cache: Any, state: Any) -> Any:
        last = jnp.full(1, tokens.shape[1] - 1, jnp.int32)
        return model.extend(tokens, cache, linear, state, last)

    cache = jax.eval_shape(lambda: empty_cache(config, kind, 1, capacity))
    with target.compile_only(name) as device:
        where = SingleDeviceSharding(device)

        def placed(x: Any) -> Any:
            return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where)

        for what, count in (("prefill", int(tokens)), ("decode", 1)):
            for file in directory.iterdir():
                file.unlink()
            ids = jax.ShapeDtypeStruct((1, count), jnp.int32)
            given = jax.tree.map(placed, (model, ids, cache, operands))
            start = time.perf_counter()
            compiled = jax.jit(step).lower(*given).compile()
            spent = {"seconds": round(time.perf_counter() - start, 3)}
            about = {"step": what, "tokens": count, "layers": config.num_hidden_layers}
            found = told(compiled.as_text() or "", sass.read(directory))
            print(json.dumps(about | found | spent), flush=True)


def told(hlo: str, kernels: list[sass.Kernel]) -> dict[str, Any]:
    """What a compiled step has: the scan over layers has the calls of one layer."""
    calls = collections.Counter(
        kernel
        for line in hlo.splitlines()
        if 'custom_call_target="mosaic_gpu' in line
        for kernel in KERNELS
        if re.search(rf'op_name="[^"]*/{kernel}/', line)
    )
    linears, inputs = sum(len(SITE_WEIGHTS[site]) for site in SITES), len(SITES)
    on_cores, rotated = (calls[kernel] for kernel in KERNELS)
    utcomma = [kernel.tensor_core_in_loop().get("UTCOMMA", 0) for kernel in kernels]
    products = [kernel for kernel, count in zip(kernels, utcomma, strict=True) if count]
    spilled = sum(kernel.spill_bytes for kernel in kernels)
    wrong = {
        f"{linears} linears a layer, {on_cores} on tensor cores": on_cores != linears,
        f"{inputs} inputs a layer, {rotated} rotated by the kernel": rotated != inputs,
        "no kernel has UTCOMMA": not products,
        f"{spilled} bytes of registers spill": spilled > 0,
        "not for sm_100a alone": {kernel.target for kernel in kernels} != {"sm_100a"},
    }
    return {
        "linears": linears,
        **{kernel: calls[kernel] for kernel in KERNELS},
        "kernels": len(kernels),
        "utcomma": sum(utcomma),
        "registers": max((kernel.registers for kernel in kernels), default=0),
        "spill_bytes": spilled,
        "failures": [text for text, so in wrong.items() if so],
    }


if __name__ == "__main__":
    main(*sys.argv[1:4])
