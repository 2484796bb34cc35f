"""The count-sketch against a dense matrix, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from odedit.inputs.batch import EditParams
from odedit.objectives.common.multiplier import flat_input
from odedit.objectives.common.sketch import MAX_SKETCH_DIM, CountSketch
from tests.support.limits import set_limits

E = 3
SIZES = {"weight": 40, "bias": 7}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def random_delta(num_edits: int = E, dtype: torch.dtype = torch.float64) -> EditParams:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(num_edits, 8, 5, generator=generator, dtype=torch.float64).to(dtype),
        "bias": torch.randn(num_edits, 7, generator=generator, dtype=torch.float64).to(dtype),
    }


def dense_map(sketch: CountSketch) -> Tensor:
    """Linear part of the sketch as a matrix, weights in order of the tensors' names."""
    rows = []
    for name in sketch.sizes:
        for index in range(sketch.sizes[name]):
            unit = {key: torch.zeros(1, size, dtype=torch.float64) for key, size in sketch.sizes.items()}
            unit[name][0, index] = 1.0
            rows.append(sketch(unit)[0, : sketch.dim])
    return torch.stack(rows)


def test_sketch_and_its_gradient_equal_a_dense_matrix() -> None:
    sketch = CountSketch(SIZES, dim=16, seed=3)
    matrix_NP = dense_map(sketch)
    assert (matrix_NP.abs().sum(1) == 1).all()
    delta = {name: tensor.requires_grad_() for name, tensor in random_delta().items()}
    out_EP = sketch(delta)
    assert out_EP.shape == (E, 16 + len(SIZES))
    dense_EP = flat_input(delta) @ matrix_NP
    torch.testing.assert_close(out_EP[:, :16], dense_EP)
    weights_EP = torch.randn(E, 16, dtype=torch.float64)
    got = torch.autograd.grad((out_EP[:, :16] * weights_EP).sum(), list(delta.values()))
    expected = torch.autograd.grad((dense_EP * weights_EP).sum(), list(delta.values()))
    torch.testing.assert_close(got, expected)


def test_weights_of_one_block_never_meet() -> None:
    matrix_NP = dense_map(CountSketch({"weight": 40}, dim=16))
    for block_BP in matrix_NP.split(16):
        assert block_BP.abs().sum(0).max() == 1, "each bucket has one weight of a block at most"
    first, second, _ = matrix_NP.abs().split(16)
    assert not torch.equal(first, second), "each block has a permutation of its own"
    assert set(matrix_NP.sum(1).tolist()) == {-1.0, 1.0}


def test_sketch_gradcheck() -> None:
    sketch = CountSketch(SIZES, dim=16)
    delta = random_delta(2)

    def call(weight: Tensor, bias: Tensor) -> Tensor:
        return sketch({"weight": weight, "bias": bias})

    inputs = (delta["weight"].requires_grad_(), delta["bias"].requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_sketch_in_chunks_equals_sketch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, delta = CountSketch(SIZES, dim=16), random_delta()
    delta["weight"].requires_grad_()
    at_once = sketch(delta)
    (gradient,) = torch.autograd.grad(at_once.square().sum(), delta["weight"])
    set_limits(monkeypatch, sketched_weights=6)
    in_chunks = sketch(delta)
    torch.testing.assert_close(in_chunks, at_once)
    torch.testing.assert_close(torch.autograd.grad(in_chunks.square().sum(), delta["weight"])[0], gradient)


def test_sketch_preserves_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 1, 200, generator=generator, dtype=torch.float64)).unbind()
    b = b + a
    dim, products = 32, []
    for seed in range(400):
        sketch = CountSketch({"weight": 200}, dim=dim, seed=seed)
        products.append((sketch({"weight": a})[0, :dim] @ sketch({"weight": b})[0, :dim]).item())
    drawn = torch.tensor(products, dtype=torch.float64)
    exact = (a * b).sum().item()
    variance_bound = (a.square().sum() * b.square().sum() + exact**2).item() / dim
    assert drawn.mean().item() == pytest.approx(exact, abs=4 * math.sqrt(variance_bound / 400))
    assert drawn.var().item() < 1.3 * variance_bound


def test_sketch_is_linear_and_its_log_norms_are_norms() -> None:
    sketch, delta = CountSketch(SIZES, dim=16), random_delta()
    doubled = {name: 2 * tensor for name, tensor in delta.items()}
    torch.testing.assert_close(sketch(doubled)[:, :16], 2 * sketch(delta)[:, :16])
    expected = torch.stack([delta[name].flatten(1).norm(dim=-1).log() for name in ("bias", "weight")], dim=-1)
    torch.testing.assert_close(sketch(delta)[:, 16:], expected)


def test_sketch_depends_on_seed_and_names_only() -> None:
    delta = random_delta()
    first = CountSketch(SIZES, dim=16, seed=5)(delta)
    reordered = CountSketch(dict(reversed(SIZES.items())), dim=16, seed=5)(dict(reversed(delta.items())))
    assert torch.equal(first, reordered)
    assert not torch.equal(first, CountSketch(SIZES, dim=16, seed=6)(delta))
    alone = CountSketch(SIZES, dim=16, seed=5)({name: tensor[1:2] for name, tensor in delta.items()})
    torch.testing.assert_close(alone, first[1:2])


def test_sketch_at_the_unedited_weights_has_a_finite_gradient() -> None:
    sketch = CountSketch(SIZES, dim=16)
    delta = {name: torch.zeros_like(t, requires_grad=True) for name, t in random_delta(dtype=torch.float32).items()}
    out_EP = sketch(delta)
    assert (out_EP[:, :16] == 0).all()
    assert out_EP[:, 16:].isfinite().all()
    for gradient in torch.autograd.grad(out_EP[:, 16:].sum(), list(delta.values())):
        assert (gradient == 0).all()


def test_sketch_upcasts_half_precision() -> None:
    delta = random_delta(dtype=torch.bfloat16)
    sketch = CountSketch(SIZES, dim=16)
    exact = sketch({name: tensor.double() for name, tensor in delta.items()})
    assert sketch(delta).dtype == flat_input(delta).dtype == torch.float32
    torch.testing.assert_close(sketch(delta).double(), exact, rtol=1e-5, atol=1e-5)


def test_sketch_uses_all_of_the_largest_dim() -> None:
    size = 4 * MAX_SKETCH_DIM
    out = CountSketch({"weight": size}, dim=MAX_SKETCH_DIM)({"weight": torch.ones(1, size)})
    assert out.shape == (1, MAX_SKETCH_DIM + 1)
    assert out[0, -100:].ne(0).any()


def test_sketch_refuses_other_tensors_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"but the sketch was made for \{'bias': 7, 'weight': 40\}"):
        CountSketch(SIZES)({"weight": torch.zeros(1, 40)})
    with pytest.raises(ValueError, match="sketch_dim: got 40000, expected 1 to 16384"):
        CountSketch(SIZES, dim=40000)
    with pytest.raises(ValueError, match="expected at least one tensor"):
        CountSketch({})


def test_a_padded_edit_has_the_sketch_of_the_edit_alone() -> None:
    """The buckets of a tensor's first weights do not depend on its length."""
    delta = torch.randn(2, 5, 300)
    padded = torch.cat([delta, torch.zeros(2, 7, 300)], dim=1)
    short, long = (CountSketch({"weight": x[0].numel()}, dim=64)({"weight": x}) for x in (delta, padded))
    torch.testing.assert_close(short, long, rtol=1e-6, atol=1e-6)
