"""The kernels under everything that stands around a model in training: torch.compile, autocast, activation
checkpointing, DDP and DeepSpeed; and who answers a call, in words.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bevt_kernels
from bevt_kernels import exactness, implementation, runtime, window_attention
from tests.kernels import answers
from tests.kernels.answers import answer, counted_launches, fused_answer, kernel_files, small_cases
from tests.training.command import ROOT, environment

FILES = {name: module for name, module in kernel_files().items() if small_cases(module)}
DIFFERENTIABLE = [name for name, module in FILES.items() if not getattr(module, "RETURNS_IDS", False)]
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="Triton's interpreter is for machines without a GPU")


def _answers(name, dtype=torch.float32, device="cpu"):
    """Of the first small case: small enough to be run many times."""
    return answers.answers(name, small_cases(FILES[name])[0], dtype, device)


def _same_bits(one, other):
    assert one.named().keys() == other.named().keys()
    for name, value in one.named().items():
        exactness.assert_same_bits(name, value, other.named()[name])


@pytest.fixture(autouse=True)
def _forget():
    """Graphs and warnings of other tests."""
    torch._dynamo.reset()
    runtime._warned.clear()


# -- torch.compile -----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("name", FILES)
def test_compiles_without_a_graph_break(name):
    made = _answers(name)
    compiled = torch.compile(answers.public(name), fullgraph=True, backend="aot_eager")
    with implementation("fused"), counted_launches() as launches:
        fused = answer(compiled, made.arguments, made.upstream)
    assert sorted(launches) == sorted(made.launches)
    _same_bits(fused, made.fused)
    # the same compiled function obeys another choice
    with implementation("reference"), counted_launches() as launches:
        eager = answer(torch.compile(answers.public(name), backend="aot_eager"), made.arguments, made.upstream)
    assert not launches
    answers.assert_law(made, eager)


@interpreted
@pytest.mark.parametrize("name", FILES)
def test_compiles_for_shapes_that_change(name):
    case = small_cases(FILES[name])[0]
    compiled = torch.compile(answers.public(name), fullgraph=True, backend="aot_eager", dynamic=True)
    made = _answers(name)
    with implementation("fused"):
        _same_bits(answer(compiled, made.arguments, made.upstream), made.fused)
    empty = answers.without_batch(answers.arguments_of(FILES[name], case, torch.float32))
    upstream = answers.upstream_for(answers.outputs_of(FILES[name].reference(*empty)))
    with implementation("fused"):
        _same_bits(answer(compiled, empty, upstream), answer(FILES[name].reference, empty, upstream))


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every operation of bevt_kernels."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bevt_kernels":
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@interpreted
@pytest.mark.parametrize("name", FILES)
def test_operations_are_registered_correctly(name):
    """Schema (nothing is mutated or aliased), fake tensors, autograd and dynamic shapes, of forward and backward."""
    made = _answers(name)
    with _Recorder() as recorder:
        fused_answer(name, made.arguments, made.upstream)
    assert recorder.calls, f"{name}: no operation of its own"
    if name in DIFFERENTIABLE:
        assert len(recorder.calls) > 1, f"{name}: forward and backward are not two operations"
    wanted = {value.data_ptr() for value in answers.leaves(made.arguments).values()}
    for operation, (arguments, options) in recorder.calls.items():
        fresh = [
            x.detach().clone().requires_grad_(x.data_ptr() in wanted and "backward" not in str(operation))
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        torch.library.opcheck(operation, tuple(fresh), options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_inductor_keeps_the_bits(name):
    made = _answers(name, torch.bfloat16, "cuda")
    compiled = torch.compile(answers.public(name), fullgraph=True)
    _same_bits(answer(compiled, made.arguments, made.upstream), made.fused)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_cuda_graph_replays_the_bits(name):
    """Nothing waits for the GPU, and every launch is on the current stream."""
    made = _answers(name, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            answer(answers.public(name), made.arguments, made.upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answer(answers.public(name), made.arguments, made.upstream)
    for value in captured.named().values():
        value.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    _same_bits(captured, made.fused)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILES)
def test_nothing_waits_for_the_gpu(name):
    made = _answers(name, torch.bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer(answers.public(name), made.arguments, made.upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- autocast and checkpointing ----------------------------------------------------------------------------------------


def _under_autocast(function):
    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*arguments)

    return call


@interpreted
@pytest.mark.parametrize("name", FILES)
def test_autocast_gives_the_reference_s_dtype_and_exactness(name):
    made = _answers(name)
    eager = answer(_under_autocast(FILES[name].reference), made.arguments, made.upstream)
    with implementation("fused"), counted_launches() as launches:
        fused = answer(_under_autocast(answers.public(name)), made.arguments, made.upstream)
    assert launches
    for key, value in eager.named().items():
        assert fused.named()[key].dtype is value.dtype, key
    answers.assert_law(made._replace(eager=eager), fused)


@interpreted
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_activation_checkpointing_gives_the_same_bits(name, reentrant):
    made = _answers(name)
    parts = [x for x in made.arguments if isinstance(x, nn.Module)]

    def call(*arguments):
        return checkpoint(answers.public(name), *arguments, use_reentrant=reentrant)

    with implementation("fused"), counted_launches() as launches:
        if not reentrant:
            _same_bits(answer(call, made.arguments, made.upstream), made.fused)
        else:  # knows only backward(), which adds to .grad
            arguments = answers.changed(made.arguments, torch.clone)
            outputs = answers.outputs_of(call(*arguments))
            torch.autograd.backward([outputs[key] for key in made.upstream], list(made.upstream.values()))
            gradients = {key: leaf.grad for key, leaf in answers.leaves(arguments).items()}
            _same_bits(answers.Answer({key: value.detach() for key, value in outputs.items()}, gradients), made.fused)
    assert len(launches) > len(made.launches), parts


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What two processes found; distributed_checks.py says how."""
    out = tmp_path_factory.mktemp("distributed") / "report.json"
    place = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), TRITON_INTERPRET="1")
    place["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("distributed_checks.py")
    done = subprocess.run([*command, str(script), str(out)], env=place, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(out.read_text())


@interpreted
@pytest.mark.parametrize("way", ["DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3"])
def test_two_processes_have_the_gradients_of_one(report, way):
    """And the same on both, bit by bit; `error` and `bound` are over all parameters, each by its largest gradient."""
    found = report[way]
    assert found["launches"] > 0
    assert found["same on both"]
    assert found["error"] <= found["bound"]


# -- who answers -------------------------------------------------------------------------------------------------------


def _call(dtype=torch.float32, width=16):
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 1, 4, 4, 3, 1, width, generator=draw).to(dtype)
    table = torch.randn(49, 1, generator=draw).to(dtype)
    return qkv, table, (1, 4, 4)


def _launches(choice):
    with implementation(choice), counted_launches() as launches:
        window_attention(*_call())
    return len(launches)


@interpreted
def test_choices_nest_and_end_with_their_block():
    assert _launches("fused") and not _launches("reference") and not _launches("auto")
    with implementation("fused"):
        with implementation("reference"):
            assert runtime._implementation == "reference"
            with implementation("fused"):
                assert runtime._implementation == "fused"
            assert runtime._implementation == "reference"
        assert runtime._implementation == "fused"
    assert runtime._implementation == "auto"


def test_a_choice_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), implementation("fused"):
        raise ZeroDivisionError
    assert runtime._implementation == "auto"


@pytest.mark.parametrize("name", ["triton", "Fused", "", None])
def test_a_wrong_choice_is_named(name):
    with pytest.raises(ValueError, match="implementation: expected 'auto', 'reference' or 'fused', got") as caught:
        with implementation(name):
            raise AssertionError("entered")
    assert repr(name) in str(caught.value)
    assert runtime._implementation == "auto"


def test_auto_on_a_cpu_is_silent_and_the_reference():
    with warnings.catch_warnings(), counted_launches() as launches:
        warnings.simplefilter("error")
        out = window_attention(*_call())
        assert torch.equal(out, FILES["window_attention"].reference(*_call()))
        window_attention(*_call(torch.float64))
        for name, module in FILES.items():
            answer(answers.public(name), answers.arguments_of(module, small_cases(module)[0], torch.float32), {})
    assert FILES and not launches


@interpreted
def test_what_the_kernels_cannot_do_is_said_once():
    call, expected = _call(torch.float64), FILES["window_attention"].reference(*_call(torch.float64))
    with implementation("fused"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(window_attention(*call), expected)
    assert len(said) == 1
    text = str(said[0].message)
    assert text.startswith("window_attention: ") and "float64" in text
    assert text.endswith("the reference answers instead")


@interpreted
@pytest.mark.parametrize("name", FILES)
def test_float64_is_the_reference_s_and_said_once(name):
    made = _answers(name)
    arguments = answers.doubled(made.arguments)
    with implementation("fused"), warnings.catch_warnings(record=True) as said, counted_launches() as launches:
        warnings.simplefilter("always")
        for _ in range(2):
            _same_bits(answer(answers.public(name), arguments, made.upstream), made.truth)
    assert not launches
    assert [str(one.message).startswith(f"{name}: ") for one in said] == [True]


@interpreted
def test_a_fallback_of_one_call_leaves_the_next_to_the_kernels():
    with implementation("fused"), warnings.catch_warnings(), counted_launches() as launches:
        warnings.simplefilter("ignore")
        window_attention(*_call(torch.float64))
        assert not launches
        window_attention(*_call())
    assert launches


# -- processes of users ------------------------------------------------------------------------------------------------

IMPORT = """
import sys, warnings
warnings.simplefilter("error")
sys.path[:0] = [".", "kernels"]
{first}
import torch
import bevt_kernels
from bevt_kernels import runtime
assert not torch.cuda.is_initialized()
assert "TRITON_INTERPRET" not in __import__("os").environ and not runtime.INTERPRETED
assert runtime.AVAILABLE == {available}
draw = torch.Generator().manual_seed(0)
qkv, table = torch.randn(1, 1, 4, 4, 3, 1, 16, generator=draw), torch.randn(49, 1, generator=draw)
head = torch.nn.Linear(16, 32)
targets, mask = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
tokens = torch.randn(1, 4, 4, 16).requires_grad_()


def everything():
    out = bevt_kernels.window_attention(qkv.requires_grad_(), table, (1, 4, 4))
    out.sum().backward()
    ids = bevt_kernels.codebook_argmax(torch.randn(1, 4, 16), head.weight, head.bias)
    loss, _ = bevt_kernels.masked_cross_entropy(torch.randn(1, 4, 16), head, targets, mask)
    norm = torch.ones(16), torch.zeros(16)
    hidden = bevt_kernels.masked_embedding(tokens, torch.ones(1, 2, 2, dtype=torch.bool), *norm, torch.ones(16))
    (loss + hidden.sum()).backward()
    assert ids.shape == (1, 4) and loss.isfinite()
    return out


quiet = everything()
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as said, bevt_kernels.implementation("fused"):
    for _ in range(2):
        assert torch.equal(everything(), quiet)
words = [str(one.message) for one in said if "reference answers instead" in str(one.message)]
assert len(words) == len(set(words)) == 4, words
assert all({reason!r} in text for text in words), words
print("done")
"""


def test_on_a_machine_without_a_gpu_an_import_does_nothing(program):
    text = IMPORT.format(first="", available=True, reason="NVIDIA GPU")
    done = program("-c", text, env={"CUDA_VISIBLE_DEVICES": ""}, check=0)
    assert done.stdout == "done\n" and not done.stderr


def test_without_triton_the_references_answer(program):
    text = IMPORT.format(first="sys.modules['triton'] = None", available=False, reason="Triton is not installed")
    done = program("-c", text, env={"CUDA_VISIBLE_DEVICES": ""}, check=0)
    assert done.stdout == "done\n" and not done.stderr


def test_programs_that_tests_start_are_not_interpreted(program):
    done = program("-c", "import os; print(os.environ.get('TRITON_INTERPRET'))")
    assert done.stdout == "None\n"


def test_the_public_names():
    functions = {"window_attention", "masked_embedding", "masked_cross_entropy", "codebook_argmax", "implementation"}
    assert functions <= set(bevt_kernels.__all__)
    assert all(callable(getattr(bevt_kernels, name)) for name in bevt_kernels.__all__)
