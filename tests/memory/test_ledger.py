"""The ledger against sums by hand, to the byte, and against an independent count of saved tensors."""

import contextlib
import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from shoestring.memory import PARTS, Ledger, MemoryReport
from shoestring.memory.report import replay

FLOAT = 4
ROWS = 11
W1, B1, W2, B2 = 7 * 5 * FLOAT, 7 * FLOAT, 3 * 7 * FLOAT, 3 * FLOAT
WEIGHTS = W1 + B1 + W2 + B2
INPUT, HIDDEN, OUTPUT = ROWS * 5 * FLOAT, ROWS * 7 * FLOAT, ROWS * 3 * FLOAT
LOSS = FLOAT  # a scalar; the gradient that backward starts from is as large


def mlp(inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=inplace), nn.Linear(7, 3))


def batch() -> torch.Tensor:
    return torch.ones(ROWS, 5)


def measured(model: nn.Module, step, **options) -> MemoryReport:
    ledger = Ledger(model, **options)
    with ledger:
        step()
    report = ledger.report()
    assert sum(report.at_peak.values()) == report.peak_bytes
    assert set(report.at_peak) == set(report.largest) == set(PARTS)
    assert all(report.at_peak[part] <= report.largest[part] for part in PARTS)
    assert report.trainable_bytes + report.frozen_bytes == report.at_peak["weights"]
    return report


def saved_by_hooks(model: nn.Module, inputs: list[torch.Tensor], forward) -> int:
    """Bytes of distinct storages that autograd's own pack hook sees, weights and inputs excluded."""
    excluded = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in excluded:
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def faked(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    with FakeCopyMode(mode):
        return copy.deepcopy(model)


def llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config))


def tokens() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 97, (2, 17))
    return {"input_ids": ids, "labels": ids.clone()}


# Small cases, by hand


def test_peak_parts_and_saved_of_an_mlp_equal_the_sum_by_hand():
    model, x = mlp(), batch()
    report = measured(model, lambda: model(x).sum().backward())
    # The peak is ReLU's backward: its saved output, the gradients of its output and its input, W2's and B2's gradient.
    assert report.at_peak == {
        "weights": WEIGHTS,
        "gradients": W2 + B2,
        "optimizer_state": 0,
        "saved_for_backward": HIDDEN,
        "logits_and_loss": 0,  # of a head over a vocabulary
        "temporary": 2 * HIDDEN + 2 * LOSS,
        "inputs": INPUT,
    }
    assert report.peak_phase == "backward"
    assert report.saved_bytes == HIDDEN
    assert report.largest["gradients"] == WEIGHTS
    assert (report.trainable_bytes, report.frozen_bytes) == (WEIGHTS, 0)
    assert (report.device, report.cuda_max_allocated_bytes, report.by_module) == ("cpu", None, {})


def test_evaluation_keeps_nothing_for_backward():
    model, x = mlp(), batch()
    with torch.no_grad():
        report = measured(model, lambda: model(x))
    assert report.saved_bytes == 0
    assert (report.peak_bytes, report.peak_phase) == (WEIGHTS + INPUT + 2 * HIDDEN, "forward")


def test_an_operation_in_place_takes_no_second_storage():
    model, x = mlp(inplace=True), batch()
    with torch.no_grad():
        assert measured(model, lambda: model(x)).peak_bytes == WEIGHTS + INPUT + HIDDEN + OUTPUT
    assert measured(model, lambda: model(x).sum().backward()).saved_bytes == HIDDEN


class Views(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.view(-1).expand(3, -1).transpose(0, 1) * y.detach().view(-1, 1)


def test_views_of_one_storage_count_once():
    model, x = Views(5, 7), batch()
    report = measured(model, lambda: model(x).sum().backward())
    assert report.saved_bytes == HIDDEN  # the second factor, of which the first is a view too


def test_tied_weights_count_once():
    model = mlp()
    model[2] = nn.Linear(7, 5)
    model.append(nn.Linear(5, 7))
    model[3].weight = model[0].weight
    untied_weights = sum(p.nbytes for p in model.parameters())
    assert untied_weights == W1 + B1 + (35 + 5) * FLOAT + B1
    x = batch()
    report = measured(model, lambda: model(x).sum().backward())
    assert report.at_peak["weights"] == untied_weights
    assert report.largest["gradients"] == untied_weights


def test_parameters_that_are_views_of_one_storage_count_once():
    model, flat = mlp(), torch.zeros(WEIGHTS // FLOAT)
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    x = batch()
    assert measured(model, lambda: model(x)).at_peak["weights"] == WEIGHTS


def test_buffers_are_frozen_weights():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    report = measured(model, lambda: model(batch()))
    assert report.trainable_bytes == W1 + B1 + 2 * 7 * FLOAT
    assert report.frozen_bytes == 2 * 7 * FLOAT + 8  # running mean and variance, and the count of batches, an int64


class Hide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.hidden = x.exp()
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.hidden


class Hider(nn.Linear):
    def forward(self, x):
        return Hide.apply(super().forward(x))


def test_a_tensor_hidden_in_a_ctx_attribute_is_seen():
    model, x = Hider(5, 7), batch()
    assert saved_by_hooks(model, [x], lambda: model(x).sum()) == 0
    report = measured(model, lambda: model(x).sum().backward())
    assert report.saved_bytes == HIDDEN


def test_frozen_parameters_have_no_gradient_and_save_less():
    model, x = mlp(), batch()
    model[0].requires_grad_(False)
    report = measured(model, lambda: model(x).sum().backward())
    assert (report.trainable_bytes, report.frozen_bytes) == (W2 + B2, W1 + B1)
    assert report.largest["gradients"] == W2 + B2
    assert report.saved_bytes == HIDDEN  # the input of the layer that trains
    model.requires_grad_(False)
    assert measured(model, lambda: model(x)).saved_bytes == 0


def test_parameters_unfrozen_while_the_ledger_runs_have_gradients():
    model, x = mlp().requires_grad_(False), batch()

    def step():
        model.requires_grad_(True)
        model(x).sum().backward()

    assert measured(model, step).largest["gradients"] == WEIGHTS


def test_weight_copies_of_autocast_are_seen():
    model, x = mlp(), batch()
    half = 2  # bytes of a bfloat16, half of a float32's

    def outside():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).sum()
        loss.backward()

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()

    graph = (INPUT + HIDDEN + W2) // half  # the first layer's input has no gradient, so W1 is not needed
    assert measured(model, outside).saved_bytes == graph
    assert measured(model, inside).saved_bytes == graph + (W1 + B1 + B2) // half  # the cache still holds them


def test_a_resized_storage_counts_with_its_new_size():
    model = nn.Linear(1, 1, bias=False)

    def shrink():
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        return tensor, torch.zeros(3000)

    def grow():
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(6000)

    def grow_by_operation():
        torch.zeros(1000).resize_(2000)

    assert measured(model, shrink).peak_bytes == 4 + 12000
    assert measured(model, grow).peak_bytes == 4 + 6000
    assert measured(model, grow_by_operation).peak_bytes == 4 + 8000
    assert "resize_" not in vars(torch.UntypedStorage)


def test_sparse_gradients_count_indices_and_values():
    model = nn.Embedding(50, 6, sparse=True)
    ids = torch.arange(9)
    report = measured(model, lambda: model(ids).sum().backward())
    assert report.largest["gradients"] == 9 * 6 * FLOAT + 9 * 8
    assert report.largest["inputs"] == 9 * 8


# The whole step: gradients and optimizer state


def training_step(model, optimizer, x):
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_the_state_of_adamw_appears_in_the_first_step_and_is_there_in_the_second(given):
    model, x = mlp(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    state = 2 * WEIGHTS + 4 * FLOAT  # two moments, and four parameters' step counts
    options = {"optimizer": optimizer} if given else {}
    first = measured(model, lambda: training_step(model, optimizer, x), **options)
    assert first.largest["optimizer_state"] == state
    assert first.peak_phase == "optimizer"  # when the last update is made, all gradients are there and nothing is saved
    assert first.at_peak["gradients"] == WEIGHTS
    assert first.at_peak["saved_for_backward"] == 0
    second = measured(model, lambda: training_step(model, optimizer, x), **options)
    assert second.peak_phase == "backward"
    assert second.at_peak["optimizer_state"] == state
    assert second.peak_bytes == WEIGHTS + INPUT + state + W2 + B2 + 3 * HIDDEN + 2 * LOSS


def test_parameters_that_the_optimizer_alone_holds_are_weights():
    model, copied = mlp(), nn.Parameter(torch.ones(5, 7))
    optimizer = torch.optim.SGD([*model.parameters(), copied], lr=0.1)
    report = measured(model, lambda: model(batch()).sum().backward(), optimizer=optimizer)
    assert report.at_peak["weights"] == WEIGHTS + 5 * 7 * FLOAT
    assert report.trainable_bytes == report.at_peak["weights"]


def test_sgd_has_state_only_with_momentum():
    model, x = mlp(), batch()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert measured(model, lambda: training_step(model, plain, x)).largest["optimizer_state"] == 0
    heavy = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert measured(model, lambda: training_step(model, heavy, x)).largest["optimizer_state"] == WEIGHTS


def test_gradients_set_to_zero_stay_and_gradients_set_to_none_go():
    model, x = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def two_steps(set_to_none: bool):
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    gone = measured(model, lambda: two_steps(True))
    assert gone.at_peak["gradients"] == W2 + B2
    kept = measured(model, lambda: two_steps(False))
    # In the second backward the new gradient of the first layer comes beside all old ones.
    assert kept.at_peak["gradients"] == kept.largest["gradients"] == WEIGHTS
    before = measured(model, lambda: None)
    assert before.at_peak["gradients"] == WEIGHTS  # left by the step before the ledger


def test_gradients_consumed_inside_backward_are_still_gradients():
    model, x = mlp(), batch()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    report = measured(model, lambda: model(x).sum().backward())
    assert report.largest["gradients"] == W1 + B1  # one layer's at a time, and these are the larger


def test_accumulated_steps_report_the_forward_that_saved_most():
    model, optimizer = mlp(), None
    long, short = batch(), torch.ones(2, 5)

    def step():
        for x in (short, long, short):
            model(x).sum().backward()

    report = measured(model, step, optimizer=optimizer, module_depth=1)
    assert report.saved_bytes == HIDDEN
    assert report.by_module == {"1": HIDDEN}
    assert report.largest["gradients"] == WEIGHTS
    assert report.largest["inputs"] == INPUT + 2 * 5 * FLOAT


def test_a_loss_outside_the_model_counts_what_the_graph_keeps_and_not_what_python_holds():
    model, x = mlp(), batch()
    target = torch.zeros(ROWS, dtype=torch.long)

    def step():
        output = model(x)  # held by this frame; log_softmax saves its result and not its input
        logs = nn.functional.log_softmax(output, dim=-1)
        nn.functional.nll_loss(logs, target).backward()

    report = measured(model, step)
    weight_sum = FLOAT  # nll_loss saves it
    assert report.saved_bytes == HIDDEN + OUTPUT + weight_sum
    assert report.saved_bytes == saved_by_hooks(
        model, [x, target], lambda: nn.functional.nll_loss(nn.functional.log_softmax(model(x), dim=-1), target)
    )


def test_an_output_that_the_graph_keeps_too_is_saved():
    model, x = mlp(), batch()

    def squared():
        output = model(x)
        (output**2).sum().backward()

    assert measured(model, squared).saved_bytes == HIDDEN + OUTPUT


def test_a_first_gradient_of_ones_is_not_saved():
    model, x = mlp(), batch()
    first = torch.ones(ROWS, 3)
    assert measured(model, lambda: model(x).backward(first)).saved_bytes == HIDDEN

    def summed():
        output = model(x)
        output.backward(torch.ones_like(output))

    assert measured(model, summed).saved_bytes == HIDDEN


def test_a_weight_that_wraps_two_tensors_counts_both():
    model, x = nn.Linear(5, 7, bias=False), batch()
    model.weight = nn.Parameter(TwoTensor(torch.ones(7, 5), torch.ones(7, 5)))
    report = measured(model, lambda: model(x).sum().backward())
    assert report.trainable_bytes == 2 * W1
    assert report.largest["gradients"] == 2 * W1


def test_a_graph_kept_after_backward_is_saved_all_the_same():
    model, x = mlp(), batch()

    def step():
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert measured(model, step).saved_bytes == HIDDEN


def test_a_forward_without_backward_reports_what_it_kept():
    model, x = mlp(), batch()
    assert measured(model, lambda: model(x)).saved_bytes == HIDDEN


def test_a_batch_made_inside_the_ledger_is_input():
    model = mlp()
    report = measured(model, lambda: model(torch.ones(ROWS, 5)).sum().backward())
    assert report.largest["inputs"] == INPUT
    assert report.saved_bytes == HIDDEN


def test_activations_passed_between_parts_of_the_model_are_no_inputs():
    model, x = mlp(), batch()

    def step():
        hidden = model[1](model[0](x))
        model[2](hidden).sum().backward()

    report = measured(model, step)
    assert report.largest["inputs"] == INPUT
    assert report.saved_bytes == HIDDEN


def test_saved_bytes_are_split_by_the_module_where_they_were_born():
    model, x = llama(), tokens()
    reports = [measured(model, lambda: model(**x).loss.backward(), module_depth=depth) for depth in (0, 3)]
    assert all(sum(report.by_module.values()) == report.saved_bytes for report in reports)
    assert set(reports[0].by_module) == {""}
    names = {"", "model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm"}
    assert set(reports[1].by_module) == names
    assert reports[1].by_module["model.layers.0"] == reports[1].by_module["model.layers.1"]


# Checkpointing


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(5, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.narrow(self.wide(x).sin().exp())


class Blocks(nn.Module):
    def __init__(self, run=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run or (lambda block, x: block(x))

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


def non_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def keep_exp(block, x):
    def policy(ctx, func, *args, **kwargs):
        keep = func is torch.ops.aten.exp.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


WIDE = ROWS * 9 * FLOAT


@pytest.mark.parametrize(
    ("run", "saved"),
    [
        (None, 3 * 2 * WIDE + 2 * INPUT),  # sin's input, exp's result, and the inputs of the later blocks
        (non_reentrant, 2 * INPUT),
        (reentrant, 2 * INPUT),
        (keep_exp, 2 * INPUT + 3 * WIDE),
    ],
)
def test_checkpointing_saves_block_inputs_only(run, saved):
    model, x = Blocks(run), batch().requires_grad_()
    report = measured(model, lambda: model(x).sum().backward())
    assert report.saved_bytes == saved


def test_what_checkpointing_recomputes_shows_in_the_peak():
    x = batch().requires_grad_()
    plain, checkpointed = (
        measured(model, lambda model=model: model(x).sum().backward()) for model in (Blocks(), Blocks(non_reentrant))
    )
    assert plain.saved_bytes - checkpointed.saved_bytes == 6 * WIDE
    assert checkpointed.peak_phase == "backward"
    assert checkpointed.peak_bytes < plain.peak_bytes
    # While one block's backward runs: sin's input, exp's result, and the gradient on its way from one to the other.
    assert checkpointed.largest["temporary"] >= 3 * WIDE


# Fake and meta tensors


@pytest.mark.parametrize("run", [None, non_reentrant, reentrant])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fake_step_agrees_with_the_real_one_to_the_byte(run, optimizer):
    def report(model, x):
        updates = optimizer(model.parameters(), lr=0.1)
        return measured(model, lambda: training_step(model, updates, x), module_depth=2)

    model = Blocks(run)
    mode = FakeTensorMode()
    fake_model = faked(model, mode)
    with mode:
        fake = report(fake_model, batch().requires_grad_())
    assert fake == report(model, batch().requires_grad_())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_fake_llama_agrees_with_the_real_one_to_the_byte(lora):
    model = llama()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

    def report(model, x):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step():
            model(**x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return measured(model, step)

    mode = FakeTensorMode()
    fake_model = faked(model, mode)
    with mode:
        fake = report(fake_model, tokens())
    assert fake == report(model, tokens())


def test_a_fake_llama_under_checkpointing_differs_by_the_mask_that_transformers_makes_for_fake_tensors():
    model = llama(use_cache=False)
    model.gradient_checkpointing_enable()
    model.train()
    step = lambda model, x: lambda: model(**x).loss.backward()  # noqa: E731
    real = measured(model, step(model, tokens()))
    model.zero_grad()
    mode = FakeTensorMode()
    fake_model = faked(model, mode)
    with mode:
        fake = measured(fake_model, step(fake_model, tokens()))
    assert fake.saved_bytes - real.saved_bytes == 2 * 17 * 17  # one byte a pair of tokens
    assert real.peak_bytes < fake.peak_bytes < 1.03 * real.peak_bytes


def test_a_model_on_the_meta_device_is_counted_as_if_it_were_real():
    def report(device):
        model = mlp().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return measured(model, lambda: training_step(model, optimizer, batch().to(device)))

    meta, real = report("meta"), report("cpu")
    assert meta.device == "meta"
    assert meta.peak_bytes == real.peak_bytes
    assert meta.at_peak == real.at_peak


def test_tensors_on_another_device_are_not_counted():
    model = mlp()
    report = measured(model, lambda: torch.empty(1000, device="meta").exp())
    assert report.peak_bytes == WEIGHTS
    other = measured(mlp().to("meta"), lambda: torch.zeros(10), device="cpu")
    assert (other.device, other.peak_bytes) == ("cpu", 40)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and torch for CUDA: pip install torch")
def test_on_cuda_the_allocators_own_maximum_stands_beside_the_peak():
    model, x = mlp().cuda(), batch().cuda()
    report = measured(model, lambda: model(x).sum().backward())
    assert (report.device, report.saved_bytes) == ("cuda:0", HIDDEN)
    assert report.cuda_max_allocated_bytes >= report.peak_bytes


def test_a_model_without_parameters_is_counted():
    model, x = nn.ReLU(), batch().requires_grad_()
    report = measured(model, lambda: model(x).sum().backward())
    assert report.at_peak["weights"] == 0
    assert report.saved_bytes == INPUT  # ReLU's result


# Real models


@pytest.mark.parametrize("held", [False, True], ids=["loss only", "outputs held"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_bytes_of_a_llama_agree_with_autograds_own_hooks(lora, held):
    model, x = llama(), tokens()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))

    def step():
        if held:
            outputs = model(**x)
            outputs.loss.backward()
        else:
            model(**x).loss.backward()

    report = measured(model, step)
    assert report.saved_bytes == saved_by_hooks(model, list(x.values()), lambda: model(**x).loss)


def test_lora_adds_the_input_of_its_layer_and_r_numbers_a_token():
    def saved(r, **config):
        model = llama().requires_grad_(False)
        if r:
            model = get_peft_model(model, LoraConfig(r=r, **config))
        model.enable_input_require_grads()  # so that gradients pass the frozen layers
        return measured(model, lambda: model(**tokens()).loss.backward()).saved_bytes

    num_tokens, hidden, layers = 2 * 17, 48, 2
    extra = saved(4, target_modules=["up_proj"]) - saved(0)
    assert extra == layers * num_tokens * (hidden + 4) * FLOAT
    extra = saved(8, target_modules="all-linear") - saved(4, target_modules="all-linear")
    assert extra == 7 * layers * num_tokens * 4 * FLOAT


def test_packed_four_bit_weights_count_with_their_constants():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")
    model = nn.Sequential(
        bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False), nn.Linear(64, 3)
    ).to("cpu")
    if model[0].weight.dtype is not torch.uint8:
        model[0].weight = model[0].weight._quantize("cpu")
    state = model[0].weight.quant_state
    assert model[0].weight.nbytes == 128 * 64 // 2
    constants = 128 * 64 // state.blocksize * FLOAT + 16 * FLOAT  # absmax a block, and the sixteen levels
    x = torch.ones(ROWS, 128)
    report = measured(model, lambda: model(x).sum().backward())
    assert report.frozen_bytes == 128 * 64 // 2 + constants
    assert report.trainable_bytes == (64 * 3 + 3) * FLOAT
    assert report.largest["gradients"] == (64 * 3 + 3) * FLOAT


class MeasureEachStep(TrainerCallback):
    def __init__(self):
        self.reports = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.ledger = Ledger(model, optimizer)
        self.ledger.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.ledger.stop()
        self.reports.append(self.ledger.report())


def test_a_trainer_callback_measures_each_step(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=4))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{key: value[0].tolist() for key, value in tokens().items()}] * 8
    callback = MeasureEachStep()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    first, second = callback.reports
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    num_trainable = sum(1 for p in model.parameters() if p.requires_grad)
    assert first.trainable_bytes == trainable
    assert first.saved_bytes == second.saved_bytes > 0
    assert second.at_peak["optimizer_state"] == 2 * trainable + num_trainable * FLOAT
    assert first.largest["gradients"] == trainable


# What goes wrong, and what is left behind


def assert_nothing_left(model: nn.Module) -> None:
    assert _get_current_dispatch_mode() is None
    assert not module_hooks._global_forward_pre_hooks
    assert not module_hooks._global_forward_hooks
    assert not optimizer_hooks._global_optimizer_pre_hooks
    assert not optimizer_hooks._global_optimizer_post_hooks
    assert "resize_" not in vars(torch.UntypedStorage)
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of luck")


def test_a_forward_that_raises_leaves_no_hook_or_mode_behind():
    model, x = nn.Sequential(mlp(), Raises()), batch()
    ledger = Ledger(model)
    with pytest.raises(RuntimeError, match="out of luck"), ledger:
        model(x)
    assert_nothing_left(model)
    assert ledger.report().at_peak["weights"] == WEIGHTS


def test_a_step_after_one_that_raised_is_counted_as_ever():
    model, x = mlp(), batch()

    def step():
        with contextlib.suppress(RuntimeError):
            model(torch.ones(ROWS, 6))
        model(x).sum().backward()

    assert measured(model, step).saved_bytes == HIDDEN
    assert_nothing_left(model)


def test_a_ledger_inside_a_ledger_is_refused():
    model = mlp()
    with Ledger(model), pytest.raises(RuntimeError, match="already running"):
        Ledger(model).start()
    assert_nothing_left(model)
    measured(model, lambda: None)


def test_start_stop_and_report_out_of_order_are_refused():
    ledger = Ledger(mlp())
    with pytest.raises(RuntimeError, match="not running"):
        ledger.stop()
    with pytest.raises(RuntimeError, match="counted nothing"):
        ledger.report()
    with pytest.raises(ValueError, match="module_depth"):
        Ledger(mlp(), module_depth=-1)


def test_stopping_inside_another_dispatch_mode_is_refused():
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    ledger = Ledger(mlp())
    ledger.start()
    with Other(), pytest.raises(RuntimeError, match="dispatch mode"):
        ledger.stop()
    ledger.stop()
    assert_nothing_left(ledger.model)


def test_the_ledger_changes_neither_losses_nor_gradients():
    x = batch()
    plain, watched = mlp(), mlp()
    plain(x).exp().sum().backward()
    measured(watched, lambda: watched(x).exp().sum().backward())
    for expected, got in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected.grad, got.grad)


def test_the_ledger_keeps_no_storage_alive():
    model = mlp()
    ledger = Ledger(model)
    with ledger:
        output = model(batch())
        storage = weakref.ref(output.untyped_storage())
        assert storage() is not None
        del output
        assert storage() is None


def test_a_second_start_counts_afresh():
    model, x = mlp(), batch()
    ledger = Ledger(model)
    for _ in range(2):
        with ledger:
            model(x).sum().backward()
        model.zero_grad()
        assert ledger.report().at_peak["gradients"] == W2 + B2
        assert ledger.report().saved_bytes == HIDDEN


def test_the_table_and_the_dictionary_hold_the_report():
    model, x = mlp(), batch()
    report = measured(model, lambda: model(x).sum().backward())
    assert report.to_dict()["at_peak"]["saved_for_backward"] == HIDDEN
    assert [row[0] for row in report.table()] == [*PARTS, "total"]
    assert report.table()[-1][1] == sum(row[1] for row in report.table()[:-1]) == report.peak_bytes


def test_what_is_let_go_counts_in_no_phase():
    peak = replay(
        [("weights", 8)],
        [
            ("temporary", 10, "forward"),
            ("gradients", 4, "backward"),
            ("temporary", -1, "other"),
            ("inputs", 1, "other"),
        ],
    )
    assert peak.phase == "backward"
    assert peak.by_phase == {"forward": 18, "backward": 22, "other": 22}
    assert dict(peak.moments)["other"]["temporary"] == 9
    assert replay([], [("temporary", 10, "forward"), ("temporary", -1, "other")]).by_phase == {"forward": 10}


def test_moments_without_gradients_are_kept_beside_the_highest():
    log = [("temporary", 9, "backward"), ("temporary", -9, "other"), ("gradients", 20, "backward")]
    assert [
        (phase, parts["temporary"], parts["gradients"]) for phase, parts in replay([("weights", 8)], log).moments
    ] == [
        ("backward", 0, 20),
        ("backward", 9, 0),
    ]
