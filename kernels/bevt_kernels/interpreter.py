"""Makes Triton's interpreter compute as a GPU does where it would not.

bfloat16: Triton 3.6 to 3.9 keep it as raw 16-bit integers and add, multiply and round those, without a word. Here it
goes by value, rounded to nearest even. Reductions still run on the raw integers: kernels convert to float32 first.

float32 products: the interpreter leaves the order of their sums to BLAS, which picks another for another shape. A GPU
adds term after term with fused multiply-adds, so that an element has the same bits in whatever tile it is computed;
the attention's backward relies on that when it computes scores again.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

numpy: Any = interpreter.np  # type: ignore[attr-defined]
Handle: Any = interpreter.TensorHandle


def correct() -> None:
    """Replace the four operations that bfloat16 passes through. Once per process; a second call does nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "_bevt_kernels_corrected", False):
        return
    builder._bevt_kernels_corrected = True
    cast, binary, unary, dot = builder.cast_impl, builder.binary_op, builder.unary_op, builder.create_dot

    def corrected_cast(self: Any, source: Any, target: Any) -> Any:
        to = target.scalar
        if _is_bf16(source) and to != tl.bfloat16:
            wide = Handle(_widen(source.data), tl.float32)
            return wide if to == tl.float32 else cast(self, wide, target)
        if to == tl.bfloat16 and not _is_bf16(source):
            return Handle(_narrow(source.data.astype(numpy.float32)), tl.bfloat16)
        return cast(self, source, target)

    def corrected_binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not _is_bf16(left):
            return binary(self, left, right, operation)
        return _result(operation(_widen(left.data), _widen(right.data)))

    def corrected_unary(self: Any, value: Any, operation: Any) -> Any:
        if not _is_bf16(value):
            return unary(self, value, operation)
        return _result(operation(_widen(value.data)))

    def corrected_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if all(x.dtype.scalar == tl.float32 for x in (a, b, d)):
            return Handle(_fused_multiply_adds(a.data, b.data, d.data), tl.float32)
        a, b = (Handle(_widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    builder.cast_impl, builder.binary_op = corrected_cast, corrected_binary
    builder.unary_op, builder.create_dot = corrected_unary, corrected_dot


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: Any) -> Any:
    return (numpy.ascontiguousarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def _narrow(values: Any) -> Any:
    values = numpy.ascontiguousarray(values, dtype=numpy.float32)
    bits = values.view(numpy.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(values), numpy.uint16(0x7FC0), nearest)


def _fused_multiply_adds(a: Any, b: Any, total: Any) -> Any:
    """a b + total over the last axis of a in order. A product of two float32 is exact in float64."""
    a, b = a.astype(numpy.float64), b.astype(numpy.float64)
    for k in range(a.shape[-1]):
        total = (total + a[..., :, k, None] * b[..., k, None, :]).astype(numpy.float32)
    return total


def _result(values: Any) -> Any:
    if values.dtype == numpy.bool_:
        return Handle(values, tl.int1)
    return Handle(_narrow(values), tl.bfloat16)
