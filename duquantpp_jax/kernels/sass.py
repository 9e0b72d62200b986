"""What the machine code of a compiled kernel says: instructions, loops, registers, memories.

Mosaic writes down what it makes of a kernel where MOSAIC_GPU_DUMP_TO points: PTX, the messages of
ptxas, the SASS that nvdisasm reads back from the binary, and the host's code that launches it.
"""

import collections
import dataclasses
import pathlib
import re

__all__ = ["DUMP", "Kernel", "read"]

DUMP = {  # environment variables, read when a kernel is compiled; MOSAIC_GPU_DUMP_TO beside them
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_SASS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
}
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*)")
_MMA = re.compile(r"UTC[A-Z]MMA")
_ROLES = {"load": re.compile("UTMALDG"), "multiply": _MMA, "write": re.compile("LDTM")}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, as it was compiled.

    Attributes:
      name: Of the kernel.
      target: Architecture, from the PTX.
      instructions: How often each opcode stands in the code.
      loops: The same for the loop of each role: "load" around its TMA copies, "multiply" around
        its tensor-core instructions, "write" around its reads of tensor memory. All of the code,
        where that loop was unrolled away.
      registers: For each thread.
      spill_bytes: Bytes of registers stored to and loaded from local memory, and stack.
      shared_bytes: Shared memory of a CTA.
      tensor_columns: 32-bit columns of tensor memory, of 512.
      grid: CTAs.
      cluster: CTAs of a cluster.
      threads: Threads of a CTA.
    """

    name: str
    target: str
    instructions: dict[str, int]
    loops: dict[str, dict[str, int]]
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_columns: int
    grid: int
    cluster: int
    threads: int

    def tensor_core(self) -> dict[str, int]:
        """Tensor-core instructions: UTCOMMA, UTCOMMA.4X, UTCQMMA, UTCHMMA and how many.

        A .2CTA in the middle of the opcode is left out: it is the cluster's, not the format's.
        """
        return _tensor_core(self.instructions)

    def tensor_core_in_loop(self) -> dict[str, int]:
        """Tensor-core instructions of the loop around them."""
        return _tensor_core(self.loops["multiply"])


def read(directory: pathlib.Path) -> list[Kernel]:
    """All kernels that were compiled into a directory of dumps, by name."""
    return [_kernel(path) for path in sorted(directory.glob("*.ptx"))]


def _kernel(path: pathlib.Path) -> Kernel:
    ptx, messages, host = (path.with_suffix(s).read_text() for s in (".ptx", ".ptxas", ".ll"))
    sass = next(path.parent.glob(f"{path.stem}.sass*")).read_text()
    instructions, loops = _count(sass)
    # launch(..., grid x y z, cluster x y z, block x y z, dynamic shared memory, ...)
    launch = re.search(r"call void @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\((.*)\)", host)
    sizes = [int(i) for i in re.findall(r"i32 (\d+)", launch[1] if launch else "")] or [0] * 10
    stack = [int(i) for i in re.findall(r"(\d+) bytes (?:stack|spill)", messages)]
    return Kernel(
        name=path.stem,
        target=_find(r"\.target (\w+)", ptx, str),
        instructions=dict(instructions),
        loops={role: dict(loop) for role, loop in loops.items()},
        registers=_find(r"Used (\d+) registers", messages, int),
        spill_bytes=sum(stack),
        shared_bytes=sizes[9],
        tensor_columns=_tensor_columns(ptx),
        grid=sizes[0] * sizes[1] * sizes[2],
        cluster=sizes[3] * sizes[4] * sizes[5],
        threads=sizes[6] * sizes[7] * sizes[8],
    )


def _count(sass: str) -> tuple[collections.Counter[str], dict[str, collections.Counter[str]]]:
    """Opcodes of all of the code, and of the loop of each role.

    A loop is what can be reached from an instruction and leads back to it, which takes in the
    blocks that compilers move out of line.
    """
    blocks, following = _flow(sass)
    everything = collections.Counter(opcode for block in blocks for opcode in block)
    preceding: list[list[int]] = [[] for _ in blocks]
    for block, targets in enumerate(following):
        for to in targets:
            preceding[to].append(block)

    def around(role: re.Pattern[str]) -> collections.Counter[str]:
        for block, opcodes in enumerate(blocks):
            if any(role.match(opcode) for opcode in opcodes):
                loop = _reach(block, following) & _reach(block, preceding)
                if block in loop:
                    return collections.Counter(o for b in loop for o in blocks[b])
        return everything

    return everything, {role: around(pattern) for role, pattern in _ROLES.items()}


def _flow(sass: str) -> tuple[list[list[str]], list[list[int]]]:
    """Blocks of opcodes that run in a row, and for each the blocks that may follow."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    ends: list[tuple[str, str]] = [("", "")]  # how each block ends: predicate, branch

    def next_block() -> None:
        blocks.append([])
        ends.append(("", ""))

    for line in sass.splitlines():
        if label := _LABEL.match(line):
            next_block()
            labels[label[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.search(line):
            predicate, opcode, operands = found.groups(default="")
            blocks[-1].append(opcode)
            if opcode.startswith(("BRA", "EXIT")):
                ends[-1] = (
                    predicate or ("U" if " UP" in operands or "!UP" in operands else ""),
                    opcode + operands,
                )
                next_block()
    following: list[list[int]] = []
    for block, (predicate, branch) in enumerate(ends):
        targets = [labels[to] for to in re.findall(r"\.L_x_\d+", branch) if to in labels]
        if (predicate or not branch) and block + 1 < len(blocks):
            targets.append(block + 1)
        following.append(targets)
    return blocks, following


def _reach(start: int, edges: list[list[int]]) -> set[int]:
    """Blocks at the end of at least one step from `start`."""
    seen: set[int] = set()
    waiting = list(edges[start])
    while waiting:
        block = waiting.pop()
        if block not in seen:
            seen.add(block)
            waiting.extend(edges[block])
    return seen


def _tensor_core(opcodes: dict[str, int]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for opcode, count in opcodes.items():
        if _MMA.match(opcode):
            counts[opcode.replace(".2CTA", "")] += count
    return dict(counts)


def _tensor_columns(ptx: str) -> int:
    alloc = re.search(r"tcgen05\.alloc\S*\s+\[[^]]+\], (%?\w+)", ptx)
    if alloc is None:
        return 0
    if alloc[1].isdigit():
        return int(alloc[1])
    return _find(rf"mov\.b32\s+{re.escape(alloc[1])}, (\d+)", ptx, int)


def _find(pattern: str, text: str, kind: type):
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler wrote")
    return kind(found[1])
