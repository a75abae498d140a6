"""Run by test_compile_check: compile a kernel as a launch on a GPU would, on a stand-in for the driver, and compare."""

import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, cast

import torch
from triton.backends.compiler import GPUTarget

from bevt_kernels import runtime
from bevt_kernels.runtime import tl, triton
from bevt_kernels.specialisation import disagreement, specialise


@triton.jit
def kernel(
    x_ptr,
    byte_ptr,
    flag_ptr,
    index_ptr,
    none_ptr,
    scale,
    small,
    one,
    wide,
    even,
    odd,
    yes,
    annotated: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    ON: tl.constexpr = True,  # pyright: ignore[reportArgumentType]
):
    offsets = tl.arange(0, BLOCK).to(tl.int64) * one + even * small
    if none_ptr is None and ON:
        index = tl.load(index_ptr + offsets + odd, mask=offsets < wide, other=0)
        x = tl.load(x_ptr + index * annotated).to(DTYPE) * scale
        x = tl.where(tl.load(flag_ptr + offsets) & yes, x, tl.load(byte_ptr + offsets).to(DTYPE))
        tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["y_ptr", "stride"])
def unspecialised(x_ptr, y_ptr: tl.const, count, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(y_ptr + offsets * stride, mask=offsets < count, other=0.0))


def launches() -> list[runtime.Launch]:
    """Every kind of argument, and every fact about a value that changes the code."""
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    byte, flag, index = (x.new_empty(4096, dtype=dtype) for dtype in (torch.uint8, torch.bool, torch.int32))
    with runtime.recording(90) as written:
        for pointer in (x, x[1:], x.view(-1)[3:], x.to(torch.float16), x.float()):
            for number in (0, 1, 16, 17, -32, 2**31 - 1, 2**31, 2**40 + 1):
                arguments = (pointer, byte, flag, index, None, 0.5, number, 1, 2**33, 48, 7, True, number)
                runtime.launch(kernel, (1,), *arguments, BLOCK=128, DTYPE=tl.float32)
        runtime.launch(unspecialised, (1,), x, x, 1, 64, BLOCK=128, num_warps=2, maxnreg=64)
        runtime.launch(unspecialised, (1,), x, x, 16, 1, BLOCK=128, num_stages=1)
    return written


def main() -> int:
    target = GPUTarget("cuda", 90, 32)
    device = {
        "get_current_device": lambda: 0,
        "get_current_stream": lambda device: 0,
        "get_current_target": lambda: target,
    }
    triton.runtime.driver.set_active(cast(Any, SimpleNamespace(**device)))
    written = launches()
    for launch in written:
        source = specialise(launch)
        if different := disagreement(launch, source, target):
            print(launch, different)
            return 1
    for launch in (written[0], written[10], written[-2]):
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        theirs = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **options, **launch.constants)
        source = specialise(launch)
        ours = triton.compile(source.ast(), target, source.options)
        if ours.asm["ptx"] != theirs.asm["ptx"] or ours.asm["cubin"] != theirs.asm["cubin"]:
            print(f"the JIT's code for {launch} differs")
            return 1
    print(f"{len(written)} launches agree")
    return 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        sys.exit(main())
