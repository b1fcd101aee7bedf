"""Compile the Triton kernels ahead of time, without a GPU, and read what came out.

    python kernels/bench/aot.py [--arch sm_90 ...] [--dtype fp32 ...] [--json OUT.json]

Runs the real host code over tensors without memory, records what it would launch, compiles exactly
that for each architecture, and reads registers, spills and the innermost loop from the machine
code: an element is one (batch, token, channel, state), for the convolution one (batch, token,
channel), and counts are per element and thread.
Needs the disassembler that triton ships (NVIDIA); AMD's listing comes from the compiler itself.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton  # noqa: TID251
from triton.backends.compiler import GPUTarget  # noqa: TID251
from triton.compiler import ASTSource  # noqa: TID251

from medmamba.kernels import triton as scan_triton
from medmamba.kernels import triton_backward, triton_conv, triton_forward, triton_parts
from medmamba.kernels.arguments import Needs, ScanArguments
from medmamba.kernels.triton_cut import Tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPE_NAMES |= {torch.int32: "i32"}
KERNELS = {
    triton_forward: ("chunk_state", "state_pass", "chunk_scan"),
    triton_backward: ("forward_pass", "reverse_pass"),
    triton_conv: ("conv_forward", "conv_backward"),
}
TAPS = 4
INT32_LIMIT = 2**31
ENDS_A_BLOCK = re.compile(r"BRA 0x|EXIT|s_branch|s_endpgm|s_setpc")
SHAPE = (1, 8192, 128, 16)  # batch, length, channels, state: several chunks, whole tiles


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel for one architecture; counts are per element of the innermost loop."""

    kernel: str
    arch: str
    dtype: str
    tile: int
    registers: int
    spills: int
    shared: int
    instructions: float
    exponentials: float
    shuffles: float


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch the host code asked for."""

    kernel: Any
    name: str
    arguments: dict[str, Any]


def arguments_of(
    dtype: torch.dtype, shape: tuple[int, int, int, int] = SHAPE, *, gate: bool = True
) -> ScanArguments:
    """A full scan (softplus, bias, skip, gate) over tensors without memory."""
    batch, length, channels, state = shape
    rows = torch.empty((batch, length, channels), dtype=dtype, device="meta")
    projection = torch.empty((batch, length, 1, state), dtype=dtype, device="meta")
    return ScanArguments(
        u=rows,
        delta=rows,
        A=torch.empty((channels, state), device="meta"),
        B=projection,
        C=projection,
        skip=torch.empty(channels, device="meta"),
        gate=rows if gate else None,
        delta_bias=torch.empty(channels, device="meta"),
        delta_softplus=True,
        out_dtype=dtype,
    )


def launches_of(arguments: ScanArguments, tuning: Tuning) -> list[Launch]:
    """What a forward and a backward of scan and convolution launch, each kind once."""
    with _recorded() as launches:
        out, _, states = scan_triton.forward(arguments, save_states=True, tuning=tuning)
        scan_triton.backward(arguments, states, out, None, Needs(), tuning=tuning)
        x, bias = arguments.u, arguments.delta_bias
        assert bias is not None
        weight = torch.empty((*bias.shape, TAPS), device="meta")
        triton_conv.forward(x, weight, bias, None)
        triton_conv.backward(x, x, weight, bias, None, None)
    return list({launch.name: launch for launch in launches}.values())


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile what was launched, with the specialisation a run would give it."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPE_NAMES[value.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
            continue
        generic = name in triton_parts.SIZES
        if value is None or name.isupper() or (value == 1 and not generic):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i64" if value >= INT32_LIMIT else "i32"
            if value % 16 == 0 and not generic:
                attributes[(position,)] = [["tt.divisibility", 16]]
    keys = ("num_warps", "enable_fp_fusion", "maxnreg")
    options = {key: launch.arguments[key] for key in keys if key in launch.arguments}
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=target, options=options)


def measure(launch: Launch, arch: str, dtype: str) -> Compiled:
    """Compile one launch and count its machine code."""
    target = TARGETS[arch]
    compiled = compile_launch(launch, target)
    tile, per_program = _elements(launch)
    per_thread = per_program / target.warp_size / launch.arguments["num_warps"]
    if target.backend == "cuda":
        usage, loop = _read_nvidia(compiled.asm["cubin"])
        exponentials = sum("MUFU.EX2" in line for line in loop)
        shuffles = sum("SHFL" in line for line in loop)
    else:
        usage, loop = _read_amd(compiled.asm["amdgcn"])
        exponentials = sum("v_exp_f32" in line for line in loop)
        shuffles = sum(bool(re.search(r"dpp|ds_.*permute|ds_swizzle|readlane", i)) for i in loop)
    elements = per_thread * max(1, int(exponentials / per_thread))
    return Compiled(
        kernel=launch.name,
        arch=arch,
        dtype=dtype,
        tile=tile,
        **usage,
        instructions=round(len(loop) / elements, 2),
        exponentials=round(exponentials / elements, 2),
        shuffles=round(shuffles / elements, 2),
    )


def _elements(launch: Launch) -> tuple[int, int]:
    """Channels of a program, and what it does in one round of its innermost loop."""
    if launch.name.startswith("conv"):
        tile = launch.arguments["BE"]
        return tile, tile * launch.arguments["BT"]
    tile, state = launch.arguments["BD"], launch.arguments["N"]
    if launch.name == "state_pass":
        state = triton_forward.PREFETCH.value  # chunks
    return tile, tile * state


def matrix(archs: list[str], dtypes: list[str], tuning: Tuning) -> list[Compiled]:
    """Every kernel for every architecture and type asked for."""
    return [
        measure(launch, arch, dtype)
        for arch in archs
        for dtype in dtypes
        for launch in launches_of(
            arguments_of(DTYPES[dtype]), replace(tuning, lanes=TARGETS[arch].warp_size)
        )
    ]


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """Replace the kernels by recorders for a while."""
    launches: list[Launch] = []
    originals = [(m, name, getattr(m, name)) for m, names in KERNELS.items() for name in names]
    for module, name, kernel in originals:
        setattr(module, name, _Recorder(kernel, name, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


class _Recorder:
    """Stands where a kernel stood."""

    def __init__(self, kernel: Any, name: str, launches: list[Launch]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            name = "adjoint_state" if arguments.get("ADJOINT") else self.name
            self.launches.append(Launch(kernel=self.kernel, name=name, arguments=arguments))

        return launch


def _read_nvidia(cubin: bytes) -> tuple[dict[str, int], list[str]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tool, "-res-usage", path)
        listing = _output(tool, "-sass", path)
    numbers = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1])
        + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": int(re.search(r"SHARED:(\d+)", usage)[1]),
    }
    code = [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)]
    branches = [
        (int(found[1], 16), address)
        for address, instruction in code
        if (found := re.search(r"BRA\b.*?(0x[0-9a-f]+)", instruction))
    ]
    return numbers, _innermost(code, branches)


def _read_amd(listing: str) -> tuple[dict[str, int], list[str]]:
    numbers = {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", listing)[1])
        + int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", listing)[1]),
        "shared": int(re.search(r"\.group_segment_fixed_size:\s+(\d+)", listing)[1]),
    }
    code, labels, branches = [], {}, []
    for line in listing.split("\n"):
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\d+_\d+):", text):
            labels[label[1]] = len(code)
        elif re.match(r"[sv]_|ds_|global_|buffer_|flat_", text):
            if branch := re.search(r"s_c?branch\S*\s+(\.LBB\d+_\d+)", text):
                branches.append((branch[1], len(code)))
            code.append((len(code), text))
    return numbers, _innermost(code, [(labels[to], at) for to, at in branches if to in labels])


def _innermost(code: list[tuple[int, str]], branches: list[tuple[int, int]]) -> list[str]:
    """The largest loop that holds no other loop, wherever the compiler put its blocks."""
    places = {address: place for place, (address, _) in enumerate(code)}
    jumps = [(places[source], places[target]) for target, source in branches]
    edges = jumps + [
        (place, place + 1)
        for place, (_, instruction) in enumerate(code[:-1])
        if not ENDS_A_BLOCK.match(instruction)
    ]
    forwards, backwards = _neighbours(edges), _neighbours([(to, at) for at, to in edges])
    loops: dict[int, set[int]] = {}
    heads = {target for _, target in jumps}
    for source, target in edges:
        if target not in heads or source not in _reached(0, forwards):
            continue
        if source not in _reached(0, forwards, around=target):  # it is the target that leads there
            body = _reached(source, backwards, around=target) | {target}
            loops.setdefault(target, set()).update(body)
    inner = [loop for loop in loops.values() if not any(other < loop for other in loops.values())]
    chosen = max(inner, key=len, default=set(range(len(code))))
    return [code[place][1] for place in sorted(chosen)]


def _neighbours(edges: list[tuple[int, int]]) -> dict[int, list[int]]:
    following: dict[int, list[int]] = {}
    for at, to in edges:
        following.setdefault(at, []).append(to)
    return following


def _reached(start: int, following: dict[int, list[int]], around: int | None = None) -> set[int]:
    """All places that can be reached from one, itself included, without a step onto `around`."""
    found, waiting = set(), [start]
    while waiting:
        place = waiting.pop()
        if place != around and place not in found:
            found.add(place)
            waiting += following.get(place, [])
    return found


def _output(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16", "fp16"])
    parser.add_argument("--tile", type=int)
    parser.add_argument("--backward-tile", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tuning = Tuning(tile=options.tile, backward_tile=options.backward_tile)
    rows = matrix(options.arch, options.dtype, tuning)
    print(f"triton {triton.__version__}, python {sys.version.split()[0]}")
    print("kernel         arch    type  tile  regs  spill  shared  instr/el  exp/el  shfl/el")
    for row in rows:
        print(
            f"{row.kernel:14} {row.arch:7} {row.dtype:5} {row.tile:4} {row.registers:5} "
            f"{row.spills:6} {row.shared:7} {row.instructions:9.2f} {row.exponentials:7.2f} "
            f"{row.shuffles:8.2f}"
        )
    if options.json is not None:
        table = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
