"""Two reversible streams: integers taken back exactly, gradients of an independent reference, memory, refusals."""

import copy
import functools
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from peft import LoraConfig
from torch import Tensor, nn

from shoestring.adapters.placement import task_head
from shoestring.blocks import Recompute, Reversible
from shoestring.blocks.stream_arithmetic import FixedPoint, pack_bits, unpack_bits
from shoestring.errors import RunFailed, SettingError
from shoestring.memory import Ledger, MemoryReport
from shoestring.recipe import Recipe, attached_to, load

WIDTH = 24
SIZES = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 40}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 64}
HEADS = {"num_key_value_heads": 1, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def ids(seed: int = 0, length: int = 11) -> Tensor:
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pair() -> dict[str, Tensor]:
    return {**padded(), "decoder_input_ids": ids(1, 7)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def bert(layers: int = 3, **more) -> nn.Module:
    return t.BertModel(t.BertConfig(**{**TEXT, **more}, num_hidden_layers=layers), add_pooling_layer=False)


def opt(layers: int = 3, **more) -> nn.Module:
    config = {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": WIDTH, "num_hidden_layers": layers, **more}
    return t.OPTModel(t.OPTConfig(**config))


def llama(layers: int = 3) -> nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **HEADS, num_hidden_layers=layers))


def t5() -> nn.Module:
    config = t.T5Config(
        d_model=WIDTH, d_kv=12, d_ff=40, num_heads=2, num_layers=2, vocab_size=50, decoder_start_token_id=0
    )
    return t.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    return t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, encoder_layers=2, decoder_layers=3))


def gpt_neox() -> nn.Module:
    return t.GPTNeoXModel(t.GPTNeoXConfig(**TEXT, num_hidden_layers=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "bert": (bert, padded),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**TEXT, num_hidden_layers=3)), padded),
    "vit": (
        lambda: t.ViTForImageClassification(
            t.ViTConfig(**SIZES, num_hidden_layers=3, image_size=16, patch_size=8, hidden_dropout_prob=0.1)
        ),
        image,
    ),
    "opt": (opt, padded),
    "opt, post-norm": (lambda: opt(do_layer_norm_before=False), padded),
    "llama": (llama, padded),
    "gpt2": (
        lambda: t.GPT2Model(t.GPT2Config(n_embd=WIDTH, n_layer=3, n_head=2, vocab_size=50, n_positions=32)),
        padded,
    ),
    "t5": (t5, pair),
    "bart": (bart, pair),
    "gpt-neox": (gpt_neox, padded),
}

SIDE_BY_SIDE = ("gpt-neox", 3)  # refused


def built(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Norms away from their start, so that leaving one out would show."""
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@contextmanager
def reversible(model: nn.Module, seed: int = 1, **settings):
    technique = Reversible(**settings)
    torch.manual_seed(seed)
    with technique.attach(model):
        model.train()
        for name, parameter in model.reversible.named_parameters():
            if "b_" in name:  # biases start at 0
                nn.init.normal_(parameter, std=0.05)
        yield technique


def run(model: nn.Module, inputs: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, dropout drawn from `seed`, and the gradients of a random projection of it."""
    torch.manual_seed(seed)
    out = model(**inputs)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model.zero_grad()
    (out.double() * weights).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all gradients together: |difference| / |wanted|."""
    assert found.keys() == wanted.keys()
    wrong = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return float((wrong / sum(g.double().square().sum() for g in wanted.values())).sqrt())


# --- numbers


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 8)])
def test_packed_bits_come_back(bits, shape):
    values = torch.randint(0, 2**bits, shape, dtype=torch.int32)
    packed = pack_bits(values, bits)
    stored = {1: 1, 2: 2, 3: 4, 4: 4}.get(bits, 8)
    assert packed.numel() == -(-values.numel() * stored // 8)
    assert torch.equal(unpack_bits(packed, bits, values.numel()).view(shape).int(), values)


@pytest.mark.parametrize(("bits", "fraction_bits"), [(32, 16), (64, 30)])
@pytest.mark.parametrize("shift", [0, 1, 3, 8])
def test_integers_are_taken_back_exactly_and_follow_the_equation(bits, fraction_bits, shift):
    numbers = FixedPoint(bits, fraction_bits)
    x, delta = 30 * torch.randn(5, 7), 100 * torch.randn(5, 7)
    start = numbers.enter(x)
    end, rest = numbers.add(start, shift, delta)
    assert torch.equal(numbers.take_back(end, shift, delta, rest), start)
    wanted = x.double() * 2.0**-shift + delta.double()
    assert (numbers.value(end, torch.float64) - wanted).abs().max() < 2.0 ** (1 - fraction_bits)


# --- the independent reference: stock blocks by hand, integers of 64 bits, straight-through gradients


def straight_through(value: Tensor, integers: Tensor) -> Tensor:
    return value + (integers.to(value.dtype) * 2.0**-16 - value).detach()


def adapter(parts: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = act(F.linear(x.to(parts.down.dtype), parts.down, parts.b_down))
    return F.linear(hidden, parts.up, parts.b_up)


def bert_halves(block, adapters, attention_adapter):
    def first(x):
        context = block.attention.self(x)[0]
        o = block.attention.output.dense(context)
        if attention_adapter:
            o = o + adapter(adapters.attention, o, F.gelu).to(o.dtype)
        return block.attention.output.LayerNorm(block.attention.output.dropout(o) + x)

    def second(z):
        o = block.output.dense(F.gelu(block.intermediate.dense(z)))
        o = o + adapter(adapters.feedforward, z, F.gelu).to(o.dtype)
        return block.output.LayerNorm(block.output.dropout(o) + z)

    return first, second


def opt_halves(block, adapters, attention_adapter):
    def first(x):
        projected = block.self_attn(block.self_attn_layer_norm(x))[0]
        if attention_adapter:
            projected = projected + adapter(adapters.attention, projected, F.relu).to(projected.dtype)
        return x + F.dropout(projected, block.dropout)

    def second(z):
        if attention_adapter:  # the half's own forward drops out the zeros that its attention gives, and draws for it
            F.dropout(torch.zeros_like(z), block.dropout)
        inner = block.final_layer_norm(z)
        o = block.fc2(F.relu(block.fc1(inner)))
        o = o + adapter(adapters.feedforward, inner, F.relu).to(o.dtype)
        return z + F.dropout(o, block.dropout)

    return first, second


def reference(model: nn.Module, variant: int, shift: int, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the integers that enter each block."""
    is_bert = isinstance(model, t.BertModel)
    if is_bert:
        h, blocks, act = model.embeddings(inputs), model.encoder.layer, F.gelu
    else:
        decoder = model.decoder
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        h = decoder.embed_tokens(inputs) + decoder.embed_positions(torch.ones_like(inputs), 0, positions)
        blocks, act = decoder.layers, F.relu
    dtype, q = h.dtype, lambda v: (v.detach().double() * 2**16).round().long()
    wide = torch.float32
    X1 = X2 = q(h)
    x1 = x2 = straight_through(h.to(wide), X1)
    first_shift, second_shift = {1: (shift, 0), 2: (0, shift), 3: (shift, shift)}[variant]
    entered = []
    for block, adapters in zip(blocks, model.reversible[0], strict=True):
        entered.append((X1, X2))
        halves = (bert_halves if is_bert else opt_halves)(block, adapters, variant == 3)
        first, second = halves
        plain = adapters.plain and functools.partial(adapter, adapters.plain, act=act)
        whole = functools.partial(lambda first, second, x: second(first(x)), first, second)
        f, g = {1: (whole, plain), 2: (plain, whole), 3: halves}[variant]
        said = f(x2.to(dtype))
        Y1 = (X1 >> first_shift) + q(said)
        y1 = straight_through(x1 * 2.0**-first_shift + said.to(wide), Y1)
        Y2, y2 = X2 >> second_shift, x2 * 2.0**-second_shift
        if g is not None:
            said = g(y1.to(dtype))
            Y2, y2 = Y2 + q(said), y2 + said.to(wide)
        y2 = straight_through(y2, Y2)
        X1, X2, x1, x2 = (Y1, Y2, y1, y2) if variant == 3 else (Y2, Y1, y2, y1)
    newest = (x1 if variant == 2 else x2).to(dtype)
    return (newest if is_bert else model.decoder.final_layer_norm(newest)), entered


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("build", [bert, opt])
def test_24_layers_with_dropout_are_the_reference_and_their_integers_come_back(
    build, variant, dtype, tolerance, monkeypatch
):
    torch.manual_seed(0)
    model = build(24).to(dtype)
    went, came = [], []
    add, take_back = FixedPoint.add, FixedPoint.take_back

    def noted_add(self, x, factor, delta):
        went.append(x)
        return add(self, x, factor, delta)

    def noted_take_back(self, y, factor, delta, rest):
        came.append(take_back(self, y, factor, delta, rest))
        return came[-1]

    with reversible(model, variant=variant) as technique:
        run(model, {"input_ids": ids()})  # with the probe
        monkeypatch.setattr(FixedPoint, "add", noted_add)
        monkeypatch.setattr(FixedPoint, "take_back", noted_take_back)
        out, gradients = run(model, {"input_ids": ids()})
        monkeypatch.undo()

        next(iter(technique.streams.values())).adapters_off = True  # the reference adds them itself
        torch.manual_seed(3)
        wanted_out, entered = reference(model, variant, 4, ids())
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        model.zero_grad()
        (wanted_out.double() * weights).sum().backward()
        wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert len(went) == len(came) == 48
    assert all(torch.equal(a, b) for a, b in zip(went, reversed(came), strict=True))
    for (x1, x2), numbers in zip(entered, zip(went[::2], went[1::2], strict=True), strict=True):
        assert torch.equal(x1, numbers[0].long())
        assert torch.equal(x2, numbers[1].long())
    assert torch.equal(out, wanted_out)
    assert error(gradients, wanted) < tolerance


@pytest.mark.parametrize("settings", [{"stream_bits": 64, "fraction_bits": 32}, {"mode": "float"}], ids=str)
@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in MODELS for variant in (1, 2, 3) if (name, variant) != SIDE_BY_SIDE],
)
def test_reversal_changes_no_loss_and_no_gradient(name, variant, settings):
    results = []
    for layers in (None, 0):
        model = built(name)
        with reversible(model, variant=variant, reversible_layers=layers, **settings):
            results.append(run(model, MODELS[name][1]()))
    (out, gradients), (wanted_out, wanted) = results
    assert torch.equal(out, wanted_out)
    assert all(gradient.any() for gradient in gradients.values())
    assert error(gradients, wanted) < 1e-10


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("build", [bert, opt])
def test_one_block_in_float64_comes_back_to_12_digits(build, variant):
    model = build(1).double()
    with reversible(model, variant=variant, mode="float") as technique:
        model(ids())
        (probe,) = technique.probes.values()
    assert probe.reconstruction_error < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"reversible_layers": 2},
        {"reversible_layers": 3, "placement": "frozen_bottom"},
        {"reversible_layers": 3, "placement": "frozen_bottom", "ordinary_layers": 1},
        {"mode": "float", "segment_blocks": 2},
        {"output": "mean"},
        {"output": "sum", "output_scale": 0.3},
        {"output": "linear"},
        {"block_adapter": False, "variant": 2},
        {"adapter_norm": True, "dropout": 0.3, "activation": "relu"},
    ],
    ids=str,
)
def test_every_setting_has_the_gradients_of_ordinary_autograd(settings):
    results = []
    for reverse in (True, False):
        torch.manual_seed(0)
        model = bert(5).double()
        with reversible(model, **{"stream_bits": 64, **settings} if settings.get("mode") != "float" else settings) as s:
            model.embeddings.word_embeddings.weight.requires_grad_(True)
            if not reverse:
                s.streams["encoder.layer"].num_reversed = 0
            results.append(run(model, padded()))
    assert torch.equal(results[0][0], results[1][0])
    assert error(results[0][1], results[1][1]) < 1e-11
    stock = 5 - settings["reversible_layers"] if settings.get("placement") == "frozen_bottom" else 0
    assert {int(n.split(".")[2]) for n in results[0][1] if n.startswith("reversible.0.")} >= set(range(stock, 5))
    assert not any(n.startswith(f"reversible.0.{i}.") for n in results[0][1] for i in range(stock))


# --- the start


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "opt", "t5"])
def test_without_adapters_and_with_a_factor_near_0_it_is_the_pretrained_model(name, variant):
    model, inputs = built(name), MODELS[name][1]()
    wanted = model.eval()(**inputs)[0]
    small = {1: {"lam": 1e-13}, 2: {"beta": 1e-13}, 3: {"lam": 1e-13, "beta": 1e-13}}[variant]
    with reversible(model, mode="float", variant=variant, **small):
        for parameter in model.reversible.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            out = model.eval()(**inputs)[0]
    assert torch.allclose(out, wanted, atol=1e-10)


def test_the_probe_reports_how_near_the_start_is(caplog):
    found = []
    for shift in (3, 8):
        model = built("bert", torch.float32)
        with reversible(model, shift=shift) as technique, caplog.at_level("INFO"):
            for parameter in model.reversible.parameters():
                nn.init.zeros_(parameter)
            model(ids())
            (probe,) = technique.probes.values()
        assert 0.9 < probe.cosine < 1
        assert "cosine" in caplog.text
        assert probe.reconstruction_error == 0
        numel, stored = 2 * 11 * WIDTH, {3: 4, 8: 8}[shift]
        assert probe.kept_bytes == 2 * 4 * numel + 3 * numel * stored // 8
        found.append(probe)
    assert found[0].deviation > 5 * found[1].deviation


def test_the_probe_draws_no_random_numbers_and_leaves_modes_alone():
    states = []
    for probes in ({}, {"encoder.layer": None}):
        model = built("bert", torch.float32)
        with reversible(model) as technique:
            technique.probes = probes
            model.encoder.layer[1].eval()
            torch.manual_seed(3)
            model(ids())
            states.append(torch.get_rng_state())
            assert not model.encoder.layer[1].training
            assert model.encoder.layer[0].training
    assert torch.equal(*states)


# --- the model around it


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_generation_runs_the_same_function_as_a_forward(name):
    model = built(name, torch.float32).eval()
    model.generation_config.eos_token_id = None
    with Recipe(Reversible())(model) as attached, torch.no_grad():
        made = attached.generate(ids(), max_new_tokens=4, do_sample=False, num_beams=1, use_cache=False)
        seen = made[:, :1] if model.config.is_encoder_decoder else ids()
        while seen.shape[1] < made.shape[1]:
            inputs = {"input_ids": ids(), "decoder_input_ids": seen} if model.config.is_encoder_decoder else {}
            logits = attached(**inputs or {"input_ids": seen}).logits
            seen = torch.cat((seen, logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(made, seen)
        with pytest.raises(SettingError, match="pass use_cache=False"):
            attached.generate(ids(), max_new_tokens=4)
    assert model.config.use_cache


def test_generation_through_a_peft_model_runs_the_streams():
    model = built("llama", torch.float32).eval()
    with Recipe(LoraConfig(r=2, target_modules=["q_proj"]), Reversible())(model) as attached, torch.no_grad():
        made = attached.generate(input_ids=ids(), max_new_tokens=1, do_sample=False, use_cache=False)
        assert torch.equal(made[:, -1], attached(ids()).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_lora_inside_the_blocks_learns_beside_or_in_place_of_adapters(variant):
    lora = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
    results = []
    for layers in (None, 0):
        model = built("bert")
        settings = {"variant": variant, "block_adapter": variant != 1, "stream_bits": 64, "reversible_layers": layers}
        torch.manual_seed(1)
        with Recipe(lora, Reversible(**settings))(model) as attached:
            attached.train()
            results.append(run(attached, padded()))
    assert sum("lora_" in name for name in results[0][1]) == 24
    assert all(gradient.any() for gradient in results[0][1].values())
    assert error(*[gradients for _, gradients in results]) < 1e-12


def test_hooks_on_parameters_run_once_and_gradients_add_up():
    model = built("bert")
    counts: dict[str, int] = {}
    with reversible(model, variant=3, stream_bits=64):
        _, once = run(model, padded())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda g, name=name: counts.update({name: counts.get(name, 0) + 1}) or 2 * g)
        _, doubled = run(model, padded())
        assert counts == dict.fromkeys(once, 1)
        assert error(doubled, {name: 2 * gradient for name, gradient in once.items()}) < 1e-12
        torch.manual_seed(3)
        loss = model(**padded())[0].sin().sum()
        model.zero_grad()
        loss.backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        loss.backward()
        added = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert error(added, {name: 2 * gradient for name, gradient in first.items()}) < 1e-12


def test_a_distributed_model_gets_the_same_gradients(tmp_path):
    model = built("bert")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with reversible(model):
            wanted = run(model, padded())[1]
            found = run(nn.parallel.DistributedDataParallel(model), padded())[1]
    finally:
        torch.distributed.destroy_process_group()
    assert error({name.removeprefix("module."): g for name, g in found.items()}, wanted) < 1e-12


def test_autocast_is_replayed_in_backward():
    results = []
    for layers in (None, 0):
        model = built("bert", torch.float32)
        with reversible(model, reversible_layers=layers):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(**padded())[0]
            (out * torch.linspace(-1, 1, WIDTH)).sum().backward()  # outside of autocast
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append((out, gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert error(results[0][1], results[1][1]) < 2e-2


def test_the_model_is_left_as_it_was():
    model = t.BertForSequenceClassification(t.BertConfig(**TEXT, num_hidden_layers=2, num_labels=3))
    before, state = model.eval()(ids()).logits, copy.deepcopy(model.state_dict())
    with Reversible(variant=3, output="linear").attach(model):
        assert [n for n, p in model.named_parameters() if p.requires_grad and "reversible" not in n] == [
            "classifier.weight",
            "classifier.bias",
        ]
        assert not torch.equal(model(ids()).logits, before)
        model.train()(ids(), labels=torch.tensor([0, 2])).loss.backward()
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model.eval()(ids()).logits, before)


def test_only_what_is_new_counts_as_head():
    assert task_head(llama()) == []
    assert task_head(bert()) == []
    model = t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, num_hidden_layers=1))
    assert {id(p) for p in task_head(model)} == {id(p) for p in model.classifier.parameters()}


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_saved_model_is_loaded_onto_its_base(tmp_path, with_lora):
    base = t.BertForSequenceClassification(t.BertConfig(**TEXT, num_hidden_layers=2, num_labels=3))
    other = copy.deepcopy(base)
    lora = [LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])] if with_lora else []
    model = Recipe(*lora, Reversible(variant=3, output="linear")).apply(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        model.train()(ids(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    attached_to(model).save(tmp_path)
    loaded = load(other, tmp_path)
    assert torch.equal(loaded.eval()(ids()).logits, model.eval()(ids()).logits)
    (next(tmp_path.rglob("reversible.safetensors"))).unlink()
    with pytest.raises(SettingError, match=r"holds no reversible\.safetensors"):
        attached_to(loaded).restore(tmp_path)


# --- memory


def step_memory(model: nn.Module, inputs: Tensor) -> MemoryReport:
    model(inputs)[0].sum().backward()
    model.zero_grad()
    with Ledger(model) as ledger:
        model(inputs)[0].sum().backward()
    return ledger.report()


LONG = torch.randint(3, 50, (4, 128), generator=torch.Generator().manual_seed(0))
WIDE = 64


def wide_bert(layers: int, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDE, "num_attention_heads": 4, "intermediate_size": 4 * WIDE}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return bert(layers, **sizes, **dropouts, max_position_embeddings=128).train()


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.block(x),)


@functools.cache
def compared(dropout: float) -> tuple[MemoryReport, MemoryReport, MemoryReport]:
    """Full tuning of 12 layers, the same recomputed, and one frozen block by itself."""
    full = step_memory(wide_bert(12, dropout), LONG)
    model = wide_bert(12, dropout)
    with Recompute().attach(model):
        recomputed = step_memory(model, LONG)
    alone = OneBlock(wide_bert(1, dropout).encoder.layer[0]).requires_grad_(False)
    return full, recomputed, step_memory(alone, torch.randn(*LONG.shape, WIDE, requires_grad=True))


@pytest.mark.parametrize(
    ("variant", "dropout"), [pytest.param(1, 0.0, marks=pytest.mark.slow), (1, 0.1), (2, 0.1), (3, 0.0)]
)
def test_12_layers_keep_two_streams_with_the_bits_shifted_out_and_hold_one_block_more(variant, dropout):
    full, recomputed, one = compared(dropout)
    model = wide_bert(12, dropout)
    with reversible(model, variant=variant):
        report = step_memory(model, LONG)
    numel = LONG.numel() * WIDE
    assert report.saved_bytes == 2 * 4 * numel + 12 * numel * (2 if variant == 3 else 1) // 2
    assert report.saved_bytes < 0.03 * full.saved_bytes
    assert report.saved_bytes < 0.5 * recomputed.saved_bytes
    peak, one_peak = (r.peak_bytes - r.at_peak["weights"] - r.at_peak["gradients"] for r in (report, one))
    assert peak < 1.1 * (report.saved_bytes + 2 * 4 * numel + one_peak)  # the streams' gradients are twice 4 bytes


def test_memory_is_counted_without_numbers():
    from torch._subclasses import FakeTensorMode

    reports = []
    for mode in (None, FakeTensorMode()):
        with mode or torch.random.fork_rng():
            model = bert(4, hidden_dropout_prob=0.0)
            with reversible(model):
                inputs = torch.full((2, 9), 3)
                with Ledger(model) as ledger:
                    model(inputs)[0].sum().backward()
                reports.append(ledger.report().saved_bytes)
    assert reports[0] == reports[1] > 0


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": 4}, "variant of reversible must be one of 1, 2, 3, got 4"),
        ({"r": 0}, "r of reversible must be at least 1, got 0"),
        ({"shift": 9}, "shift of reversible must be from 1 to 8, got 9"),
        ({"shift": 0}, "shift of reversible must be from 1 to 8, got 0"),
        ({"stream_bits": 16}, "stream_bits of reversible must be one of 32, 64, got 16"),
        ({"fraction_bits": 30}, "fraction_bits of reversible must be from 1 to 28, got 30"),
        ({"lam": 0.1}, "mode exact multiplies by powers of two only: set shift"),
        ({"mode": "float", "lam": 0.0}, "lam of reversible must not be 0"),
        ({"mode": "float", "beta": 0.0}, "beta of reversible must not be 0"),
        ({"mode": "float", "shift": 3}, "shift of reversible is for mode exact"),
        ({"segment_blocks": 2}, "segment_blocks of reversible is for mode float"),
        ({"ordinary_layers": 1}, "ordinary_layers of reversible is for placement frozen_bottom"),
        (
            {"placement": "frozen_bottom", "reversible_layers": 2, "ordinary_layers": 3},
            "must be at most reversible_layers, 2, got 3",
        ),
        (
            {"placement": "frozen_bottom", "reversible_layers": 0},
            "must be at least 1 with placement frozen_bottom, got 0",
        ),
        ({"output_scale": 0.5}, "output_scale of reversible is for output sum"),
        ({"dropout": 1.0}, r"dropout of reversible must be in \[0, 1\), got 1.0"),
        ({"activation": "gelou"}, "Did you mean 'gelu'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Reversible(**settings)


def test_models_it_cannot_run_are_refused():
    with (
        pytest.raises(SettingError, match=r"reversible_layers of reversible is 4, but encoder\.layer has 3 blocks"),
        Reversible(reversible_layers=4).attach(bert()),
    ):
        pass
    with pytest.raises(SettingError, match="use variant 1 or 2"), Reversible(variant=3).attach(gpt_neox()):
        pass
    model = bert()
    model.encoder.layer[1].output.LayerNorm = nn.BatchNorm1d(11)
    with pytest.raises(SettingError, match=r"layer\.1\.output\.LayerNorm is a BatchNorm1d"), Reversible().attach(model):
        pass
    model = bert()
    for block in model.encoder.layer:
        block.my_norm = nn.LayerNorm(WIDTH)
    with (
        pytest.raises(SettingError, match="is of type BertLayer, a block of unknown layout"),
        Reversible().attach(model),
    ):
        pass
    with pytest.raises(SettingError, match="is of type BloomBlock, a block of unknown layout"):
        Recipe(Reversible()).apply(t.BloomModel(t.BloomConfig(vocab_size=9, hidden_size=8, n_layer=2, n_head=2)))
    with pytest.raises(SettingError, match="recompute and reversible cannot be combined"):
        Recipe(Reversible(), Recompute())


def test_calls_that_need_stock_blocks_are_refused():
    model = llama()
    with reversible(model):
        for wanted in ("output_attentions", "output_hidden_states"):
            with pytest.raises(SettingError, match=f"{wanted} is not there under reversible"):
                model.eval()(ids(), **{wanted: True})
        with pytest.raises(SettingError, match="pass use_cache=False"):
            model(ids(), use_cache=True)
        model.config.output_hidden_states = True
        with pytest.raises(SettingError, match="output_hidden_states is not there"):
            model(ids())


def test_streams_out_of_range_are_refused():
    model = opt()
    with torch.no_grad():
        model.decoder.layers[1].fc2.bias.fill_(2e4)
    with reversible(model), pytest.raises(SettingError, match=r"reach 2e\+04.*below 1\.64e\+04.*set stream_bits to 64"):
        model(ids())
    with reversible(model, stream_bits=64):
        model(ids())[0].sum().backward()
    with torch.no_grad():
        model.decoder.layers[1].fc2.bias.fill_(float("nan"))
    with reversible(model, stream_bits=64), pytest.raises(SettingError, match="NaN or Inf"):
        model(ids())


def test_floating_streams_that_cannot_be_taken_back_are_refused():
    torch.manual_seed(0)
    model = bert(12)
    with reversible(model, mode="float"), pytest.raises(SettingError, match="Set mode to exact; or segment_blocks"):
        model(ids())
    with reversible(model, mode="float", segment_blocks=2) as technique:
        model(ids())
        (probe,) = technique.probes.values()
        assert 0 < probe.reconstruction_error < 1e-3


class NoisyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * 300 * self.calls


@pytest.mark.parametrize("settings", [{}, {"mode": "float", "lam": 0.5}], ids=str)
def test_a_block_that_computes_something_else_in_backward_is_noticed(settings):
    model = bert()
    model.encoder.layer[1].intermediate.dense.__class__ = NoisyLinear
    with reversible(model, **settings) as technique:
        technique.probes["encoder.layer"] = None
        with pytest.raises(RunFailed, match=r"first block"):
            model(ids())[0].square().sum().backward()


def test_trained_parameters_outside_of_the_blocks_are_refused():
    model = bert()
    outside = nn.Parameter(torch.ones(WIDTH))
    model.encoder.layer[1].output.dense.register_forward_hook(lambda m, a, o: o * outside)
    with (
        reversible(model),
        pytest.raises(SettingError, match=r"encoder\.layer\.1 reads a trained parameter of shape \(24,\)"),
    ):
        model(ids())
