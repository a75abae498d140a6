"""Products by oneDNN: as exact as torch's own, whatever the shapes and strides, and only where nothing forbids them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bevt_fast.models import residual
from bevt_fast.models.mlp import MLP
from bevt_kernels import codebook_argmax, implementation, masked_cross_entropy, products_cpu
from bevt_kernels.exactness import assert_as_exact_as_torch
from bevt_kernels.products_cpu import linear, product, serves, weight_gradient

Function = Callable[..., Tensor]
BLOCKS = products_cpu.BLOCKS


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose products are oneDNN's, of almost any size."""
    monkeypatch.setattr(products_cpu, "_left_to_mkl", lambda: True)
    for name, value in {"BLOCKS": (8, 4), "TOKENS": 4, "WORTH_IT": 1, "FEWEST": 1}.items():
        monkeypatch.setattr(products_cpu, name, value)


def calls(function: Callable[[], object]) -> int:
    """How often oneDNN multiplies in there."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    return sum(event.count for event in found.key_averages() if event.key == "mkldnn::_linear_pointwise")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(x: Tensor) -> Tensor:
    """The same numbers, whose rows lie apart."""
    return torch.cat([x, x + 1], dim=1)[:, : x.shape[1]]


def turned(x: Tensor) -> Tensor:
    """The same numbers, columns first."""
    return x.T.contiguous().T


@pytest.mark.parametrize("order", [Tensor.contiguous, spread, turned])
@pytest.mark.parametrize(
    "m, k, n",
    [
        (1, 7, 3),
        (392, 96, 384),
        (397, 384, 96),
        (400, 330, 600),
        (784, 2100, 56),
        (1570, 512, 48),
        (784, 64, 64),
        (600, 300, 40),
        (1568 + 588, 24, 48),
        (3600, 96, 72),
    ],
)
def test_as_exact_as_torch(
    onednn, m: int, k: int, n: int, order: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products_cpu, "BLOCKS", BLOCKS)
    monkeypatch.setattr(products_cpu, "TOKENS", 196)
    x, w, b, grad = numbers(m, k), numbers(n, k, seed=1), numbers(n, seed=2), numbers(m, n, seed=3)
    out, total = torch.empty(m, n), numbers(n, k, seed=4)
    x, w, grad = order(x), order(w), order(grad)
    asked: list[tuple[str, Function, Function, list[Tensor]]] = [
        ("linear", linear, torch.nn.functional.linear, [x, w, b]),
        ("linear without bias", linear, torch.nn.functional.linear, [x, w]),
        ("linear to a place", lambda *given: linear(*given, out=out), torch.nn.functional.linear, [x, w, b]),
        ("product", product, torch.mm, [grad, w]),
        ("product of turned", product, torch.mm, [x, w.T]),
        ("weight_gradient", weight_gradient, lambda grad, x: grad.T @ x, [grad, x]),
        (
            "weight_gradient, added",
            lambda grad, x, total: weight_gradient(grad, x, total.clone()),
            lambda grad, x, total: total + grad.T @ x,
            [grad, x, total],
        ),
    ]
    for name, ours, plain, given in asked:
        truth = plain(*(tensor.double() for tensor in given))
        assert_as_exact_as_torch(name, ours(*given), plain(*given), truth)
    blocks, pieces = m // 1568 + m % 1568 // 392, -(-k // products_cpu.TERMS)
    blocks += blocks > 0 and m % 392 >= 196
    assert [calls(lambda: linear(x, w, b)), calls(lambda: weight_gradient(grad, x))] == [
        blocks * pieces,
        m // 196 if blocks else 0,
    ]
    assert weight_gradient(grad, x).is_contiguous() and linear(x, w, out=out) is out


def test_the_number_of_rows_asks_for_no_program_of_its_own(onednn, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN makes one for every shape, and keeps it."""
    shapes, added = set(), products_cpu._added
    monkeypatch.setattr(
        products_cpu, "_added", lambda x, w, *rest: shapes.add((x.shape, w.shape)) or added(x, w, *rest)
    )
    for rows in range(4, 60):
        linear(numbers(rows, 24), numbers(40, 24))
        weight_gradient(numbers(rows, 24), numbers(rows, 24))
    assert shapes == {((8, 24), (40, 24)), ((4, 24), (40, 24)), ((24, 4), (24, 4))}


def test_rows_and_columns_that_lie_apart_are_brought_together(onednn) -> None:
    w = numbers(40, 60)
    assert products_cpu._dense(w) is w and products_cpu._dense(turned(w)).data_ptr() != w.data_ptr()
    assert not products_cpu._dense(turned(w)).is_contiguous()  # columns that follow each other stay as they are
    assert torch.equal(products_cpu._dense(w[:, :30]), w[:, :30]) and products_cpu._dense(w[:, :30]).is_contiguous()


@pytest.mark.parametrize("rows", [8, 9, 800])  # whole blocks, and some left over
@pytest.mark.parametrize("columns", [12, 20, 0])
def test_shapes_that_do_not_fit_are_torchs_error(onednn, rows: int, columns: int) -> None:
    x, w = numbers(rows, columns), numbers(5, 16)
    for wrong in (
        lambda: linear(x, w),
        lambda: residual.linear(x, w),
        lambda: product(x, w.T),
        lambda: linear(numbers(rows, 16), w, numbers(7)),
        lambda: weight_gradient(numbers(rows, 5), numbers(rows + 4, 16)),
        lambda: weight_gradient(numbers(rows + 4, 5), numbers(rows, 16)),
    ):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|expanded size"):
            wrong()


def test_empty_products(onednn) -> None:
    assert linear(numbers(0, 8), numbers(4, 8)).shape == (0, 4)
    assert torch.equal(weight_gradient(numbers(0, 4), numbers(0, 8)), torch.zeros(4, 8))


def test_not_a_number_and_infinity_come_through(onednn) -> None:
    x = numbers(8, 16)
    x[2, 3], x[5, 1] = torch.nan, torch.inf
    made = linear(x, numbers(4, 16, seed=1).abs())
    assert made[2].isnan().all() and made[5].isinf().all() and made[[0, 1, 3, 4, 6, 7]].isfinite().all()


def test_two_runs_give_equal_bits(onednn) -> None:
    x, grad = numbers(700, 96), numbers(700, 384, seed=1)
    assert torch.equal(weight_gradient(grad, x), weight_gradient(grad, x))


@pytest.mark.parametrize("wanted", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0)])
def test_gradients_of_a_linear_layer(onednn, wanted: tuple[int, ...]) -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        tensors = [numbers(2, 3, 5, 24), numbers(40, 24, seed=1), numbers(40, seed=2)]
        tensors = [x.to(dtype).requires_grad_(bool(asked)) for x, asked in zip(tensors, wanted)]
        residual.linear(*tensors).square().sum().backward()
        return [x.grad for x in tensors if x.grad is not None]

    ours = gradients(torch.float32)
    with implementation("reference"):
        eager, truth = gradients(torch.float32), gradients(torch.float64)
    assert len(ours) == sum(wanted)
    for found in zip(ours, eager, truth):
        assert_as_exact_as_torch("a gradient", *found)


@pytest.mark.parametrize("width", [96, 192])
def test_the_mlp_of_a_block(onednn, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below and above the width up to which it goes in chunks."""
    monkeypatch.setattr(products_cpu, "BLOCKS", BLOCKS)
    monkeypatch.setattr(products_cpu, "TOKENS", 196)

    def answers(dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        norm, mlp = residual.Norm(width).to(dtype), MLP(width, 4 * width).to(dtype)
        x = numbers(2000, width, dtype=dtype).requires_grad_()
        out = mlp(*norm(x))
        out.square().sum().backward()
        return [out, *(tensor.grad for tensor in (x, *mlp.parameters()) if tensor.grad is not None)]

    made: list[Tensor] = []
    assert calls(lambda: made.extend(answers(torch.float32))) >= 6
    with implementation("reference"):
        eager, truth = answers(torch.float32), answers(torch.float64)
    for number, found in enumerate(zip(made, eager, truth)):
        assert_as_exact_as_torch(f"number {number}", *found)


def test_cross_entropy_and_codebook(onednn) -> None:
    head = nn.Linear(24, 70)
    features, targets = numbers(900, 24), torch.arange(900) % 70
    assert calls(lambda: masked_cross_entropy(features, head, targets)) >= 2
    # whole numbers: every sum is exact, and equal scores are many
    x, w = numbers(3, 50, 24).round(), numbers(70, 24, seed=1).round()
    mask = numbers(3, 50, seed=2) > 0
    for hidden in (None, mask, torch.zeros_like(mask)):
        ids = codebook_argmax(x, w, None, hidden)
        with implementation("reference"):
            assert torch.equal(ids, codebook_argmax(x, w, None, hidden))
    assert calls(lambda: codebook_argmax(x, w, None, mask)) >= 1


def test_who_watches_sees_plain_products(onednn) -> None:
    x, layer = numbers(6, 8), residual.Linear(8, 4)
    assert serves(x, layer.weight, layer.bias)
    for other in (torch.float64, torch.bfloat16):
        assert not serves(x.to(other), layer.weight.to(other)) and not serves(x, layer.weight.to(other))
    assert not serves(x.to("meta"), layer.weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, layer.weight) and layer(x).dtype == torch.bfloat16
    with implementation("reference"):
        assert calls(lambda: layer(x)) == 0
    with torch.backends.mkldnn.flags(enabled=False):
        assert not serves(x, layer.weight) and calls(lambda: layer(x)) == 0
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * 6 * 8 * 4

    expected = nn.functional.linear(x, layer.weight, layer.bias)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: layer(row[None])[0]))(x)
    torch.testing.assert_close(jacobians, layer.weight.expand(6, 4, 8))
    of_weight = (layer.weight,)
    tangent = torch.func.jvp(lambda w: torch.func.functional_call(layer, {"weight": w}, x), of_weight, of_weight)[1]
    torch.testing.assert_close(tangent, expected - layer.bias)
    exported = torch.export.export(nn.Sequential(layer), (x,), strict=False)
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    assert "mkldnn" not in str(getattr(traced, "inlined_graph"))  # noqa: B009


@pytest.mark.parametrize(
    "maker, capability, expected",
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_whose_processors(maker: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_cpu, "_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products_cpu._left_to_mkl.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products_cpu._left_to_mkl.__wrapped__()


def test_the_maker_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"amd": "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: x\n", "arm": "CPU implementer\t: 0x41\n"}
    for name, expected in {"amd": "AuthenticAMD", "arm": "", "none": ""}.items():
        if name in said:
            (tmp_path / name).write_text(said[name])
        monkeypatch.setattr(products_cpu, "Path", lambda _, name=name: tmp_path / name)
        assert products_cpu._maker() == expected
