"""Operations of a step against counts by hand and against torch's own counter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shoestring.fakes import without_values
from shoestring.memory import Ledger
from shoestring.memory.operations import OperationCounter, Operations

ROWS, IN, OUT = 11, 5, 7
FLOAT = 4
PRODUCT = 2 * ROWS * IN * OUT
BATCH, TOKENS = 3, 13


def counted(step) -> Operations:
    counter = OperationCounter()
    with counter:
        step()
    return counter.operations()


def decoder(layers: int = 2, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
    return LlamaForCausalLM(config).train()


def loss_of(model: nn.Module, tokens: int = TOKENS) -> torch.Tensor:
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)
    return model(input_ids=ids, labels=ids).loss


def linear_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


# By hand


def test_a_linear_layer_multiplies_once_forward_and_twice_backward():
    layer, x = nn.Linear(IN, OUT, bias=False), torch.ones(ROWS, IN, requires_grad=True)
    operations = counted(lambda: layer(x).backward(torch.ones(ROWS, OUT)))
    assert operations.flops == {"forward": {"float32": PRODUCT}, "backward": {"float32": 2 * PRODUCT}}


def test_a_linear_layer_reads_its_operands_and_writes_its_result():
    layer, x = nn.Linear(IN, OUT), torch.ones(ROWS, IN)
    with torch.no_grad():
        operations = counted(lambda: layer(x))
    moved = ROWS * IN + OUT * IN + OUT + ROWS * OUT
    assert operations.moved_bytes == {"forward": {"float32": moved * FLOAT}}


def test_flops_and_bytes_go_by_dtype():
    layer, x = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16), torch.ones(ROWS, IN, dtype=torch.bfloat16)
    operations = counted(lambda: layer(x).float())
    assert operations.flops == {"forward": {"bfloat16": PRODUCT}}
    assert operations.moved_bytes["forward"] == {"bfloat16": (ROWS * IN + OUT * IN + ROWS * OUT) * 2}
    assert operations.moved_bytes["other"] == {"bfloat16": ROWS * OUT * 2, "float32": ROWS * OUT * 4}


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_is_two_products_forward_and_five_backward(key_heads):
    query = torch.randn(BATCH, 4, TOKENS, 8, requires_grad=True)
    key, value = (torch.randn(BATCH, key_heads, TOKENS, 8, requires_grad=True) for _ in range(2))

    def step():
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

    square = 2 * BATCH * 4 * TOKENS * TOKENS * 8
    operations = counted(step)
    assert operations.flops_in("other") == 2 * square
    assert operations.flops_in("backward") == 5 * square


def test_lora_computes_no_gradient_of_the_frozen_weight():
    rank = 3
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), LoraConfig(r=rank, target_modules=["0"]))
    operations = counted(lambda: model(torch.ones(ROWS, IN, requires_grad=True)).sum().backward())
    factors = 2 * ROWS * rank * (IN + OUT)
    assert operations.flops_in("forward") == PRODUCT + factors
    assert operations.flops_in("backward") == PRODUCT + 2 * factors


@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_counts_its_groups_and_twice_that_backward(groups):
    convolution = nn.Conv1d(6, 9, 5, groups=groups, stride=2, bias=False)
    x = torch.ones(2, 6, 17, requires_grad=True)
    operations = counted(lambda: convolution(x).sum().backward())
    forward = 2 * 2 * 7 * 9 * (6 // groups) * 5  # batch 2, 7 places
    assert operations.flops_in("forward") == forward
    assert operations.flops_in("backward") == 2 * forward


def test_products_with_vectors_count():
    matrix, vector = torch.ones(OUT, IN), torch.ones(IN)
    operations = counted(lambda: (matrix @ vector, vector @ vector, torch.addmv(torch.ones(OUT), matrix, vector)))
    assert operations.total_flops == 2 * (OUT * IN + IN + OUT * IN)


def test_views_move_nothing():
    x = torch.ones(4, 6)
    views = counted(lambda: (x.view(6, 4), x.t(), x[1:], x.expand(3, 4, 6), x.split(2), x.detach(), x.contiguous()))
    assert views == Operations()


def test_an_expanded_tensor_is_read_once():
    x = torch.ones(6).expand(4, 6)
    assert counted(lambda: x.clone(memory_format=torch.contiguous_format)).total_moved_bytes == (6 + 24) * FLOAT


def test_in_place_operations_read_and_write_and_copies_only_write():
    x, y = torch.ones(10), torch.ones(10)
    assert counted(lambda: x.add_(y)).total_moved_bytes == 3 * 10 * FLOAT
    assert counted(lambda: x.copy_(y)).total_moved_bytes == 2 * 10 * FLOAT
    assert counted(lambda: x.zero_()).total_moved_bytes == 10 * FLOAT
    assert counted(lambda: torch.zeros_like(x)).total_moved_bytes == 10 * FLOAT
    assert counted(lambda: torch.empty_like(x)).total_moved_bytes == 0
    assert counted(lambda: torch.add(x, y, out=torch.empty(10))).total_moved_bytes == 3 * 10 * FLOAT


def test_a_look_up_reads_the_rows_it_takes():
    table, ids = torch.ones(1000, 6), torch.tensor([1, 2, 3])
    moved = 2 * 3 * 6 * FLOAT + 3 * 8  # rows read and written, and the ids
    assert counted(lambda: F.embedding(ids, table)).total_moved_bytes == moved
    assert counted(lambda: table.index_select(0, ids)).total_moved_bytes == moved
    added = counted(lambda: table.index_add_(0, ids, torch.ones(3, 6)))
    assert added.total_moved_bytes == 3 * 3 * 6 * FLOAT + 3 * 8 + 3 * 6 * FLOAT  # and the ones are made


def test_a_decoder_takes_six_operations_a_weight_and_token():
    model = decoder()
    operations = counted(lambda: loss_of(model).backward())
    products = 2 * linear_weights(model) * BATCH * TOKENS
    square = 2 * BATCH * 24 * TOKENS * TOKENS
    assert operations.flops_in("forward") == products + 2 * 2 * square
    assert operations.flops_in("backward") == 2 * products + 2 * 5 * square


# Phases


def test_recomputation_is_told_from_backward():
    plain, recomputed = decoder(), decoder()
    recomputed.gradient_checkpointing_enable()
    blocks = 2 * linear_weights(plain.model) * BATCH * TOKENS + 2 * 2 * 2 * BATCH * 24 * TOKENS * TOKENS
    without = counted(lambda: loss_of(plain).backward())
    with_it = counted(lambda: loss_of(recomputed).backward())
    assert without.flops_in("recomputation") == without.moved_bytes_in("recomputation") == 0
    assert with_it.flops["forward"] == without.flops["forward"]
    assert with_it.flops["backward"] == without.flops["backward"]
    # torch stops when it has what backward wants, so the last product of each block is not done again
    last = 2 * 2 * 40 * 24 * BATCH * TOKENS
    assert with_it.flops_in("recomputation") == blocks - last


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_of_plain_functions_is_told_too(use_reentrant):
    weight, x = torch.ones(OUT, IN, requires_grad=True), torch.ones(ROWS, IN, requires_grad=True)

    def step():
        checkpoint(lambda x: (x @ weight.t()).exp().exp(), x, use_reentrant=use_reentrant).sum().backward()

    operations = counted(step)
    assert operations.flops_in("recomputation") == PRODUCT
    assert operations.flops_in("backward") == 2 * PRODUCT


def test_an_optimizer_step_moves_bytes_and_multiplies_nothing():
    layer = nn.Linear(IN, OUT, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    layer(torch.ones(ROWS, IN)).sum().backward()
    operations = counted(optimizer.step)
    assert operations.flops == {}
    assert operations.moved_bytes == {"optimizer": {"float32": 3 * IN * OUT * FLOAT}}


def test_all_kinds_of_adamw_are_counted():
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        layer = nn.Linear(IN, OUT, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), **how)
        layer(torch.ones(ROWS, IN)).sum().backward()
        optimizer.step()
        moved = counted(optimizer.step).moved_bytes_in("optimizer")
        assert moved >= 7 * IN * OUT * FLOAT, how  # weight and two moments, read and written, and the gradient


# Beside others


@pytest.mark.parametrize("first", ["ledger", "counter"])
def test_a_fake_step_is_counted_as_a_real_one_beside_the_ledger(first):
    def step(model):
        optimizer = torch.optim.AdamW(model.parameters())

        def run():
            loss_of(model).backward()
            optimizer.step()

        return run

    real = counted(step(decoder()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = without_values(decoder(), mode)
        run, ledger, counter = step(model), Ledger(model), OperationCounter()
        outer, inner = (ledger, counter) if first == "ledger" else (counter, ledger)
        with outer, inner:
            run()
        assert counter.operations() == real
    assert ledger.report().saved_bytes > 0


@pytest.mark.parametrize("kind", ["decoder", "encoder", "convolutions"])
def test_flops_agree_with_torchs_counter(kind):
    if kind == "decoder":
        model = decoder(attn_implementation="eager")  # torch counts no attention kernel of the CPU
        step = lambda: loss_of(model).backward()  # noqa: E731
    elif kind == "encoder":
        config = BertConfig(
            vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        )
        config._attn_implementation = "eager"
        encoder = BertForSequenceClassification(config)
        ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
        step = lambda: encoder(input_ids=ids, labels=torch.zeros(BATCH, dtype=torch.long)).loss.backward()  # noqa: E731
    else:
        layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ConvTranspose2d(6, 5, 3), nn.Conv2d(5, 4, 1))
        step = lambda: layers(torch.ones(2, 3, 9, 11, requires_grad=True)).sum().backward()  # noqa: E731
    with FlopCounterMode(display=False) as theirs:
        step()
    ours = counted(step)
    assert ours.total_flops == theirs.get_total_flops() > 0


def test_it_leaves_no_hook_behind_and_begins_anew():
    counter, layer = OperationCounter(), nn.Linear(IN, OUT)
    before = [len(hooks) for hooks in registries()]
    for _ in range(2):
        with counter:
            layer(torch.ones(ROWS, IN))
    assert counter.operations().total_flops == PRODUCT
    assert [len(hooks) for hooks in registries()] == before


def registries() -> list:
    return [
        module_hooks._global_forward_pre_hooks,
        module_hooks._global_forward_hooks,
        module_hooks._global_forward_hooks_always_called,
        optimizer_hooks._global_optimizer_pre_hooks,
        optimizer_hooks._global_optimizer_post_hooks,
    ]


def test_a_forward_that_raises_does_not_shift_the_phases_after_it():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("on purpose")

    x = torch.ones(ROWS, IN)
    counter = OperationCounter()
    with counter:
        with pytest.raises(KeyError):
            nn.Sequential(nn.Linear(IN, IN), Failing())(x)
        x @ x.t()
    assert counter.operations().flops_in("other") == 2 * ROWS * ROWS * IN


# Arithmetic


def test_depth_is_extrapolated_exactly():
    one, two, five = (counted(lambda n=n: loss_of(decoder(n)).backward()) for n in (1, 2, 5))
    assert one + 4 * (two - one) == five


def test_operations_add_scale_and_keep_no_zeros():
    a = Operations({"forward": {"float32": 4}}, {"backward": {"bfloat16": 6}})
    assert a - a == Operations() == 0 * a
    assert (a + a).to_dict() == (2 * a).to_dict() == (a * 2).to_dict()
    assert (2 * a).to_dict() == {"flops": {"forward": {"float32": 8}}, "moved_bytes": {"backward": {"bfloat16": 12}}}
    assert (a.total_flops, a.total_moved_bytes, a.flops_in("backward")) == (4, 6, 0)
