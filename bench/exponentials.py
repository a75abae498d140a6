"""Chains of ex2 in registers, in three forms: nothing else is computed meanwhile, so their rate is the unit's."""

import triton
import triton.language as tl


@triton.jit
def chain(source, target, rounds, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """x becomes 2^-x `rounds` times; every thread has several chains, so that none waits for another."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + place)
    for _ in range(rounds):
        if KIND == "f32":
            x = tl.inline_asm_elementwise(
                "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t; }",
                "=f,f",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        elif KIND == "f16x2":
            x = tl.inline_asm_elementwise(
                "{ .reg .b32 t; neg.f16x2 t, $1; ex2.approx.f16x2 $0, t; }",
                "=r,r",
                [x],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
        else:  # bf16x2, of compute capability 9.0 and newer
            x = tl.inline_asm_elementwise(
                "{ .reg .b32 t; neg.bf16x2 t, $1; ex2.approx.ftz.bf16x2 $0, t; }",
                "=r,r",
                [x],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
    tl.store(target + place, x)
