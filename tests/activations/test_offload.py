"""Offload: gradients bit for bit, what stays in memory, files that go, refusals, and copies beside the computation."""

import errno
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from shoestring import Recipe
from shoestring.activations import offload as module
from shoestring.activations.offload import Offload
from shoestring.errors import RunFailed, SettingError
from shoestring.memory import Ledger
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train

IDS = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))
COMMON = {"hidden_size": 48, "intermediate_size": 104, "num_attention_heads": 4, "vocab_size": 61}


def decoder(layers: int = 2, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, attention_dropout=0.1, **settings)
    return LlamaForCausalLM(config).train()


def encoder() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**COMMON, num_hidden_layers=2)).train()


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS if model.config.model_type == "llama" else torch.tensor([0, 1])}


def step(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of one step, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(5)
    model(**batch_for(model)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def files(folder) -> list:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [decoder, encoder])
def test_gradients_are_the_same_bits_with_dropout(make, dtype, tmp_path):
    model = make().to(dtype)
    plain = step(model)
    with Recipe(Offload(to="disk", folder=str(tmp_path), min_bytes=0))(model) as offloaded:
        moved = step(offloaded)
        assert not files(tmp_path)
    assert all(torch.equal(moved[name], gradient) for name, gradient in plain.items())
    assert not list(tmp_path.iterdir())


def test_with_recomputation_each_block_adds_its_input_and_nothing_else(tmp_path, monkeypatch):
    sizes: list[int] = []
    put = module._Disk.put

    def noted(self, tensor: Tensor) -> module._File:
        sizes.append(tensor.nbytes)
        return put(self, tensor)

    monkeypatch.setattr(module._Disk, "put", noted)
    moved = []
    for layers in (2, 4):
        model = decoder(layers)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        plain = step(model)
        with Offload(to="disk", folder=str(tmp_path)).attach(model):
            gradients = step(model)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in plain.items())
        moved.append(sorted(sizes))
        sizes.clear()
    block_input = IDS.numel() * 48 * 4
    assert moved[1] == sorted([*moved[0], block_input, block_input])


def test_memory_keeps_the_weights_and_what_is_small(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = decoder()
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    saved = []
    for recipe in (Recipe(lora), Recipe(lora, Offload(to="disk", folder=str(tmp_path)))):
        with recipe(model) as tuned:
            with Ledger(tuned) as ledger:
                step(tuned)
            saved.append(ledger.report().saved_bytes)
    assert saved[1] < 0.02 * saved[0]
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


def test_files_go_with_a_graph_that_nobody_keeps_and_with_the_recipe(tmp_path):
    model = decoder()
    with Offload(to="disk", folder=str(tmp_path)).attach(model):
        loss = model(**batch_for(model)).loss
        assert files(tmp_path)
        del loss
        assert not files(tmp_path)
        loss = model(**batch_for(model)).loss
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunFailed, match=r"offload no longer has .*: call backward before the recipe is removed"):
        loss.backward()


def test_a_graph_may_be_walked_twice(tmp_path):
    model = encoder()
    with Offload(to="disk", folder=str(tmp_path)).attach(model):
        loss = model(**batch_for(model)).loss
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward()
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(model.parameters(), once, strict=True))


def test_a_full_disk_is_told_clearly_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file: int, data: memoryview) -> None:
        os.write(file, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = decoder()
    with Offload(to="disk", folder=str(tmp_path)).attach(model):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write", full)
            with pytest.raises(
                RunFailed, match=r"could not write [\d,]+ bytes to .*No space left.*set folder to another"
            ):
                model(**batch_for(model))
        assert not files(tmp_path)
        model(**batch_for(model)).loss.backward()


def test_a_file_that_was_cut_is_refused(tmp_path):
    model = decoder()
    with Offload(to="disk", folder=str(tmp_path)).attach(model):
        loss = model(**batch_for(model)).loss
        for path in files(tmp_path):
            os.truncate(path, 100)
        with pytest.raises(RunFailed, match=r"but only 100 are left"):
            loss.backward()


def test_a_write_that_stops_early_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:1000]))
    x = torch.randn(1234)
    assert torch.equal(module._File(x, tmp_path / "x").get(), x)


def test_masks_and_integers_move_too(tmp_path):
    for x in (torch.arange(700), torch.rand(5000) > 0.5, torch.randn(300, dtype=torch.complex64)):
        codec = Offload(to="disk", folder=str(tmp_path))
        assert codec.takes(x)
        with codec.attach(nn.Linear(1, 1)):
            back = codec.unpack(codec.pack(x))
        assert back.dtype == x.dtype
        assert torch.equal(back, x)


def test_a_model_on_the_cpu_goes_to_files_of_its_own_accord(tmp_path):
    model = decoder()
    plain = step(model)
    with Offload(folder=str(tmp_path), min_bytes=0).attach(model):
        moved = step(model)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(moved[name], gradient) for name, gradient in plain.items())


def test_host_memory_is_no_help_to_a_model_that_is_there():
    model = decoder()
    plain = step(model)
    with Offload(to="host").attach(model):
        with pytest.warns(UserWarning, match="has no effect on tensors that are in host memory"):
            moved = step(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch_for(model))  # said once
    assert all(torch.equal(moved[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "cloud"}, r"to of offload must be 'auto', 'host' or 'disk', got 'cloud'"),
        ({"to": "host", "folder": "/tmp"}, r"folder of offload has no effect on to='host'"),
        ({"to": "disk", "max_in_flight": 3}, r"max_in_flight of offload has no effect on to='disk'"),
        ({"max_in_flight": 0}, r"max_in_flight of offload must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Offload(**settings)
    with pytest.raises(SettingError, match=r"recipe\[0\]\.offload"):
        Recipe.from_list([{"offload": settings}])


def test_a_folder_that_is_not_there_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(SettingError, match=r"folder of offload must be a folder that exists, got '.*nowhere'"):
        Recipe(Offload(to="disk", folder=str(tmp_path / "nowhere"))).apply(decoder())


class Streams:
    """Streams without a GPU: copies run at once, and what waits for what is written down."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.waits: list[str] = []
        home, side = self.stream("home"), self.stream("side")
        patch.setattr(torch.cuda, "current_stream", lambda device=None: home)
        patch.setattr(torch.cuda, "Stream", lambda device=None: side)
        patch.setattr(torch.cuda, "stream", lambda stream: warnings.catch_warnings())  # any context
        patch.setattr(module, "_pinned", torch.empty_like)

    def stream(self, name: str) -> SimpleNamespace:
        def wait(what: object) -> None:
            self.waits.append(name)

        return SimpleNamespace(wait_event=wait, wait_stream=wait, record_event=object)


def on_device(copies: list[module._HostCopy]) -> list[int]:
    return [index for index, copy in enumerate(copies) if copy.on_device is not None]


def test_a_bounded_number_of_tensors_is_on_the_device(monkeypatch):
    Streams(monkeypatch)
    place, tensors = module._Host(max_in_flight=3), [torch.randn(7) for _ in range(9)]
    copies = []
    for index, tensor in enumerate(tensors):
        copies.append(place.put(tensor))
        assert on_device(copies) == list(range(max(0, index - 2), index + 1))
    for index in reversed(range(9)):
        assert torch.equal(copies[index].get(), tensors[index])
        copies.pop()
        assert on_device(copies) == [i for i in range(index - 3, index) if i >= 0]  # those that backward needs next


def test_tensors_that_come_back_in_any_order_stay_within_the_bound(monkeypatch):
    Streams(monkeypatch)
    place, tensors = module._Host(max_in_flight=2), [torch.randn(7) for _ in range(12)]
    copies = [place.put(tensor) for tensor in tensors]
    for index in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist() * 2:
        assert torch.equal(copies[index].get(), tensors[index])
        assert sum(copy.is_coming for copy in copies) <= 2


def test_memory_is_given_back_only_after_the_copy(monkeypatch):
    streams = Streams(monkeypatch)
    place = module._Host(max_in_flight=1)
    copies = [place.put(torch.randn(7)), place.put(torch.randn(7))]
    assert streams.waits == ["side", "side", "home"]  # two copies wait for what is queued; the first was then let go
    copies.clear()  # a graph that nobody keeps
    assert streams.waits == ["side", "side", "home", "home"]


def test_a_tensor_changed_while_it_is_copied_is_refused(monkeypatch):
    Streams(monkeypatch)
    for push_out in (False, True):
        place, tensor = module._Host(max_in_flight=1), torch.randn(7)
        copy = place.put(tensor)
        tensor.add_(1)
        if push_out:
            place.put(torch.randn(7))
        with pytest.raises(RuntimeError, match="changed in place while offload copied it"):
            copy.get()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", [decoder, encoder])
def test_on_a_gpu_gradients_are_the_same_bits_and_memory_falls(make):
    model = make().cuda()
    batch = {name: value.cuda() for name, value in batch_for(model).items()}
    addresses = [p.data_ptr() for p in model.parameters()]

    def run(model: nn.Module) -> tuple[list[Tensor], int]:
        model.zero_grad()
        torch.manual_seed(5)
        before = torch.cuda.memory_allocated()
        loss = model(**batch).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        torch.cuda.synchronize()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept

    run(model)
    plain, kept = run(model)
    with Recipe(Offload(to="host", max_in_flight=2))(model) as offloaded:
        for _ in range(5):
            moved, kept_offloaded = run(offloaded)
            assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
    assert kept_offloaded < 0.5 * kept
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_a_packaged_encoder_trains_alike_with_its_activations_on_disk(tmp_path):
    need("minilm", "rotten-tomatoes")
    losses = []
    for codecs in ([], [{"offload": {"to": "disk", "folder": str(tmp_path)}}]):
        lora = {"lora": {"r": 4, "target_modules": ["query", "value"]}}
        report = train(
            RunSettings.from_dict(
                {
                    "model": "packaged:minilm",
                    "task": "text-classification",
                    "data": {
                        "train": "packaged:rotten-tomatoes",
                        "max_length": 32,
                        "max_train_rows": 16,
                        "max_eval_rows": 8,
                    },
                    "recipe": [lora, *codecs],
                    "train": {
                        "max_steps": 2,
                        "per_device_train_batch_size": 4,
                        "learning_rate": 2e-3,
                        "logging_steps": 1,
                        "eval_strategy": "no",
                        "seed": 0,
                    },
                    "output_dir": str(tmp_path / f"run{len(losses)}"),
                }
            )
        )
        losses.append((report.losses, report.memory["saved_bytes"]))
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] < 0.1 * losses[0][1]
