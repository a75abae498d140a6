"""Makes Triton's interpreter compute as a GPU does where it would not, and hurry.

bfloat16: Triton 3.6 to 3.9 keep it as raw 16-bit integers and add, multiply and round those, without a word. Here it
goes by value, rounded to nearest even. Reductions still run on the raw integers: kernels convert to float32 first.

float32 products: the interpreter leaves the order of their sums to BLAS, which picks another for another shape. On a
GPU an element has the same bits in whatever tile it is computed, and the attention's backward relies on that when it
computes scores again. Here they are summed in float64 and rounded once, which is finer than a GPU: whether float32 is
as exact on the chip, only the chip can say.
"""

import functools
import types
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
            return Handle(_product(a.data, b.data, d.data), tl.float32)
        a, b = (Handle(_widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    builder.cast_impl, builder.binary_op = corrected_cast, corrected_binary
    builder.unary_op, builder.create_dot = corrected_unary, corrected_dot


def patch_language_once() -> None:
    """Replace the functions of `tl` once for a whole kernel, and not again for every `tl.sum` and `tl.max` within it,
    and look a NumPy dtype up instead of building the table of all of them: a third to half of the interpreter's time.
    """
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(interpreter, "_bevt_kernels_patched"):
        return
    module: Any = interpreter
    module._bevt_kernels_patched = True
    patch, dtype_of, active = module._patch_lang, module._get_np_dtype, []
    # `tl.sum` and its like see the language as `core`
    sees_both = types.FunctionType(patch_language_once.__code__, {"tl": tl, "core": tl.core})

    def patch_once(function: Any) -> Any:
        if active:
            return module._LangPatchScope()
        scope = patch(sees_both)
        active.append(scope)
        restore = scope.restore

        def restored() -> None:
            active.clear()
            restore()

        scope.restore = restored
        return scope

    scalar_dtype = functools.cache(dtype_of)

    def kept_dtype(type: Any) -> Any:
        return dtype_of(type.scalar) if type.scalar.is_ptr() else scalar_dtype(type.scalar)

    module._patch_lang, module._get_np_dtype = patch_once, kept_dtype


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: Any) -> Any:
    return (numpy.ascontiguousarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def _narrow(values: Any) -> Any:
    values = numpy.ascontiguousarray(values, dtype=numpy.float32)
    bits = values.view(numpy.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    return numpy.where(numpy.isnan(values), numpy.uint16(0x7FC0), nearest)


def _product(a: Any, b: Any, total: Any) -> Any:
    """a b + total with one rounding, so that tiles of any shape agree."""
    return (a.astype(numpy.float64) @ b.astype(numpy.float64) + total).astype(numpy.float32)


def _result(values: Any) -> Any:
    if values.dtype == numpy.bool_:
        return Handle(values, tl.int1)
    return Handle(_narrow(values), tl.bfloat16)
