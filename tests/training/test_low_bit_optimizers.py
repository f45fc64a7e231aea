"""Optimizers with states in few bits or in pages: they run here as the planner counts them, or are refused."""

import importlib.util

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from shoestring.errors import SettingError
from shoestring.memory.storages import storages_of
from shoestring.planning import predict_model
from shoestring.planning.optimizers import by_rule
from shoestring.training import RunSettings, train
from shoestring.training.low_bit_optimizers import check_optimizer, note_on, package_of
from shoestring.training.run import prepare

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")

OF_BITSANDBYTES = [
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "ademamix",
    "ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
]
OF_TORCHAO = ["adamw_torch_8bit", "adamw_torch_4bit"]
SIZES = [(4, 1000), (8, 512), (5, 1001), (400, 300)]  # below, at and above the smallest that is in 8 bit, and in pages


def arguments(optim):
    return TrainingArguments(output_dir="unused", optim=optim, use_cpu=True)


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


@pytest.mark.parametrize(
    "optim", [*OF_BITSANDBYTES, *(pytest.param(name, marks=pytest.mark.slow) for name in OF_TORCHAO)]
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU", "ignore:.*_stable_hash_for_caching")
def test_states_take_what_the_rule_says_and_weights_learn(optim):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments(optim))
    optimizer = cls(weights, **{**options, "lr": 1e-2})
    first = None
    for _ in range(8):
        loss = sum(weight.square().sum() for weight in weights)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(weight.square().sum().item() for weight in weights) < 0.99 * first
    rule = by_rule(optim, on_cpu=True)
    for weight in weights:
        held = {n: t for n, t in optimizer.state[weight].items() if isinstance(t, torch.Tensor) and t.dim() > 0}
        if not rule.own_tables:
            held = {name: tensor for name, tensor in held.items() if not name.startswith("qmap")}  # one for all tensors
        assert sum(s.nbytes() for tensor in held.values() for s in storages_of(tensor)) == rule.bytes_of(weight.numel())


@pytest.mark.parametrize("tied", [False, True])
def test_states_of_embeddings_are_what_the_planner_counts(tied, tmp_path, monkeypatch):
    from bitsandbytes.optim import GlobalOptimManager

    monkeypatch.setattr(GlobalOptimManager, "_instance", None)  # it remembers the embeddings of all trainers
    sizes = {"hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=150, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"], **sizes)
    trainer = Trainer(LlamaForCausalLM(config), TrainingArguments(tmp_path, optim="adamw_8bit", use_cpu=True))
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = {
        id(storage): storage.nbytes()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not name.startswith("qmap")  # one for all tensors
        for storage in storages_of(tensor)
    }
    predicted = predict_model(config, batch=1, length=4, train={"optim": "adamw_8bit", "use_cpu": True})
    assert predicted.parts["optimizer_state"] == sum(held.values())


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "galore_adamw_8bit"])
def test_others_are_left_to_transformers(optim):
    assert package_of(optim) is None
    assert by_rule(optim) is None
    check_optimizer(arguments(optim))


def test_it_is_told_that_a_cpu_has_no_pages():
    assert note_on(arguments("paged_adamw_8bit")) == (
        "train.optim: paged_adamw_8bit pages nothing on a CPU; it is adamw_8bit."
    )
    assert note_on(arguments("adamw_8bit")) is None


@pytest.mark.parametrize(
    ("optim", "package", "extra"),
    [("paged_adamw_8bit", "bitsandbytes", "quant"), ("adamw_torch_8bit", "torchao", "torchao")],
)
def test_a_missing_package_is_named_before_anything_is_loaded(optim, package, extra, run_file, monkeypatch):
    without(monkeypatch, package)
    settings = RunSettings.load(run_file(model="packaged:no-such-model", train={"optim": optim}))
    with pytest.raises(SettingError, match=rf"train.optim: {optim} needs {package}, .*'shoestring\[{extra}\]'"):
        prepare(settings)


def test_one_that_does_not_run_here_is_refused_before_anything_is_loaded(run_file, monkeypatch):
    import bitsandbytes

    def fail(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", fail)
    settings = RunSettings.load(run_file(model="packaged:no-such-model", train={"optim": "adamw_8bit"}))
    with pytest.raises(
        SettingError, match=r"adamw_8bit does not run on this machine's cpu, says bitsandbytes: no kernel image Take "
    ):
        prepare(settings)


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("stopped")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_with_one_learns_and_goes_on_after_a_stop_as_if_it_had_not_stopped(run_file):
    recipe = [{"lora": {"r": 400, "target_modules": "all-linear"}}]  # large enough for states in 8 bit
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "paged_adamw_8bit"}

    def settings(name):
        return RunSettings.load(run_file(name, task="causal-lm", recipe=recipe, train=fields))

    told = []
    whole = train(settings("whole"), say=told.append)
    assert whole.losses[-1][1] < whole.losses[0][1]
    assert "train.optim: paged_adamw_8bit pages nothing on a CPU; it is adamw_8bit." in told
    with pytest.raises(RuntimeError, match="stopped"):
        train(settings("stopped"), callbacks=[StopsAt(4)])
    assert train(settings("stopped"), resume=True).losses == whole.losses
