"""What a compiled kernel will ask of a chip, read from its machine code. Nothing here runs, or needs, a GPU.

The loop that matters is found in the control-flow graph, its instructions are counted by the pipe that executes them,
and each pipe's rate turns the counts into cycles. The result is a bound: it knows no stall and nothing behind L1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """One member of an architecture, with what one SM does per clock. Sources: NVIDIA's data sheets and the throughput
    table of the CUDA programming guide; the tensor rates are the data sheets' dense bf16 rates over SMs and clock.
    """

    name: str
    sms: int
    clock: float  # GHz, boost
    shared: int  # bytes of shared memory that one CTA may ask for
    fma: int  # lanes
    tensor: int  # FLOP
    smallest: int  # `shared` of the GPU that has least among those that run the same configurations

    issue = 128  # lanes: one warp instruction on each of four schedulers
    alu = 64  # lanes
    mufu = 16  # lanes
    l1 = 128  # bytes of L1 and shared memory together
    registers = 65536
    warps = 64
    ctas = 32
    tmem = 512  # columns of tensor memory, where there is one
    reserved = 1024  # bytes of shared memory that every CTA costs beyond its own


CHIPS = {
    80: Chip("A100", 108, 1.41, 163 * 1024, 64, 2048, 99 * 1024),
    90: Chip("H100", 132, 1.755, 227 * 1024, 128, 4096, 227 * 1024),
    100: Chip("B200", 148, 1.85, 227 * 1024, 128, 8192, 227 * 1024),
}

TENSOR = ("HGMMA", "HMMA", "UTCHMMA", "IGMMA", "IMMA", "QGMMA", "QMMA", "UTCQMMA", "UTCIMMA")
MUFU = ("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV")
FMA = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2", "HADD2_32", "FSWZADD")
IMAD = ("IMAD", "IMUL", "IDP")
ALU = (
    *("LOP3", "LOP", "PLOP3", "SHF", "PRMT", "LEA", "IADD", "IADD3", "VIADD", "IABS", "ISETP", "IMNMX", "VIMNMX"),
    *("VIMNMX3", "VIADDMNMX", "FSETP", "FSEL", "SEL", "FMNMX", "FMNMX3", "FCHK", "HSETP2", "HMNMX2", "F2FP", "I2FP"),
    *("MOV", "SGXT", "BMSK", "P2R", "R2P", "VOTE", "VABSDIFF", "CS2R"),
)
MEMORY = (
    "LDG",
    "STG",
    "LDGSTS",
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDL",
    "STL",
    "LD",
    "ST",
    "ATOM",
    "ATOMG",
    "ATOMS",
    "RED",
)
CLASSES = ("all", "MUFU", "tensor", "FMA", "ALU", "IMAD", *MEMORY, "SHFL", "LDTM", "STTM", "sync", "uniform", "other")
SYNC = ("BAR", "WARPSYNC", "SYNCS", "DEPBAR", "WARPGROUP", "LDGDEPBAR", "ARRIVES", "FENCE", "MEMBAR", "UTCBAR", "BSSY")


class Instruction(NamedTuple):
    """One line of nvdisasm: `@!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], RZ ;`"""

    predicate: str
    opcode: str
    operands: str
    target: str  # the label a branch goes to

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        return f"{self.predicate} {self.opcode} {self.operands}".strip()


class Resources(NamedTuple):
    """What ptxas says of one kernel."""

    registers: int
    spill: int  # bytes stored
    stack: int  # bytes


class Count(NamedTuple):
    """One pass of a loop by one CTA."""

    classes: dict[str, int]  # thread instructions
    cycles: dict[str, float]  # of one SM that does nothing else, by pipe


def resources(log: str) -> Resources:
    """Read the output of `ptxas -v`. It must be the run that made the code: other flags give other registers."""
    registers = re.findall(r"Used (\d+) registers", log)
    if not registers:
        raise ValueError(f"ptxas did not say how many registers it used: {log[-200:]!r}")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    return Resources(
        registers=max(map(int, registers)),
        spill=sum(int(stores) for _, stores in frames),
        stack=max((int(stack) for stack, _ in frames), default=0),
    )


def ctas_per_sm(chip: Chip, registers: int, threads: int, shared: int, tmem: int) -> int:
    """How many CTAs one SM holds at once; 0 where one does not fit."""
    warps = -(-threads // 32)
    # registers are given to a warp in units of 256
    limits = [chip.registers // (warps * -(-registers // 8) * 256), chip.warps // warps, chip.ctas]
    limits.append(0 if shared > chip.shared else (chip.shared + chip.reserved) // (shared + chip.reserved))
    if tmem:
        limits.append(chip.tmem // tmem)
    return min(limits)


def disassemble(cubin: bytes, tools: Path) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a cubin in order, and the index of the instruction that follows each label."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line_of_code = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*(.*?)\s*;")
    for line in text.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := line_of_code.match(line):
            target = re.search(r"`\((\.L_\w+)\)", found[3])
            instructions.append(Instruction((found[1] or "").strip(), found[2], found[3], target[1] if target else ""))
    return instructions, labels


def tensor_instructions(code: list[Instruction]) -> Counter[str]:
    """Instructions of the tensor cores by name, over the whole kernel."""
    return Counter(instruction.name for instruction in code if instruction.name in TENSOR)


def hot_loop(code: list[Instruction], labels: dict[str, int]) -> list[int]:
    """The innermost loop with the most tensor instructions, or, in a kernel without any, with the most instructions.

    Code that stands elsewhere but belongs to the loop (the wait for a barrier) is counted with it. Without a loop: all.
    """
    loops = _loops(code, labels)

    def weight(loop: set[int], tensor: bool = bool(tensor_instructions(code))) -> int:
        return sum(not tensor or code[index].name in TENSOR for index in loop)

    # a loop inside another makes the outer one uninteresting, unless it only waits
    inner = [loop for loop in loops if not any(other < loop and 4 * weight(other) > weight(loop) for other in loops)]
    inner = [loop for loop in inner if weight(loop)]
    # of equals the first: what a kernel may skip comes after what it always does
    return sorted(max(inner, key=lambda loop: (weight(loop), -min(loop)))) if inner else list(range(len(code)))


def _loops(code: list[Instruction], labels: dict[str, int]) -> list[set[int]]:
    """The natural loops: a branch back to a block that every path to the branch goes through, and what lies between."""
    starts = sorted(
        {0, *labels.values(), *(index + 1 for index, line in enumerate(code) if _leaves(line))} - {len(code)}
    )
    block_of = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    after: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        # BRA.DIV goes to code for warps whose threads have parted; theirs never do
        parted = ".DIV" in last.opcode
        goes_on = not _leaves(last) or parted or bool(last.predicate) or "," in last.operands
        following = [block_of[end]] if end < len(code) and goes_on else []
        if last.name == "BRA" and not parted and labels.get(last.target, len(code)) < len(code):
            following.append(block_of[labels[last.target]])
        after.append(following)

    before: dict[int, set[int]] = {0: set()}
    waiting = [0]
    while waiting:
        block = waiting.pop()
        for successor in after[block]:
            if successor not in before:
                before[successor] = set()
                waiting.append(successor)
            before[successor].add(block)
    dominators = {block: set(before) for block in before} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(before)[1:]:
            common = set.intersection(*(dominators[source] for source in before[block])) | {block}
            changed |= common != dominators[block]
            dominators[block] = common

    bodies: dict[int, set[int]] = {}
    for block in before:
        for head in set(after[block]) & dominators[block]:
            body = bodies.setdefault(head, {head})
            waiting = [block]
            while waiting:
                member = waiting.pop()
                if member not in body:
                    body.add(member)
                    waiting.extend(before[member])
    return [{index for block in body for index in range(starts[block], ends[block])} for body in bodies.values()]


def _leaves(line: Instruction) -> bool:
    """Whether the next instruction need not be the next line."""
    return line.name in ("BRA", "BRX", "JMP", "EXIT", "RET", "KILL")


def count(code: list[Instruction], loop: list[int], threads: int, chip: Chip) -> Count:
    """Count one pass of `loop` by a CTA of `threads` as if every instruction were executed once.

    Wavefronts of L1 and shared memory: a 128-bit access of a warp is four, a narrower one is one (neighbouring threads
    often share an address); a product on Hopper or Blackwell reads its operands from shared memory by itself.
    """
    classes = Counter({"all": len(loop)})
    wavefronts, flop = 0.0, 0.0
    warps = threads / 32
    for index in loop:
        instruction = code[index]
        classes[_class(instruction)] += 1
        if instruction.name in TENSOR:
            m, n, k = _product(code, index)
            of_cta, of_four_warps = instruction.name[0] == "U", "GMMA" in instruction.name
            copies = 1 if of_cta else warps / 4 if of_four_warps else warps
            wide = 2 if "TF32" in instruction.opcode else 1  # four bytes an element, at half the rate
            flop += 2 * m * n * k * copies * wide
            if of_cta or of_four_warps:
                both = instruction.operands.count("gdesc") == 2 or re.match(r"R\d+, gdesc", instruction.operands)
                wavefronts += (n + (m if both else 0)) * k * 2 * wide / chip.l1 * copies
        elif instruction.name in MEMORY or instruction.name == "SHFL":
            wavefronts += _wavefronts(instruction) * warps
    lanes = {name: amount * threads for name, amount in classes.items()}
    packed = sum(code[index].name in ("FFMA2", "FMUL2", "FADD2") for index in loop) * threads
    fma, imad = lanes.get("FMA", 0) + packed, lanes.get("IMAD", 0)  # a packed instruction takes two turns
    cycles = {
        "issue": lanes["all"] / chip.issue,
        "MUFU": lanes.get("MUFU", 0) / chip.mufu,
        "FMA": max((fma + imad) / chip.fma, imad / 64),  # only half of the lanes multiply integers
        "ALU": lanes.get("ALU", 0) / chip.alu,
        "L1+shared": wavefronts,
        "tensor": flop / chip.tensor,
    }
    return Count({name: lanes[name] for name in CLASSES if name in lanes}, cycles)


def _class(instruction: Instruction) -> str:
    name = instruction.name
    for title, names in (
        ("tensor", TENSOR),
        ("MUFU", MUFU),
        ("FMA", FMA),
        ("IMAD", IMAD),
        ("ALU", ALU),
        ("sync", SYNC),
    ):
        if name in names:
            return title
    if name in CLASSES:
        return name
    return "uniform" if name[0] == "U" or name in ("R2UR", "S2UR", "LDCU") else "other"


def _wavefronts(instruction: Instruction) -> int:
    if instruction.name in ("LDSM", "STSM"):
        return 4 if instruction.opcode.endswith(".4") else 2 if instruction.opcode.endswith(".2") else 1
    return 4 if ".128" in instruction.opcode else 1


def _product(code: list[Instruction], index: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a tensor instruction; depth as for 16-bit operands."""
    instruction = code[index]
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.opcode):
        return int(shape[1]), int(shape[2]), int(shape[3])
    if shape := re.search(r"\.(16)(8)(\d+)", instruction.opcode):
        return 16, 8, int(shape[3])
    if described := re.search(r"idesc\[(UR\d+)\]", instruction.operands):
        # Blackwell says the shape in a register: N/8 from bit 17, M/16 from bit 24
        for earlier in reversed(code[:index]):
            if value := re.match(rf"{described[1]}, (0x[0-9a-f]+)", earlier.operands):
                bits = int(value[1], 16)
                return (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, 16
    return 0, 0, 0
