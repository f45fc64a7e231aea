"""A partly trained linear layer: outputs and gradients of the dense one, what is kept, the weight left as it was."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import shoestring.adapters.partial_linear as partial
from shoestring.adapters.partial_linear import partial_linear

OUT, IN = 13, 7
PARTS = {
    "columns": {"columns": torch.tensor([0, 2, 5])},
    "a slice of columns": {"columns": slice(2, 5)},
    "the last columns": {"columns": slice(-3, None)},
    "rows": {"rows": torch.tensor([1, 6, 12])},
    "a slice of rows": {"rows": slice(4, 7)},
}
each_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())


def tensors(part: dict, shape: tuple[int, ...] = (3, 5), dtype=torch.float64, seed: int = 0, bias: bool = True):
    """x, weight, bias and delta; x, bias and delta learn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, b = draw(*shape, IN), draw(OUT, IN), draw(OUT) if bias else None
    delta = draw(OUT, 3) if "columns" in part else draw(3, IN)
    return x.requires_grad_(), weight, b.requires_grad_() if bias else None, delta.requires_grad_()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, columns=None, rows=None, scale=1.0) -> Tensor:
    """The same by a changed copy of the weight, for autograd."""
    changed = weight.clone()
    place = (slice(None), columns) if columns is not None else (rows,)
    changed[place] = changed[place] + scale * delta
    return F.linear(x, changed, bias)


@each_part
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (11,), (3, 5), (2, 3, 5)])
def test_outputs_and_gradients_are_those_of_the_dense_layer(shape: tuple, bias: bool, scale: float, part: dict):
    for seed in range(3):
        x, weight, b, delta = tensors(part, shape, seed=seed, bias=bias)
        before = weight.clone()
        learn = [t for t in (x, b, delta) if t is not None]
        expected = dense(x, weight, b, delta, **part, scale=scale)
        up = torch.randn_like(expected)
        y = partial_linear(x, weight, b, delta, **part, scale=scale)
        with torch.no_grad():
            assert torch.equal(partial_linear(x, weight, b, delta, **part, scale=scale), y)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad(expected, learn, up)
        for got, want in zip(torch.autograd.grad(y, learn, up), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(weight, before)


@each_part
def test_finite_differences_agree(part: dict):
    x, weight, b, delta = tensors(part)
    assert torch.autograd.gradcheck(lambda *t: partial_linear(t[0], weight, t[1], t[2], **part), (x, b, delta))


@each_part
def test_the_output_is_bit_by_bit_that_of_the_merged_weight(part: dict):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, b, delta = (t.detach() for t in tensors(part, (63,), dtype))
        delta = delta.float()
        merged = weight.float().clone()
        place = (slice(None), part["columns"]) if "columns" in part else (part["rows"],)
        merged[place] += 0.3 * delta
        expected = F.linear(x, merged.to(dtype), b)
        assert torch.equal(partial_linear(x, weight, b, delta, **part, scale=0.3), expected)
        assert torch.equal(partial_linear(x, weight, b, delta.requires_grad_(), **part, scale=0.3), expected)


def kept(part: dict, learns: bool = True, shape: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    """What autograd keeps, but for the weight and delta, which are there anyway."""
    x, weight, b, delta = tensors(part, shape)
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        partial_linear(x, weight, b, delta.requires_grad_(learns), **part)
    known = {t.untyped_storage().data_ptr() for t in (weight, delta)}
    return [t for t in seen if t.untyped_storage().data_ptr() not in known]


@pytest.mark.parametrize("shape", [(3, 5), (1,), ()])
def test_of_the_input_only_the_columns_are_kept(shape: tuple):
    for name in ("columns", "a slice of columns", "the last columns"):
        (tensor,) = kept(PARTS[name], shape=shape)
        assert tensor.shape == (*shape, 3)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 8, "a view would keep the whole input"
    assert not kept(PARTS["columns"], learns=False, shape=shape), "a frozen delta needs nothing of the input"


def test_rows_keep_the_input():
    (tensor,) = kept(PARTS["rows"])
    assert tensor.shape == (3, 5, IN)


class Refusal(RuntimeError):
    pass


@each_part
def test_the_weight_is_whole_again_after_a_product_that_fails(part: dict, monkeypatch: pytest.MonkeyPatch):
    x, weight, b, delta = tensors(part)
    before = weight.clone()
    y = partial_linear(x, weight, b, delta, **part)

    def fails(_: Tensor, changed: Tensor, *__: object) -> Tensor:
        assert not torch.equal(changed, before)
        raise Refusal

    with monkeypatch.context() as patched:
        patched.setattr(partial.F, "linear", fails)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, pytest.raises(Refusal):
                partial_linear(x, weight, b, delta, **part)
            assert torch.equal(weight, before)
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "__matmul__", fails)
        with pytest.raises(Refusal):
            y.sum().backward()
    assert torch.equal(weight, before)
    assert weight._version == 0, "for autograd, nobody wrote to the weight"


@each_part
def test_one_weight_used_twice_in_a_graph_counts_twice(part: dict):
    _, weight, _, delta = tensors(part)
    torch.manual_seed(1)
    other = torch.randn_like(delta).requires_grad_()
    x = torch.randn(3, 5, IN, dtype=torch.float64, requires_grad=True)
    back = torch.randn(OUT, IN, dtype=torch.float64)
    results = []
    for layer in (partial_linear, dense):
        hidden = layer(x, weight, None, delta, **part).tanh() @ back
        plain = F.linear(hidden, weight).tanh() @ back  # between the two, without a change
        y = layer(plain, weight, None, delta, **part) + layer(hidden, weight, None, other, **part)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, delta, other])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_threads_that_share_a_weight_do_not_see_each_others_changes():
    torch.manual_seed(0)
    weight, x, columns = torch.randn(61, 64), torch.randn(8, 64), torch.arange(0, 64, 3)
    deltas = [torch.randn(61, 22) for _ in range(4)]
    before, wrong = weight.clone(), []
    expected = [dense(x, weight, None, delta, columns) for delta in deltas]

    def work(number: int) -> None:
        for _ in range(200):
            y = partial_linear(x, weight, None, deltas[number], columns=columns)
            if not torch.allclose(y, expected[number], atol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(weight, before)


@each_part
def test_a_weight_given_by_a_function_is_made_twice_and_not_kept(part: dict):
    x, weight, b, delta = tensors(part)
    calls = []

    def make() -> Tensor:
        calls.append(1)
        return weight.clone()

    y = partial_linear(x, make, b, delta, **part)
    expected = dense(x, weight, b, delta, **part)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(*(torch.autograd.grad(t.sum(), [x, b, delta]) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2


@each_part
def test_a_weight_that_trains_too_gets_its_gradient(part: dict):
    x, weight, b, delta = tensors(part)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(layer(x, weight, b, delta, **part, scale=0.5).square().sum(), [x, weight, b, delta])
        for layer in (partial_linear, dense)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_weights_that_must_not_be_written_to_are_copied(monkeypatch: pytest.MonkeyPatch):
    part = PARTS["columns"]
    x, weight, b, delta = tensors(part)
    expected = partial_linear(x, weight, b, delta, **part)
    held = []
    linear = F.linear
    monkeypatch.setattr(partial.F, "linear", lambda x, w, b: held.append(w) or linear(x, w, b))
    shared = weight.clone().share_memory_()
    assert torch.equal(partial_linear(x, shared, b, delta, **part), expected)
    with torch.inference_mode():
        guarded = weight.clone()
    with torch.no_grad():
        assert torch.equal(partial_linear(x, guarded, b, delta, **part), expected)
    assert not {shared.data_ptr(), guarded.data_ptr()} & {w.data_ptr() for w in held}
    with torch.inference_mode():
        assert torch.equal(partial_linear(x, weight, b, delta, **part), expected)


@each_part
def test_autocast_gives_its_dtype_and_keeps_the_columns_in_it(part: dict):
    x, weight, b, delta = tensors(part, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = (layer(x, weight, b, delta, **part) for layer in (partial_linear, dense))
        (tensor,) = kept_types(part)
    assert y.dtype == tensor == torch.bfloat16
    assert torch.equal(y, expected)
    for got, want in zip(*(torch.autograd.grad(t.sum(), [x, b, delta]) for t in (y, expected)), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def kept_types(part: dict) -> set[torch.dtype]:
    x, weight, b, delta = tensors(part, dtype=torch.float32)
    seen: set[torch.dtype] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in (weight.shape, delta.shape):
            seen.add(tensor.dtype)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        partial_linear(x, weight, b, delta, **part)
    return seen


def test_a_delta_in_float32_trains_a_weight_in_bfloat16():
    part = PARTS["columns"]
    x, weight, b, delta = tensors(part, dtype=torch.bfloat16)
    delta = delta.detach().float().requires_grad_()
    y = partial_linear(x, weight, b, delta, **part)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert delta.grad.dtype == torch.float32


@each_part
def test_tensors_without_values_run_forward_and_backward(part: dict):
    index = {k: v if isinstance(v, slice) else torch.tensor(v.tolist()) for k, v in part.items()}
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer = nn.Linear(IN, OUT).requires_grad_(False)
            delta = torch.zeros((OUT, 3) if "columns" in part else (3, IN)).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = partial_linear(torch.randn(3, 5, IN), layer.weight, layer.bias, delta, **index)
            y.sum().backward()
        assert y.shape == (3, 5, OUT)
        assert y.dtype == dtype
        assert delta.grad.shape == delta.shape
    meta = torch.zeros((OUT, 3) if "columns" in part else (3, IN), device="meta")
    index = {k: v if isinstance(v, slice) else v.to("meta") for k, v in part.items()}
    x, weight = torch.empty(5, IN, device="meta"), torch.empty(OUT, IN, device="meta")
    assert partial_linear(x, weight, None, meta, **index).shape == (5, OUT)


def test_what_does_not_go_together_is_refused_with_sizes():
    x, weight, b, delta = tensors(PARTS["columns"])
    columns = PARTS["columns"]["columns"]
    with pytest.raises(ValueError, match="columns or rows, got neither"):
        partial_linear(x, weight, b, delta)
    with pytest.raises(ValueError, match="columns or rows, got both"):
        partial_linear(x, weight, b, delta, columns=columns, rows=columns)
    with pytest.raises(ValueError, match=r"must be \[out, 2\] for 2 columns, got \[13, 3\]"):
        partial_linear(x, weight, b, delta, columns=columns[:2])
    with pytest.raises(ValueError, match=r"must be \[3, 7\] for 3 rows, got \[13, 3\]"):
        partial_linear(x, weight, b, delta, rows=columns)
    with pytest.raises(ValueError, match="without a step"):
        partial_linear(x, weight, b, delta, columns=slice(0, 6, 2))
