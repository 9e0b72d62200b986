"""Reads the machine code of a compiled kernel: instructions, loops, registers, memories.

Mosaic writes files of a kernel to MOSAIC_GPU_DUMP_TO: PTX, the messages of ptxas, the SASS that
nvdisasm reads from the binary, and the host code that launches the kernel.
"""

import collections
import dataclasses
import math
import pathlib
import re

# Environment variables, read when a kernel is compiled; MOSAIC_GPU_DUMP_TO beside them.
DUMP = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS", "HOST_LLVM")}
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*)")
_MMA = re.compile(r"UTC[A-Z]MMA")
_ROLES = {"load": re.compile("UTMALDG"), "multiply": _MMA, "write": re.compile("LDTM")}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel, in numbers.

    Attributes:
      target: Architecture, from the PTX.
      instructions: Count of each opcode.
      loops: The same for the loop of each role: "load" around its TMA copies, "multiply" around
        its tensor-core instructions, "write" around its reads of tensor memory. If the loop was
        unrolled, all of the code.
      registers: Of a thread.
      spill_bytes: Bytes of registers stored to and loaded from local memory, and stack.
      shared_bytes: Shared memory of a CTA.
      tensor_columns: 32-bit columns of tensor memory, of 512.
      ctas: CTAs of the grid.
      cluster: CTAs of a cluster.
    """

    target: str
    instructions: dict[str, int]
    loops: dict[str, dict[str, int]]
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    ctas: int
    cluster: int

    def tensor_core_in_loop(self) -> dict[str, int]:
        """Counts of UTCOMMA, UTCOMMA.4X, UTCQMMA and UTCHMMA in the loop around them.

        A .2CTA inside the opcode is dropped: it belongs to the cluster, not to the format.
        """
        counts: collections.Counter[str] = collections.Counter()
        for opcode, count in self.loops["multiply"].items():
            if _MMA.match(opcode):
                counts[opcode.replace(".2CTA", "")] += count
        return dict(counts)


def read(directory: pathlib.Path) -> list[Kernel]:
    """All kernels of a directory of dumps, sorted by name."""
    return [_kernel(path) for path in sorted(directory.glob("*.ptx"))]


def _kernel(path: pathlib.Path) -> Kernel:
    ptx, messages, host = (path.with_suffix(s).read_text() for s in (".ptx", ".ptxas", ".ll"))
    instructions, loops = _count(next(path.parent.glob(f"{path.stem}.sass*")).read_text())
    # launch(..., grid x y z, cluster x y z, block x y z, dynamic shared memory, ...)
    launch = re.search(r"call void @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\((.*)\)", host)
    sizes = [int(i) for i in re.findall(r"i32 (\d+)", launch[1] if launch else "")] or [0] * 10
    return Kernel(
        target=_find(r"\.target (\w+)", ptx),
        instructions=instructions,
        loops=loops,
        registers=int(_find(r"Used (\d+) registers", messages)),
        spill_bytes=sum(int(i) for i in re.findall(r"(\d+) bytes (?:stack|spill)", messages)),
        shared_bytes=sizes[9],
        tensor_columns=_tensor_columns(ptx),
        ctas=math.prod(sizes[0:3]),
        cluster=math.prod(sizes[3:6]),
    )


def _count(sass: str) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Opcodes of all the code, and of the loop of each role.

    The loop of an instruction is all code that it can reach and from which it can be reached. This
    includes the blocks that compilers move out of line.
    """
    blocks, following = _flow(sass)
    everything = dict(collections.Counter(opcode for block in blocks for opcode in block))

    def around(role: re.Pattern[str]) -> dict[str, int]:
        for block, opcodes in enumerate(blocks):
            if any(role.match(opcode) for opcode in opcodes):
                ahead = _reach(block, following)
                loop = [b for b in ahead if block in _reach(b, following)]
                if loop:
                    return dict(collections.Counter(o for b in loop for o in blocks[b]))
        return everything

    return everything, {role: around(pattern) for role, pattern in _ROLES.items()}


def _flow(sass: str) -> tuple[list[list[str]], list[list[int]]]:
    """Basic blocks of opcodes, and for each block the blocks that may follow."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    ends: list[tuple[str, str]] = [("", "")]  # how each block ends: predicate, branch
    for line in sass.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(blocks)
        elif found:
            predicate, opcode, operands = found.groups(default="")
            blocks[-1].append(opcode)
            if not opcode.startswith(("BRA", "EXIT")):
                continue
            uniform = "U" if " UP" in operands or "!UP" in operands else ""
            ends[-1] = (predicate or uniform, opcode + operands)
        else:
            continue
        blocks.append([])  # a label begins a block, a branch ends a block
        ends.append(("", ""))
    following: list[list[int]] = []
    for block, (predicate, branch) in enumerate(ends):
        targets = [labels[to] for to in re.findall(r"\.L_x_\d+", branch) if to in labels]
        if (predicate or not branch) and block + 1 < len(blocks):
            targets.append(block + 1)
        following.append(targets)
    return blocks, following


def _reach(start: int, edges: list[list[int]]) -> set[int]:
    """Blocks that are one or more steps away from `start`."""
    seen: set[int] = set()
    waiting = list(edges[start])
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen.add(block)
            waiting.extend(edges[block])
    return seen


def _tensor_columns(ptx: str) -> int:
    alloc = re.search(r"tcgen05\.alloc\S*\s+\[[^]]+\], (%?\w+)", ptx)
    if alloc is None:
        return 0
    if alloc[1].isdigit():
        return int(alloc[1])
    return int(_find(rf"mov\.b32\s+{re.escape(alloc[1])}, (\d+)", ptx))


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler wrote")
    return found[1]
