"""Golden files: what other libraries make of the same blocks. None of their code is kept here.

    python tests/goldens/make.py inputs
    python tests/goldens/make.py torchao              pip install torch==2.13.0 torchao==0.18.0
    python tests/goldens/make.py compressed_tensors   pip install torch==2.13.0 \
                                                        compressed-tensors==0.20.0
    python tests/goldens/make.py microxcaling         github.com/microsoft/microxcaling on
                                                        PYTHONPATH, at commit 7bc41952, and torch
    python tests/goldens/make.py fouroversix          github.com/mit-han-lab/fouroversix/src on
                                                        PYTHONPATH, at commit dadfad69, and torch
    python tests/goldens/make.py qwix                 pip install qwix==0.1.8

Each writes tests/goldens/NAME.npz: arrays only, with the versions in the array `about`. The inputs
are bfloat16 numbers held in float32, as some of the libraries take nothing else.
"""

import importlib.metadata
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent


def inputs() -> dict[str, np.ndarray]:
    """96 blocks of 32: Gaussian and heavy-tailed at many exponents, all telling amax (powers of
    two, ties, borders of rules and what lies next to them), zeros, subnormals, both ends."""
    rng = np.random.default_rng(4)
    blocks = [rng.standard_normal(32) * 2.0 ** rng.integers(-8, 8) for _ in range(24)]
    blocks += [rng.standard_t(2, 32) * 2.0 ** rng.integers(-100, 100) for _ in range(24)]
    for amax in (1, 1.5, 1.75, 1.7421875, 1.9921875, 1.0078125, 3, 3.5, 5, 6, 6.5, 7, 7.5, 28,
                 31, 448, 464, 480, 57344, 61440):  # fmt: skip
        blocks.append(np.r_[amax, np.linspace(-amax, amax, 31) * rng.random(31)])
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 0.5, 1, 1.5, 2, 3, 4, 0, 7])
    blocks += [np.r_[ties, -ties] * 2.0**k for k in (0, 1, -20, 60)]
    blocks += [np.zeros(32), -np.zeros(32), np.r_[-1e-6, np.full(31, -2.0)]]
    blocks += [rng.standard_normal(32) * 2.0**k for k in (-124, -126, -128, -131, -140)]
    blocks += [np.linspace(-1.9, 1.9, 32) * 2.0**k for k in (120, 124, 126, 127)]
    while len(blocks) < 96:
        blocks.append(rng.laplace(size=32) * 2.0 ** rng.integers(-30, 30))
    x = np.array(blocks, np.float32)
    return {"x": (x.view(np.uint32) & 0xFFFF0000).view(np.float32)}


def torchao(x: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    kinds = {
        "e2m1": torch.float4_e2m1fn_x2,
        "e2m3": "fp6_e2m3",
        "e3m2": "fp6_e3m2",
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    out, tensor = {}, torch.from_numpy(x)
    for element, kind in kinds.items():
        for rule in ("FLOOR", "CEIL", "EVEN", "RCEIL"):
            scales, data = to_mx(tensor, kind, 32, getattr(ScaleCalculationMode, rule))
            out[f"{element}.{rule.lower()}.bytes"] = scales.view(torch.uint8).numpy()
            out[f"{element}.{rule.lower()}.codes"] = data.view(torch.uint8).numpy()
    ordinary = tensor[:24].reshape(-1, 16).contiguous()
    scale = per_tensor_amax_to_scale(ordinary.abs().max())
    scales, data = nvfp4_quantize(ordinary, 16, scale)
    out["nvfp4.tensor_scale"] = scale.numpy()
    out["nvfp4.bytes"] = scales.view(torch.uint8).numpy()
    out["nvfp4.codes"] = data.view(torch.uint8).numpy()
    return out


def compressed_tensors(x: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    amax = torch.from_numpy(x).abs().amax(-1).to(torch.bfloat16)
    out = {f"bytes{bits}": generate_mx_scales(amax, bits).float().numpy() for bits in (4, 6, 8)}
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16)
    values = torch.cat([grid, -grid]).repeat(2, 1).flip(0)
    out["values"] = values.float().numpy()
    out["packed"] = pack_fp4_to_uint8(values).numpy()
    ordinary = torch.from_numpy(x[:24].reshape(-1, 16).copy())
    ordinary[:16] *= 2.0 ** -torch.arange(16, 32)[:, None]  # scales that E4M3 rounds to zero
    ordinary[0] = 0
    reciprocal = 2.0 ** -np.ceil(np.log2(ordinary.abs().max().item() / 2688))
    whole, args = torch.tensor([reciprocal], dtype=torch.float32), NVFP4["weights"]
    scales, _ = calculate_qparams(ordinary.amin(-1), ordinary.amax(-1), args, global_scale=whole)
    state = {"weight": ordinary, "weight_scale": scales[:, None], "weight_global_scale": whole}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressed = NVFP4PackedCompressor.compress(state, scheme)
    out["nvfp4.x"] = ordinary.numpy()
    out["nvfp4.reciprocal"] = whole.numpy()
    out["nvfp4.bytes"] = compressed["weight_scale"].view(torch.uint8).numpy()
    out["nvfp4.codes"] = compressed["weight_packed"].numpy()
    return out


def microxcaling(x: np.ndarray) -> dict[str, np.ndarray]:
    import torch
    from mx.mx_ops import _quantize_mx

    names = {"e2m1": "fp4_e2m1", "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e4m3": "fp8_e4m3",
             "e5m2": "fp8_e5m2"}  # fmt: skip
    return {
        f"{element}.{rounding}": _quantize_mx(
            torch.from_numpy(x.copy()), 8, name, axes=[-1], block_size=32, round=rounding
        ).numpy()
        for element, name in names.items()
        for rounding in ("even", "nearest")
    }


def qwix(x: np.ndarray) -> dict[str, np.ndarray]:
    import jax.numpy as jnp
    from qwix._src.core import qarray

    out = {}
    for name in ("mxfp4", "mxfp8"):
        how = qarray.HowToQuantize(qtype=name, channelwise_axes=(0,), tiled_axes={1: 32})
        q = qarray.quantize(jnp.asarray(x), how)
        out[f"{name}.scales"] = np.asarray(q.scale, np.float32)
        out[f"{name}.values"] = np.asarray(q.qvalue.astype(jnp.float32))
    return out


def fouroversix(x: np.ndarray) -> dict[str, np.ndarray]:
    import types

    import torch

    # Its packages import kernels that need a GPU; the reference needs none of them.
    for name in ("", ".quantize", ".kernels", ".quantize.pytorch"):
        package = types.ModuleType(f"fouroversix{name}")
        parts = name.split(".")[1:]
        package.__path__ = [str(pathlib.Path(p, "fouroversix", *parts)) for p in sys.path]
        sys.modules[f"fouroversix{name}"] = package
    from fouroversix.quantize.pytorch import reference
    from fouroversix.utils import RoundStyle, ScaleRule

    blocks = torch.from_numpy(x[:24].reshape(-1, 16))
    values, scales = reference.nvfp4_fouroversix_block_scaled_quantization(
        blocks, blocks.abs().max(), scale_rule=ScaleRule.mse, round_style=RoundStyle.nearest
    )
    return {"values": values.numpy(), "bytes": scales.view(torch.uint8).numpy()}


PACKAGES = {
    "fouroversix": ("torch",),
    "torchao": ("torch", "torchao"),
    "compressed_tensors": ("torch", "compressed-tensors"),
    "microxcaling": ("torch",),
    "qwix": ("jax", "qwix"),
}


def main(name: str) -> None:
    if name not in ("inputs", *PACKAGES):
        sys.exit(f"no library {name}: one of inputs, {', '.join(PACKAGES)}")
    if name == "inputs":
        np.savez_compressed(HERE / "inputs.npz", **inputs())
        return
    x = np.load(HERE / "inputs.npz", allow_pickle=False)["x"]
    found = globals()[name](x)
    about = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES[name])
    about += {
        "microxcaling": ", microxcaling 7bc41952de394f5cc5e782baf132e7c7542eb4e4",
        "fouroversix": ", fouroversix dadfad6901d473a734fe71e0b082e70ee993e23a",
    }.get(name, "")
    np.savez_compressed(HERE / f"{name}.npz", about=np.array(about), **found)
    print(about, {k: v.shape for k, v in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
