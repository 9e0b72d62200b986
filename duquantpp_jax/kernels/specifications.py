"""Speeds of a B200 from NVIDIA's documents; none is measured or fitted here.

Sources:
  [D] NVIDIA DGX B200 data sheet: eight GPUs with 144 | 72 PFLOPS FP4 (sparse | dense), 72 PFLOPS
      FP8 (sparse), 64 TB/s of HBM3e.
  [B] NVIDIA Blackwell architecture technical brief: 2.25 PFLOPS of dense BF16 for each GPU.
  [G] CUDA C++ Programming Guide, compute capability 10.0.
"""

FLOPS_PER_SECOND = {  # dense
    "mxfp4": 9e15,  # [D] 72 PFLOPS / 8
    "nvfp4": 9e15,  # [D]
    "mxfp8": 4.5e15,  # [D] 72 PFLOPS sparse / 2 / 8
    "bfloat16": 2.25e15,  # [B]
}
BYTES_PER_SECOND = 8e12  # [D] 64 TB/s / 8
CORES = 148  # streaming multiprocessors [G]


def roofline(flops: int, bytes_moved: int, kind: str) -> tuple[float, str]:
    """Least time in seconds, and its bound: "tensor cores" or "memory".

    Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
    """
    compute, memory = flops / FLOPS_PER_SECOND[kind], bytes_moved / BYTES_PER_SECOND
    return max((compute, "tensor cores"), (memory, "memory"))
