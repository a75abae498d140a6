"""A recorded launch as the compiler's input: what Triton's JIT would make of the same arguments, without a GPU.

Triton compiles a kernel anew for every type of its arguments and for a few facts about their values: an integer that is
1 becomes a constant, and an integer or a pointer that 16 divides is marked, since that is what allows wide loads. Code
compiled without these facts is other code, with other registers.
"""

from typing import Any, NamedTuple

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from .runtime import Launch, triton, warn_once

POINTERS = {
    "bool": "u1",
    **{"uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64"},
    **{"int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64"},
    **{"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"},
    **{"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"},
}


class Source(NamedTuple):
    """Everything that decides which code a launch runs, the chip apart."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list]
    options: dict[str, Any]

    def key(self) -> tuple:
        """Equal for launches that share their code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return id(self.kernel), *(repr(sorted(part.items())) for part in parts)

    def ast(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


def specialise(launch: Launch) -> Source:
    """The source that the JIT would compile for this launch."""
    parameters = {parameter.name: parameter for parameter in launch.kernel.params}
    options = {name: value for name, value in launch.constants.items() if name not in parameters}
    named = {name: value for name, value in launch.constants.items() if name in parameters}
    bound = launch.kernel.signature.bind(*launch.arguments, **named)
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(bound.arguments.items()):
        kind, divisible = _kind(parameters[name], value)
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return Source(launch.kernel, signature, constants, attributes, options)


def _kind(parameter: Any, value: Any) -> tuple[str, bool]:
    """The type in the signature, and whether the code may know that 16 divides the value."""
    if parameter.is_constexpr:
        return "constexpr", False
    kind, divisible = _kind_of_value(parameter, value)
    divisible &= not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    if parameter.annotation_type:
        kind = parameter.annotation_type
        divisible &= kind != "u1" and kind[:2] not in ("fp", "bf")
    return kind, divisible


def _kind_of_value(parameter: Any, value: Any) -> tuple[str, bool]:
    if value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        element = POINTERS.get(str(value.dtype).removeprefix("torch."))
        if element is None:
            raise TypeError(f"argument {parameter.name} is a tensor of {value.dtype}, which no kernel takes")
        # an allocation begins at a multiple of 16, so the offset of a view decides
        divisible = value.storage_offset() * value.element_size() % 16 == 0
        return ("*k" if parameter.is_const else "*") + element, divisible
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", False
        width = "i32" if -(2**31) <= value < 2**31 else "i64" if -(2**63) <= value < 2**63 else "u64"
        return width, value % 16 == 0
    raise TypeError(f"argument {parameter.name} is a {type(value).__name__}; a launch takes tensors, numbers and None")


def disagreement(launch: Launch, source: Source, target: GPUTarget) -> str:
    """What the installed Triton's own JIT would specialise otherwise; empty where they agree.

    The JIT's binder needs no driver, but it is private. Where it has moved, a warning says that nothing was compared.
    """
    make_binder = getattr(jit, "create_function_from_signature", None)
    pack = getattr(launch.kernel, "_pack_args", None)
    if make_binder is None or pack is None:
        warn_once(f"Triton {triton.__version__} hides how its JIT specialises arguments; ours is not compared with it")
        return ""
    backend = make_backend(target)
    bind = make_binder(launch.kernel.signature, launch.kernel.params, backend)
    keywords = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialisation, options = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = pack(backend, keywords, bound, specialisation, options)
    ours = backend.parse_options(dict(source.options))
    for name, mine, theirs in (
        ("signature", source.signature, signature),
        ("constants", source.constants, constants),
        ("attributes", source.attributes, attributes),
        ("options", vars(ours), vars(options)),
    ):
        theirs = {key: value for key, value in theirs.items() if value != []}
        if mine != theirs:
            different = {key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)}
            told = ", ".join(f"{key}: {mine.get(key)} for {theirs.get(key)}" for key in sorted(different, key=str))
            return f"the JIT would compile other code ({name}: {told})"
    return ""
