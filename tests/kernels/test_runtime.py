"""Who answers a call, and what the package does to the process that imports it."""

import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bevt_kernels
from bevt_kernels import implementation, runtime, window_attention

PACKAGE = Path(bevt_kernels.__file__).parent
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")


def _inputs():
    return torch.randn(1, 2, 4, 4, 3, 2, 16), torch.randn(27, 2)


def _attend(qkv, table):
    return window_attention(qkv, table, (2, 2, 2), (0, 1, 1))


def _run(program, *folders):
    path = [sys.executable, "-c", f"import sys; sys.path[:0] = {list(map(str, folders))}\n{textwrap.dedent(program)}"]
    done = subprocess.run(path, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout.split()


def test_importing_wakes_neither_the_compiler_nor_a_gpu():
    program = """
    import torch, bevt_kernels
    print("torch._dynamo" in sys.modules, "sympy" in sys.modules, torch.cuda.is_initialized())
    """
    assert _run(program, PACKAGE.parent) == ["False"] * 3


def test_a_copy_in_another_project_lives_beside_the_installed_package(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "project" / "swin_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "project" / "__init__.py").touch()
    program = """
    import torch
    import bevt_kernels, project.swin_kernels
    qkv, table = torch.randn(1, 1, 2, 2, 3, 1, 16), torch.randn(9, 1)
    arguments = qkv, table, [1, 2, 2], [0, 0, 0], [0, 0, 0], "true"
    for operators in (torch.ops.bevt_kernels, torch.ops.project_swin_kernels):
        print(tuple(operators.window_attention(*[x.to("meta") for x in arguments[:2]], *arguments[2:])[0].shape))
    """
    assert "".join(_run(program, tmp_path, PACKAGE.parent)) == "(1,1,2,2,1,16)" * 2


@pytest.mark.parametrize("name", ["refrence", None, []])
def test_an_unknown_implementation_is_named(name):
    with pytest.raises(ValueError, match="expected 'auto', 'reference' or 'fused', got"), implementation(name):
        pass


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_fake_tensors_leave_nothing_behind(name):
    window = (2, 2, 1)  # of no other test: the geometry must not be kept already
    with FakeTensorMode(), implementation(name):
        qkv = torch.randn(1, 2, 4, 3, 3, 1, 16, requires_grad=True)
        window_attention(qkv, torch.randn(9, 1), window, (1, 1, 0)).sum().backward()
    qkv = torch.randn(1, 2, 4, 3, 3, 1, 16)
    assert type(window_attention(qkv, torch.randn(9, 1), window, (1, 1, 0))) is torch.Tensor


@interpreted
def test_transforms_of_torch_are_left_to_the_reference(monkeypatch):
    qkv, table = _inputs()
    uses = {
        "grad": lambda: torch.func.grad(lambda x: _attend(x, table).square().sum())(qkv),
        "vmap": lambda: torch.vmap(lambda x: _attend(x, table))(torch.stack([qkv, qkv])),
        "jvp": lambda: torch.func.jvp(lambda x: _attend(x, table), (qkv,), (qkv,))[1],
    }
    for name, use in uses.items():
        monkeypatch.setattr(runtime, "_warned", set())
        expected = use()
        with implementation("fused"), pytest.warns(UserWarning, match="torch.func nor forward-mode .*; the reference"):
            assert torch.equal(use(), expected), name


@interpreted
def test_a_second_derivative_is_refused_in_words():
    qkv, table = _inputs()
    qkv.requires_grad_()
    with implementation("fused"):
        (grad,) = torch.autograd.grad(_attend(qkv, table).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"window_attention_backward.* no autograd formula"):
        grad.sum().backward()


@interpreted
def test_what_the_backward_needs_may_not_be_overwritten():
    qkv, table = _inputs()
    qkv.requires_grad_()
    with implementation("fused"):
        out = _attend(qkv, table)
    loss = out.sum()
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
def test_several_threads_may_call_at_once():
    qkv, table = _inputs()
    answers = {}

    def call(number):
        x = (qkv + number).requires_grad_()
        out = _attend(x, table)
        answers[number] = out.detach(), *torch.autograd.grad(out.sum(), x)

    with implementation("fused"), warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        together = dict(answers)
        [call(number) for number in range(3)]
    assert all(torch.equal(a, b) for number in range(3) for a, b in zip(together[number], answers[number]))
