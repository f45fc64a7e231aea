"""Codecs together: what reaches them, once, in which order, while what runs, and what backward gets back."""

import copy
from dataclasses import dataclass
from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shoestring import Recipe
from shoestring.activations import Codec, LowBitActivations, Offload, Stage
from shoestring.errors import SettingError
from shoestring.memory import Ledger


@dataclass(kw_only=True)
class Clone(Codec):
    """Keeps a copy of each tensor and a list of what it was given."""

    name = "clone"
    stage = Stage.STORAGE
    exact = True
    min_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[Tensor] = []

    def pack(self, tensor: Tensor) -> list[Tensor]:
        assert tensor.dim() == 1
        assert tensor.is_contiguous()
        self.seen.append(tensor.clone())
        return [tensor.clone()]

    def unpack(self, packed: list[Tensor]) -> Tensor:
        return packed[0].clone()


class Attention(nn.Module):
    """Three linear layers that read one x, and what follows from them."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.register_buffer("scale", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        return (self.q(x) * self.scale) @ self.k(x).mT @ self.v(x)


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 67, **settings})
    return LlamaForCausalLM(config).train()


def bert(**settings) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**{**sizes, "vocab_size": 67, "num_labels": 3, **settings})).train()


def batch_for(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 67, (3, 21), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids if model.config.model_type == "llama" else ids[:, 0] % 3}


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Of every weight that trains, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(7)
    model(**batch_for(model, seed)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module) -> int:
    with Ledger(model) as ledger:
        model(**batch_for(model)).loss.backward()
    return ledger.report().saved_bytes


def test_what_three_layers_read_is_packed_once():
    model, codec = Attention(), Clone()
    x = torch.randn(2, 5, 6)
    reference = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with codec.attach(model):
        model(x).square().sum().backward()
    assert sum(torch.equal(seen, x.sin().flatten()) for seen in codec.seen) == 1
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), reference, strict=True))


def test_weights_buffers_and_views_of_them_never_reach_a_codec():
    model, codec = Attention(), Clone()
    model.k.weight = model.q.weight  # tied
    model.v.weight.data = model.q.weight.data[:, :]  # a view of another weight's storage
    addresses = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    pack = codec.pack
    codec.pack = lambda tensor: addresses.add(None) if tensor.data_ptr() in addresses else pack(tensor)
    with codec.attach(model):
        model(torch.randn(2, 5, 6)).sum().backward()
    assert codec.seen
    assert None not in addresses


def test_only_the_models_own_training_forward_is_packed():
    model, other, codec = Attention(), Attention(), Clone()
    x = torch.randn(2, 5, 6, requires_grad=True)
    with codec.attach(model):
        other(x).exp()
        with torch.no_grad():
            model(x)
        model.eval()
        model(x)
        copy.deepcopy(model).train()(x)
        assert not codec.seen
        loss = model.train()(x)
        packed = len(codec.seen)
        assert packed
        (loss.exp() * other(x)).sum().backward()
        assert len(codec.seen) == packed
    model(x)
    assert len(codec.seen) == packed


def test_generation_and_evaluation_are_untouched():
    model, codec = llama().eval(), Clone()
    ids = batch_for(model)["input_ids"][:, :5]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with codec.attach(model):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert not codec.seen


def test_a_forward_that_raises_leaves_no_hook_in_force():
    model, codec = Attention(), Clone()
    with codec.attach(model):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(2, 5, 7))
        codec.seen.clear()
        torch.randn(4, requires_grad=True).exp().sum().backward()
        assert not codec.seen
        model(torch.randn(2, 5, 6)).sum().backward()
        assert codec.seen


def test_a_model_that_calls_itself_is_left_by_its_outermost_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            x = self.layer(x).exp()
            return self(x * 0.1, again=False).exp() if again else x

    model, codec = Twice(), Clone()
    x = torch.randn(5, 6)
    model(x).sum().backward()
    expected = model.layer.weight.grad.clone()
    model.zero_grad()
    with codec.attach(model):
        model(x).sum().backward()
    assert torch.equal(model.layer.weight.grad, expected)
    assert len(codec.seen) == 5  # x, two inner results of exp, the scaled one between them, the outer result


class Steps(nn.Module):
    """Runs a function of x and its weight."""

    def __init__(self, run):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


def test_a_packed_tensor_keeps_the_values_it_had_when_it_was_saved():
    def in_place(x: Tensor, weight: Tensor) -> Tensor:
        first = x @ weight
        with torch.no_grad():
            x.mul_(3)
        return first * (x @ weight)

    x = torch.randn(5, 8)
    model = Steps(lambda x, weight: (x @ weight) * ((3 * x) @ weight))
    (expected,) = torch.autograd.grad(model(x).sum(), [model.weight])
    model.run = in_place
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x.clone()).sum().backward()
    codec = Clone()
    with codec.attach(model):
        model(x.clone()).sum().backward()
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize("what", ["a small tensor", "a weight"])
def test_a_tensor_that_stays_as_it_is_refuses_to_be_changed(what):
    def in_place(x: Tensor, weight: Tensor) -> Tensor:
        y = (x @ weight) * weight.sum()
        with torch.no_grad():
            (weight if what == "a weight" else x).add_(1)
        return y

    model = Steps(in_place)
    with Clone(min_bytes=10_000).attach(model):
        loss = model(torch.randn(5, 8, requires_grad=True) * 1).sum()
        with pytest.raises(RuntimeError, match=r"changed in place after it was saved: it is at version \d, expected"):
            loss.backward()


def test_memory_that_is_used_again_is_not_taken_for_what_it_was():
    def chain(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(50):
            x = torch.tanh(x @ weight) + x.mean()
        return x

    model, x = Steps(chain), torch.randn(5, 8)
    (expected,) = torch.autograd.grad(model(x).sum(), [model.weight])
    with Clone().attach(model):
        for _ in range(3):
            model.weight.grad = None
            model(x).sum().backward()
            assert torch.equal(model.weight.grad, expected)


def test_a_view_of_a_small_part_is_packed_alone_and_gets_its_strides_back():
    strides = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            strides.append((x.stride(), x.tolist()))
            return gradient * torch.ones_like(x)

    large = torch.arange(1000.0).view(10, 10, 10)
    views = [
        large[:, 3],
        large.mT[2],
        large[1, 1].expand(4, 10),  # elements twice
        large[..., ::2].transpose(0, 2),  # half of it
        large.as_strided((5, 5), (1, 2), 7),  # elements twice
        large[1:3],
    ]
    model, codec = Steps(lambda x, weight: sum(Look.apply(view) for view in x)), Clone()
    for view in views:
        view.requires_grad_()
        with codec.attach(model):
            model([view]).backward()
        assert strides.pop() == (view.stride(), view.tolist())
    sizes = [seen.numel() for seen in codec.seen]
    assert sizes == [100, 100, 1000, 1000, 1000, 200]


def test_layouts_without_one_storage_stay_as_they_are():
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return (torch.sparse.mm(x, weight) * 2).square() + (weight.to(torch.complex64).conj() * 1j).abs()

    x = torch.eye(8).to_sparse()
    model = Steps(run)
    (expected,) = torch.autograd.grad(model(x).sum(), [model.weight])
    with Clone().attach(model):
        model(x).sum().backward()
    assert torch.equal(model.weight.grad, expected)


def test_codecs_run_compression_first_in_whichever_order_they_were_attached():
    order = []

    class Half(Clone):
        stage = Stage.COMPRESSION

        def pack(self, tensor: Tensor) -> dict[str, Tensor]:
            order.append(("half", tensor.dtype))
            return {"half": tensor.half(), "dtype": tensor.dtype}

        def unpack(self, packed: dict) -> Tensor:
            order.append("unpack half")
            return packed["half"].to(packed["dtype"])

    class Last(Clone):
        def pack(self, tensor: Tensor) -> list[Tensor]:
            order.append(("last", tensor.dtype))
            return [tensor.clone()]

        def unpack(self, packed: list[Tensor]) -> Tensor:
            order.append("unpack last")
            return packed[0]

    model = Steps(lambda x, weight: x @ weight)
    with Last().attach(model), Half().attach(model):
        model(torch.randn(5, 8)).sum().backward()
    assert order == [("half", torch.float32), ("last", torch.float16), "unpack last", "unpack half"]


def test_a_graph_may_be_walked_twice_and_outlives_its_codec():
    model, x = Steps(lambda x, weight: (x @ weight).tanh().square()), torch.randn(5, 8)
    (expected,) = torch.autograd.grad(model(x).sum(), [model.weight], create_graph=True)
    (twice,) = torch.autograd.grad(expected.square().sum(), [model.weight])
    with Clone().attach(model):
        loss = model(x).sum()
    (first,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [model.weight], create_graph=True)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(torch.autograd.grad(second.square().sum(), [model.weight])[0], twice)


def test_a_graph_that_nobody_keeps_goes_at_once():
    class Noted(Clone):
        def pack(self, tensor: Tensor) -> list[Tensor]:
            packed = super().pack(tensor)
            finalize(packed[0].untyped_storage(), gone.append, tensor.numel())
            return packed

    gone: list[int] = []
    model = Steps(lambda x, weight: (x @ weight).exp().rsqrt().tanh())  # each keeps its own result
    with Noted(min_bytes=100).attach(model):
        model(torch.randn(5, 8))
        assert gone == [40, 40, 40, 40]
        result = model(torch.randn(2, 8))  # too small to be packed
        finalize(result.untyped_storage(), gone.append, "result")
        del result
    assert gone[4:] == ["result"]


def test_under_checkpointing_only_the_inputs_of_blocks_are_packed():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 6)) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model, codec, x = Blocks(), Clone(), torch.randn(4, 6)
    torch.manual_seed(3)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with codec.attach(model):
        torch.manual_seed(3)
        model(x).sum().backward()
    assert [seen.numel() for seen in codec.seen] == [24, 24, 24]
    assert torch.equal(codec.seen[0], x.flatten())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_the_model_is_left_as_it_was():
    model = Attention()
    hooks = [dict(model._forward_hooks), dict(model._forward_pre_hooks), set(vars(model))]
    first, second = Clone(), Clone()
    with first.attach(model):
        with second.attach(model):
            model(torch.randn(2, 5, 6))
        count = len(second.seen)
        model(torch.randn(2, 5, 6))
        assert len(second.seen) == count > 0
    assert [dict(model._forward_hooks), dict(model._forward_pre_hooks), set(vars(model))] == hooks
    assert not model._forward_hooks_always_called


CHAINS = {
    "8 bits": [LowBitActivations()],
    "disk": [Offload(to="disk")],
    "8 bits to disk": [LowBitActivations(), Offload(to="disk")],
    "4 bits to disk": [Offload(to="disk"), LowBitActivations(bits=4)],
}
BOUND = {"8 bits": 0.02, "disk": 0.0, "8 bits to disk": 0.02, "4 bits to disk": 0.35}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("chain", CHAINS)
def test_codecs_with_lora_and_checkpointing_stay_within_their_error(chain, make, adapted, checkpointing):
    targets = ["q_proj", "v_proj", "down_proj"] if make is llama else ["query", "value", "dense"]
    lora = [LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.1)] if adapted else []
    runs = []
    for codecs in ([], CHAINS[chain]):
        base = make()
        torch.manual_seed(1)
        with Recipe(*lora, *codecs)(base) as model:
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
                base.enable_input_require_grads()
            runs.append(gradients(model))
    plain, packed = runs
    assert plain.keys() == packed.keys()
    error = sum((packed[n] - g).square().sum() for n, g in plain.items()) / sum(
        g.square().sum() for g in plain.values()
    )
    assert error.sqrt() <= BOUND[chain]
    if BOUND[chain]:
        assert error > 0


@pytest.mark.parametrize("make", [llama, bert])
def test_the_chain_keeps_only_small_tensors_in_memory(make):
    model = make()
    plain = saved_bytes(model)
    with Recipe(LowBitActivations(min_bytes=0), Offload(to="disk", min_bytes=0))(model) as packed:
        assert saved_bytes(packed) < 0.01 * plain


@pytest.mark.parametrize("chain", ["8 bits", "8 bits to disk"])
def test_fake_tensors_are_counted_as_real_ones(chain):
    counts = []
    for fake in (False, True):
        with FakeTensorMode() if fake else torch.random.fork_rng():
            with Recipe(*CHAINS[chain])(llama()) as model:
                ids = torch.zeros(3, 21, dtype=torch.long)
                with Ledger(model) as ledger:
                    model(input_ids=ids, labels=ids).loss.backward()
            report = ledger.report()
            counts.append((report.saved_bytes, report.at_peak["saved_for_backward"]))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_fewer_bytes_than_none_are_refused():
    with pytest.raises(SettingError, match=r"min_bytes of offload must be 0 or more, got -1\."):
        Offload(to="disk", min_bytes=-1)


def test_a_codec_that_must_know_operations_refuses_a_compiled_model():
    in_place = Attention()
    in_place.compile()
    for model in (torch.compile(Attention()), in_place):
        with pytest.raises(SettingError, match=r"low_bit_activations cannot tell operations apart .* torch\.compile"):
            Recipe(LowBitActivations()).apply(model)


def test_functions_of_torch_see_what_they_saw_before():
    """The watch for operations changes no result and no type."""

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.weight.data * 2, Tensor)
            y = F.layer_norm(x, (6,), self.weight)
            return torch.einsum("bi,bj->ij", y, y).softmax(-1) + torch.stack([y.sum(), x.max()]).sum()

    model, x = Kinds(), torch.randn(5, 6)
    expected = model(x)
    with LowBitActivations(min_bytes=0).attach(model):
        assert torch.equal(model(x), expected)
