"""Embedding pruning: the same numbers with fewer rows, all rows back on save and exit, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from packaged import data
from shoestring import Recipe, load
from shoestring.adapters import HUTConfig
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.optimizers import BilevelZOFO
from shoestring.pruning import EmbeddingPruning
from shoestring.pruning.used_ids import used_ids
from shoestring.recipe import attached_to
from shoestring.technique import Moment
from shoestring.testing.assets import need

V, D = 61, 24
SIZES = {"hidden_size": D, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROWS = [{"input_ids": [3, 7, 9, 60]}, {"input_ids": [7, 8]}, {"input_ids": [41]}]
KEPT = [3, 7, 8, 9, 41, 60]


def bert(**settings: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SIZES, **STILL, **settings}))


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, **STILL))
    with torch.no_grad():
        model.cls.predictions.bias.copy_(torch.randn(V))
    return model


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, **STILL))


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied))


def gemma() -> Gemma3ForCausalLM:
    """Its embedding scales what it looks up; untied here."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, pad_token_id=0)
    return Gemma3ForCausalLM(config)


def t5(tied: bool = False) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": D, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=V, **sizes, dropout_rate=0.0, decoder_start_token_id=0))
    if not tied:  # as in checkpoints that hold a head of their own
        model.lm_head.weight = nn.Parameter(torch.randn(V, D))
    return model


def batches(model: nn.Module, seed: int = 0, count: int = 1) -> list[dict[str, Tensor]]:
    """Odd-sized batches of ids out of KEPT, with padding and labels as the model wants them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.tensor(KEPT)[torch.randint(len(KEPT), shape, generator=generator)]

    found = []
    for _ in range(count):
        batch = {"input_ids": ids(3, 7)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 4:] = 0
        if "Classification" in type(model).__name__:
            batch["labels"] = torch.tensor([0, 1, 1])
        else:
            batch["labels"] = ids(3, 5) if "T5" in type(model).__name__ else ids(3, 7)
            batch["labels"][0, 2] = -100
        found.append(batch)
    return found


def rows_of(model: nn.Module, found: list[dict[str, Tensor]]) -> dict[str, list[dict[str, Any]]]:
    return {"train": [{key: value[i] for key, value in b.items()} for b in found for i in range(len(b["input_ids"]))]}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def kept_ids(model: nn.Module) -> list[int]:
    return attached_to(model).techniques[0].state_dict()["kept_ids"].tolist()


UNTIED: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "roberta": roberta,
    "llama": llama,
    "gemma": gemma,
    "t5": t5,
}


@pytest.fixture(params=UNTIED)
def untied(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return UNTIED[request.param]


class TestSameNumbers:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_logits_loss_and_gradients_are_those_of_the_full_table_to_the_bit(self, untied, seed):
        plain, model = untied(), untied()
        (batch,) = batches(plain, seed)
        expected = plain(**batch)
        expected.loss.backward()
        with Recipe(EmbeddingPruning())(model, data=rows_of(model, [batch])) as pruned:
            ids = torch.tensor(kept_ids(pruned))
            assert len(ids) < V
            got = pruned(**batch)
            got.loss.backward()
            assert torch.equal(got.loss, expected.loss)
            assert torch.equal(got.logits, expected.logits)
            full = dict(plain.named_parameters())
            table = plain.get_input_embeddings().weight
            for name, parameter in pruned.named_parameters():
                gradient = full[name].grad[ids] if full[name] is table else full[name].grad
                assert torch.equal(parameter.grad, gradient), name
            outside = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
            assert not table.grad[outside].any()

    @pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    def test_steps_then_exit_leave_the_weights_of_an_unpruned_run_to_the_bit(self, untied, optimizer):
        plain, model = untied(), untied()
        found = batches(plain, count=4)

        def steps(of: nn.Module) -> None:
            trained = optimizer(of.parameters(), lr=0.05, weight_decay=0.0)
            for batch in found:
                of(**batch).loss.backward()
                nn.utils.clip_grad_norm_(of.parameters(), 0.5)
                trained.step()
                trained.zero_grad()

        steps(plain)
        with Recipe(EmbeddingPruning())(model, data=rows_of(model, found)) as pruned:
            steps(pruned)
        assert_same(state(model), state(plain))

    def test_with_weight_decay_only_rows_outside_of_the_data_differ(self):
        plain, model, start = bert(), bert(), bert()
        (batch,) = batches(plain)
        for of in (plain, Recipe(EmbeddingPruning()).apply(model, data=rows_of(model, [batch]))):
            trained = torch.optim.AdamW(of.parameters(), lr=0.1, weight_decay=0.01)
            of(**batch).loss.backward()
            trained.step()
        ids = torch.tensor(kept_ids(model))
        Recipe.remove(model)
        ours, theirs = (m.get_input_embeddings().weight for m in (model, plain))
        outside = torch.ones(V, dtype=torch.bool).scatter(0, ids, False)
        assert torch.equal(ours[ids], theirs[ids])
        assert torch.equal(ours[outside], start.get_input_embeddings().weight[outside])
        shrunk = start.get_input_embeddings().weight[outside] * (1 - 0.1 * 0.01)
        torch.testing.assert_close(theirs[outside], shrunk, rtol=1e-6, atol=0)

    def test_in_float64_and_on_inputs_of_every_int_dtype(self):
        plain, model = bert().double(), bert().double()
        ids = torch.tensor([[3, 7, 9]])
        with Recipe(EmbeddingPruning(keep_ids=[3, 7, 9]))(model) as pruned:
            for dtype in (torch.int64, torch.int32):
                assert torch.equal(pruned(input_ids=ids.to(dtype)).logits, plain(input_ids=ids.to(dtype)).logits)
            embedding = model.get_input_embeddings()
            assert torch.equal(embedding(input=ids), plain.get_input_embeddings()(ids))


class TestBytes:
    def test_weights_gradients_and_state_fall_by_the_rows_taken_out(self):
        counted = {}
        for name in ("plain", "pruned"):
            model = bert(vocab_size=1009)
            if name == "pruned":
                model = Recipe(EmbeddingPruning(keep_ids=KEPT)).apply(model)
                rows = len(kept_ids(model))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            with Ledger(model, optimizer) as ledger:
                model(**batches(model)[0]).loss.backward()
                optimizer.step()
            counted[name] = ledger.report()
        fewer = (1009 - rows) * D * 4
        plain, pruned = counted["plain"], counted["pruned"]
        assert plain.trainable_bytes - pruned.trainable_bytes == fewer
        assert pruned.frozen_bytes - plain.frozen_bytes == 4 * 1009  # the places of the rows
        assert plain.largest["gradients"] - pruned.largest["gradients"] == fewer
        assert plain.largest["optimizer_state"] - pruned.largest["optimizer_state"] == 2 * fewer
        assert plain.largest["weights"] - pruned.largest["weights"] == fewer - 4 * 1009

    def test_tables_that_share_a_weight_share_the_places_of_its_rows(self):
        model = t5()
        with Recipe(EmbeddingPruning(keep_ids=KEPT))(model):
            tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == D]
            assert len(tables) == 3
            assert len({table.pruned_positions.data_ptr() for table in tables}) == 1
            assert len({id(table.weight) for table in tables}) == 1

    def test_the_full_matrix_in_a_file_takes_no_host_memory_and_comes_back(self, tmp_path):
        model, before = bert(), state(bert())
        with Recipe(EmbeddingPruning(keep_ids=KEPT, offload_folder=str(tmp_path)))(model) as pruned:
            (rows,) = attached_to(pruned).techniques[0]._rows
            assert rows.full.untyped_storage().filename is not None
            assert list(tmp_path.iterdir()) == []  # nothing is left even if the process is killed
            assert_same(state(pruned), before)
            with torch.no_grad():
                model.get_input_embeddings().weight.add_(1.0)
        after = model.get_input_embeddings().weight
        assert after.untyped_storage().filename is None
        changed = (after != before["bert.embeddings.word_embeddings.weight"]).all(1)
        assert changed.nonzero().flatten().tolist() == [0, *KEPT]


class TestUndo:
    @pytest.mark.parametrize("recipe", [Recipe(EmbeddingPruning()), Recipe(EmbeddingPruning(restricted_softmax=True))])
    @pytest.mark.parametrize("build", [bert, llama, lambda: llama(tied=True), t5, lambda: t5(tied=True), masked_lm])
    def test_everything_is_as_it_was(self, build, recipe):
        model = build()
        tied = model.get_output_embeddings() is not None and (
            model.get_output_embeddings().weight is model.get_input_embeddings().weight
        )
        if tied and recipe == Recipe(EmbeddingPruning()):
            recipe = Recipe(
                EmbeddingPruning(), LoraConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"])
            )
        before, pointer = state(model), model.get_input_embeddings().weight.data_ptr()
        look = [
            (n, id(m), set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), list(m._buffers))
            for n, m in model.named_modules()
        ]
        hooks = [
            (len(m._state_dict_hooks), len(m._load_state_dict_pre_hooks), getattr(m, "num_embeddings", None))
            for m in model.modules()
        ]
        parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
        padding = [getattr(m, "padding_idx", None) for m in model.modules()]
        for _ in range(2):
            with recipe(model, data=rows_of(model, batches(model))) as pruned:
                assert pruned.get_input_embeddings().num_embeddings < V
                pruned(**batches(model)[0]).loss.backward()
            assert_same(state(model), before)
            assert model.get_input_embeddings().weight.data_ptr() == pointer
            assert look == [
                (n, id(m), set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), list(m._buffers))
                for n, m in model.named_modules()
            ]
            assert hooks == [
                (len(m._state_dict_hooks), len(m._load_state_dict_pre_hooks), getattr(m, "num_embeddings", None))
                for m in model.modules()
            ]
            assert parameters == [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
            assert padding == [getattr(m, "padding_idx", None) for m in model.modules()]
        (batch,) = batches(model)
        assert torch.equal(model(**batch).logits, build()(**batch).logits)

    def test_padding_points_at_the_place_of_its_row_and_gets_no_gradient(self):
        model = roberta()  # its padding id is 1
        rows = [{"input_ids": [0, 30, 1]}]
        with Recipe(EmbeddingPruning())(model, data={"train": rows}) as pruned:
            embedding = pruned.get_input_embeddings()
            assert kept_ids(pruned).index(1) == embedding.padding_idx == 1
            pruned(input_ids=torch.tensor([[0, 30, 1]]), labels=torch.tensor([1])).loss.backward()
            assert not embedding.weight.grad[1].any()
            assert embedding.weight.grad[0].any()
        model = bert(pad_token_id=59)
        with Recipe(EmbeddingPruning(keep_ids=[4]))(model) as pruned:
            assert pruned.get_input_embeddings().padding_idx == 1

    def test_a_graph_from_before_does_not_stand_in_the_way(self):
        model = bert()
        (batch,) = batches(model)
        held = model(**batch).loss
        with Recipe(EmbeddingPruning(keep_ids=KEPT))(model) as pruned:
            inside = pruned(**batch).loss
            inside.backward()
        model(**batch).loss.backward()
        assert model.get_input_embeddings().weight.grad.shape == (V, D)
        del held

    def test_copies_of_a_pruned_model_are_independent(self):
        model = Recipe(EmbeddingPruning(keep_ids=KEPT)).apply(bert())
        before = state(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_input_embeddings().weight.zero_()
        assert not twin.state_dict()["bert.embeddings.word_embeddings.weight"][3].any()
        assert_same(state(model), before)

    def test_a_model_moved_to_another_dtype_keeps_it(self):
        model = bert()
        with Recipe(EmbeddingPruning(keep_ids=KEPT))(model):
            model.to(torch.bfloat16)
        assert torch.equal(model.get_input_embeddings().weight, bert().to(torch.bfloat16).get_input_embeddings().weight)


class TestSaving:
    def trained(self, recipe: Recipe, build: Callable[[], nn.Module] = bert) -> nn.Module:
        model = build()
        model = recipe.apply(model, data=rows_of(model, batches(model)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.125)
        return model

    def test_what_is_saved_loads_into_a_stock_model(self, tmp_path):
        model = self.trained(Recipe(EmbeddingPruning()))
        model.save_pretrained(tmp_path)
        stock = BertForSequenceClassification.from_pretrained(tmp_path)
        assert stock.config.vocab_size == stock.get_input_embeddings().num_embeddings == V
        (batch,) = batches(stock)
        assert torch.equal(stock(**batch).logits, model.eval()(**batch).logits)
        Recipe.remove(model)
        assert_same(state(stock), state(model))

    def test_a_stock_checkpoint_loads_into_a_pruned_model(self):
        torch.manual_seed(7)
        other = BertForSequenceClassification(BertConfig(**SIZES, **STILL))
        model = bert()
        with Recipe(EmbeddingPruning(keep_ids=KEPT))(model) as pruned:
            pruned.load_state_dict(other.state_dict())
            (batch,) = batches(other)
            assert torch.equal(pruned(**batch).logits, other(**batch).logits)
        assert_same(state(model), state(other))

    @pytest.mark.parametrize("build", [bert, t5])
    def test_a_recipe_saved_and_loaded_gives_all_rows_or_those_of_new_data(self, tmp_path, build):
        model = self.trained(Recipe(EmbeddingPruning()), build)
        attached_to(model).save(tmp_path)
        (batch,) = batches(model)
        expected = model(**batch).logits
        whole = load(build(), tmp_path)
        assert whole.get_input_embeddings().num_embeddings == V
        assert torch.equal(whole(**batch).logits, expected)
        few = load(build(), tmp_path, data=rows_of(model, [batch]))
        assert few.get_input_embeddings().num_embeddings < V
        assert torch.equal(few(**batch).logits, expected)
        first, second, third = (state(Recipe.remove(m)) for m in (model, whole, few))
        assert_same(first, second)
        assert_same(first, third)

    def test_the_file_holds_the_matrix_in_its_full_shape_and_adapters_alone_are_saved_alone(self, tmp_path):
        from safetensors.torch import load_file

        attached_to(self.trained(Recipe(EmbeddingPruning()))).save(tmp_path / "full")
        saved = load_file(tmp_path / "full" / "trained.safetensors")
        assert saved["bert.embeddings.word_embeddings.weight"].shape == (V, D)
        recipe = Recipe(EmbeddingPruning(), LoraConfig(r=2, target_modules=["query"]))
        attached_to(self.trained(recipe)).save(tmp_path / "lora")
        assert not (tmp_path / "lora" / "trained.safetensors").exists()
        assert all("lora" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))


def small_lora(build: Callable[[], nn.Module], **settings: Any) -> LoraConfig:
    names = {"bert": ["query", "value"], "t5": ["q", "v"]}.get(build.__name__, ["q_proj", "v_proj"])
    return LoraConfig(**{"r": 2, "target_modules": names, "init_lora_weights": False, **settings})


class TestWithAdapters:
    @pytest.mark.parametrize("build", [bert, llama, t5])
    @pytest.mark.parametrize("method", ["lora", "hut", "wrapped before"])
    def test_the_gradients_are_those_without_pruning(self, build, method, tmp_path):
        plain, model = build(), build()
        (batch,) = batches(plain)
        data = rows_of(plain, [batch])
        config = small_lora(build)
        if method == "hut":
            config = HUTConfig(target_modules=config.target_modules, init_weights=False)
        torch.manual_seed(3)
        reference = get_peft_model(plain, config) if method == "wrapped before" else Recipe(config).apply(plain)
        torch.manual_seed(3)
        if method == "wrapped before":
            pruned = Recipe(EmbeddingPruning()).apply(get_peft_model(model, small_lora(build)), data=data)
        else:
            pruned = Recipe(EmbeddingPruning(), config).apply(model, data=data)
        for of in (reference, pruned):
            of(**batch).loss.backward()
        trained = {name: p for name, p in pruned.named_parameters() if p.requires_grad}
        expected = {name: p for name, p in reference.named_parameters() if p.requires_grad}
        assert trained.keys() == expected.keys()
        assert all(torch.equal(p.grad, expected[name].grad) for name, p in trained.items())
        if method != "wrapped before":
            attached_to(pruned).save(tmp_path)
            again = load(build(), tmp_path)
            assert torch.equal(again(**batch).logits, pruned(**batch).logits)
        Recipe.remove(pruned)
        assert model.get_input_embeddings().num_embeddings == V

    def test_on_a_4_bit_base(self):
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'shoestring[quant]'")

        def four_bit() -> LlamaForCausalLM:
            model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 96}))
            for layer in model.model.layers:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    linear = getattr(layer.self_attn, name)
                    new = bitsandbytes.nn.Linear4bit(64, linear.out_features, bias=False, quant_type="nf4")
                    new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(layer.self_attn, name, new.to("cpu"))
            return model

        torch.manual_seed(0)
        plain = four_bit()
        torch.manual_seed(0)
        model = four_bit()
        (batch,) = batches(plain)
        torch.manual_seed(3)
        reference = Recipe(small_lora(llama)).apply(plain)
        torch.manual_seed(3)
        pruned = Recipe(EmbeddingPruning(), small_lora(llama)).apply(model, data=rows_of(model, [batch]))
        outputs = [of(**batch) for of in (reference, pruned)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for output in outputs:
            output.loss.backward()
        expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
        assert all(torch.equal(p.grad, expected[n]) for n, p in pruned.named_parameters() if p.requires_grad)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (small_lora(bert, modules_to_save=["word_embeddings"]), "word_embeddings is pruned by embedding_pruning"),
            (small_lora(bert, target_modules=["word_embeddings"]), "word_embeddings is pruned by embedding_pruning"),
            (small_lora(bert, trainable_token_indices=[3]), "embedding_pruning and lora with trainable tokens"),
            (PromptTuningConfig(num_virtual_tokens=3), "embedding_pruning and prompt_tuning cannot be combined"),
        ],
    )
    def test_adapters_on_the_embedding_are_refused_and_the_model_is_left_as_it_was(self, config, message):
        model = bert()
        before = state(model)
        with pytest.raises(SettingError, match=message):
            Recipe(EmbeddingPruning(keep_ids=KEPT), config).apply(model)
        assert_same(state(model), before)
        assert model.get_input_embeddings().num_embeddings == V

    @pytest.mark.parametrize(
        "config",
        [small_lora(bert, modules_to_save=["word_embeddings"]), small_lora(bert, target_modules=["word_embeddings"])],
    )
    def test_an_embedding_wrapped_before_is_refused(self, config):
        with pytest.raises(SettingError, match=r"needs an nn\.Embedding of plain numbers"):
            Recipe(EmbeddingPruning(keep_ids=KEPT)).apply(get_peft_model(bert(), config))


class TestTiedHead:
    @pytest.mark.parametrize("build", [lambda: llama(tied=True), lambda: t5(tied=True), masked_lm])
    def test_one_that_trains_is_refused(self, build):
        model = build()
        with (
            pytest.warns(UserWarning, match="saves no memory"),
            pytest.raises(
                SettingError, match=r"head shares the embedding's weight, which trains.*restricted_softmax: true"
            ),
        ):
            Recipe(EmbeddingPruning(keep_ids=KEPT)).apply(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_a_frozen_one_stays_whole_with_the_same_loss(self):
        plain, model = llama(tied=True), llama(tied=True)
        (batch,) = batches(plain)
        torch.manual_seed(3)
        reference = Recipe(small_lora(llama)).apply(plain)
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="saves no memory"):
            pruned = Recipe(EmbeddingPruning(), small_lora(llama)).apply(model, data=rows_of(model, [batch]))
        assert pruned.get_output_embeddings().weight.shape == (V, D)
        for of in (reference, pruned):
            of(**batch).loss.backward()
        expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
        assert all(torch.equal(p.grad, expected[n]) for n, p in pruned.named_parameters() if p.requires_grad)
        assert torch.equal(model.state_dict()["model.embed_tokens.weight"], plain.get_input_embeddings().weight)
        with pytest.raises(SettingError, match=r"tie_weights\(\) needs every row"):
            model.tie_weights()
        Recipe.remove(pruned)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_one_that_begins_to_train_later_is_refused_at_the_next_step(self):
        with pytest.warns(UserWarning, match="saves no memory"):
            model = Recipe(EmbeddingPruning(keep_ids=KEPT), small_lora(llama)).apply(llama(tied=True))
        attached_to(model).event("on_step_begin", Moment(model))
        model.get_output_embeddings().weight.requires_grad_(True)
        with pytest.raises(SettingError, match="which trains"):
            attached_to(model).event("on_step_begin", Moment(model))

    @pytest.mark.parametrize("tied", [False, True])
    def test_one_that_moves_without_gradients_is_refused(self, tied):
        recipe = Recipe(EmbeddingPruning(keep_ids=KEPT), small_lora(llama), BilevelZOFO())
        with pytest.warns(UserWarning, match="saves no memory") if tied else nullcontext():
            attached = attached_to(recipe.apply(llama(tied=tied)))
        moment = Moment(attached.model)
        with pytest.raises(SettingError, match="which bilevel_zofo moves") if tied else nullcontext():
            attached.techniques[0].on_step_begin(moment)

    @pytest.mark.parametrize("build", [lambda: llama(tied=True), lambda: t5(tied=True), masked_lm])
    def test_a_restricted_softmax_is_the_loss_over_the_kept_ids(self, build):
        plain, model = build(), build()
        (batch,) = batches(plain)
        recipe = Recipe(EmbeddingPruning(restricted_softmax=True))
        assert not recipe.techniques[0].exact
        with recipe(model, data=rows_of(model, [batch])) as pruned:
            ids = torch.tensor(kept_ids(pruned))
            got = pruned(**batch)
            got.loss.backward()
            logits = plain(**batch).logits[..., ids]
            labels = torch.full_like(batch["labels"], -100)
            for place, index in enumerate(ids):
                labels[batch["labels"] == index] = place
            if isinstance(plain, LlamaForCausalLM):
                logits, labels = logits[:, :-1], labels[:, 1:]
            expected = nn.functional.cross_entropy(logits.reshape(-1, len(ids)), labels.reshape(-1))
            expected.backward()
            torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)
            assert got.logits.shape[-1] == V
            weight, full = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
            torch.testing.assert_close(weight.grad, full.grad[ids], rtol=1e-5, atol=1e-6)
            assert model.get_output_embeddings().weight is weight
            assert_same(state(model), state(plain))

    def test_a_restricted_softmax_with_an_untied_head_is_told_to_change_nothing(self):
        model = llama()
        (batch,) = batches(model)
        with pytest.warns(UserWarning, match="changes nothing here"):
            pruned = Recipe(EmbeddingPruning(restricted_softmax=True)).apply(model, data=rows_of(model, [batch]))
        assert torch.equal(pruned(**batch).logits, llama()(**batch).logits)

    def test_a_restricted_softmax_under_capped_logits_or_an_adapted_head_is_refused(self):
        torch.manual_seed(0)
        from transformers import Gemma2Config, Gemma2ForCausalLM

        capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
        recipe = Recipe(EmbeddingPruning(keep_ids=KEPT, restricted_softmax=True))
        with pytest.raises(SettingError, match="caps its logits"):
            recipe.apply(capped)
        lora = LoraConfig(r=2, target_modules=["lm_head"])
        with pytest.raises(SettingError, match="lm_head is pruned by embedding_pruning"):
            Recipe(EmbeddingPruning(keep_ids=KEPT, restricted_softmax=True), lora).apply(llama(tied=True))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": np.array(ROWS[index]["input_ids"])}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


class TestData:
    @pytest.mark.parametrize(
        "rows",
        [
            ROWS,
            Dataset.from_list(ROWS),
            Dataset.from_list([*ROWS, {"input_ids": [5]}]).select([2, 1, 0]),
            Dataset.from_list(ROWS).with_format("torch"),
            Dataset.from_dict({"n": [0, 1, 2]}).with_transform(
                lambda batch: {"input_ids": [ROWS[n]["input_ids"] for n in batch["n"]]}
            ),
            Dataset.from_dict({"input_ids": [[[3, 7], [9, 60]], [[7, 8, 41]]]}),
            Rows(),
            [{"input_ids": torch.tensor([[3, 7, 9], [60, 8, 41]])}],
            [{"input_ids": [torch.tensor([3, 7, 9]), torch.tensor([60, 8, 41, -100])]}],
        ],
        ids=["list", "dataset", "selected", "torch format", "transform", "nested", "torch", "batches", "tensors"],
    )
    def test_ids_are_found_in_every_kind_of_rows(self, rows):
        assert used_ids({"train": rows}, ["input_ids"]).tolist() == KEPT

    def test_splits_and_columns_are_joined_and_labels_are_read_where_they_are_ids(self):
        model = t5()
        rows = [{"input_ids": [9, 3], "labels": [4, -100]}, {"input_ids": [9], "labels": [30, 31, 32]}]
        data = {"train": rows, "test": [{"input_ids": [55], "decoder_input_ids": [44], "labels": 50}]}
        with Recipe(EmbeddingPruning())(model, data=data) as pruned:
            assert kept_ids(pruned) == [0, 1, 3, 4, 9, 30, 31, 32, 44, 55]
        with Recipe(EmbeddingPruning())(bert(), data={"train": [{"input_ids": [9], "labels": [4]}]}) as pruned:
            assert kept_ids(pruned) == [0, 9]
        recipe = Recipe(EmbeddingPruning(columns=["mine"]))
        with recipe(bert(), data={"train": [{"input_ids": [9], "mine": [4]}]}) as pruned:
            assert kept_ids(pruned) == [0, 4]

    def test_special_ids_of_model_and_tokenizer_are_kept(self):
        class Tokenizer:
            all_special_ids = (50, 51, 999)

        model = bert(bos_token_id=17, eos_token_id=[18, 19], cls_token_id=-1)
        with Recipe(EmbeddingPruning())(model, data={"train": ROWS}, processor=Tokenizer()) as pruned:
            assert kept_ids(pruned) == sorted([0, 17, 18, 19, 50, 51, *KEPT])

    def test_a_stream_is_refused_unless_its_ids_are_given(self):
        hub = Dataset.from_list(ROWS).to_iterable_dataset()
        for rows in (Stream(), hub, iter(ROWS)):
            with pytest.raises(SettingError, match="cannot count the ids of train, a stream"):
                Recipe(EmbeddingPruning()).apply(bert(), data={"train": rows})
            data = {"train": rows, "validation": [{"input_ids": [20]}]}
            with Recipe(EmbeddingPruning(keep_ids=[11]))(bert(), data=data) as pruned:
                assert kept_ids(pruned) == [0, 11, 20]

    def test_nothing_is_pruned_where_all_rows_are_used(self):
        rows = [{"input_ids": list(range(V))}]
        with Recipe(EmbeddingPruning())(llama(tied=True), data={"train": rows}) as model:
            assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=1).shape == (1, 3)
            model.resize_token_embeddings(V)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "does not know which ids will come: give the tokenised data"),
            ({"train": []}, r"The data \(train\) holds no ids in input_ids: it is empty"),
            ({"train": [{"input_ids": []}]}, "it is empty"),
            ({"train": [{"text": "a"}]}, "rows of train have none of the columns input_ids, only text"),
            ({"train": Dataset.from_dict({"text": ["a"]})}, "rows of train have none of the columns input_ids, only"),
            ({"train": [[3, 4]]}, "needs rows that are mappings.*list"),
            ({"train": [{"input_ids": [3, V]}]}, f"hold the id {V}, but the embedding has {V} rows"),
            ({"train": [{"input_ids": [-2, 3]}]}, "hold the id -2"),
            (ROWS, "data must be rows by split"),
        ],
    )
    def test_data_that_cannot_be_used_is_refused(self, data, message):
        with pytest.raises(SettingError, match=message):
            Recipe(EmbeddingPruning()).apply(bert(), data=data)


class TestRefusals:
    def test_an_id_without_a_row_is_named_with_its_token(self):
        class Tokenizer:
            all_special_ids = ()

            def convert_ids_to_tokens(self, index: int) -> str:
                return f"word{index}"

        model = Recipe(EmbeddingPruning()).apply(bert(), data={"train": ROWS, "test": ROWS}, processor=Tokenizer())
        message = r"no row for the id 5 \('word5'\) \(and 1 more\).*saw \(train, test\)\. Give that data.*keep_ids"
        with pytest.raises(SettingError, match=message):
            model(input_ids=torch.tensor([[3, 6, 5]]))
        with pytest.raises(IndexError):  # as in any model
            model(input_ids=torch.tensor([[3, V]]))
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[3, -1]]))

    def test_generate_and_resizing_are_refused_while_pruned(self):
        model = Recipe(EmbeddingPruning(keep_ids=KEPT), small_lora(llama)).apply(llama())
        for call in (model.generate, model.base_model.model.generate):
            with pytest.raises(SettingError, match=r"generate\(\) needs every row.*Recipe.remove"):
                call(input_ids=torch.tensor([[3]]))
        with pytest.raises(SettingError, match=r"resize_token_embeddings\(\) needs every row"):
            model.base_model.model.resize_token_embeddings(V + 3)
        base = Recipe.remove(model)
        assert base.generate(torch.tensor([[3]]), max_new_tokens=1).shape == (1, 2)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"keep_ids": [-1]}, "keep_ids of embedding_pruning must be ids of 0 or more, got -1"),
            ({"keep_ids": [True]}, "must be ids of 0 or more, got True"),
            ({"columns": []}, "columns of embedding_pruning must name a column"),
        ],
    )
    def test_a_wrong_setting_is_named(self, settings, message):
        with pytest.raises(SettingError, match=message):
            EmbeddingPruning(**settings)

    def test_a_folder_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(SettingError, match="offload_folder of embedding_pruning must be a folder"):
            Recipe(EmbeddingPruning(keep_ids=[1], offload_folder=str(tmp_path / "none"))).apply(bert())

    def test_a_model_without_a_table_of_plain_numbers_is_refused(self):
        vit = ViTForImageClassification(
            ViTConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4)
        )
        recipe = Recipe(EmbeddingPruning(keep_ids=[1]))
        for model in (vit, nn.Linear(2, 2)):
            with pytest.raises(SettingError, match=r"needs an nn\.Embedding of plain numbers as the input"):
                recipe.apply(model)
        whole_numbers = bert()
        whole_numbers.bert.embeddings.word_embeddings.weight = nn.Parameter(
            torch.zeros(V, D, dtype=torch.int8), requires_grad=False
        )
        with pytest.raises(SettingError, match=r"needs an nn\.Embedding of plain numbers"):
            recipe.apply(whole_numbers)

    def test_a_padding_id_outside_of_the_table_is_refused(self):
        model = bert()
        model.config.pad_token_id = V + 2
        with pytest.raises(SettingError, match=f"pad_token_id is {V + 2}, but the embedding has only {V} rows"):
            Recipe(EmbeddingPruning(keep_ids=[1])).apply(model)

    def test_pruning_twice_and_undoing_nothing_are_refused(self):
        recipe = Recipe(EmbeddingPruning(keep_ids=KEPT))
        model = recipe.apply(bert())
        with pytest.raises(ValueError, match="has a recipe attached already"):
            recipe.apply(model)
        with (
            pytest.raises(SettingError, match="pruned already"),
            EmbeddingPruning(keep_ids=KEPT).attach(model),
        ):
            pass
        Recipe.remove(model)
        with pytest.raises(ValueError, match="No recipe is attached"):
            Recipe.remove(model)

    def test_a_recipe_names_it_in_text(self):
        recipe = Recipe.from_yaml("- embedding_pruning: {keep_ids: [3, 4]}\n- lora: {r: 2}")
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        with pytest.raises(SettingError, match="must be ids of 0 or more"):
            Recipe.from_list([{"embedding_pruning": {"keep_ids": [-3]}}])


def test_it_is_counted_on_meta_tensors():
    with torch.device("meta"):
        model = bert()
    with Recipe(EmbeddingPruning(keep_ids=KEPT))(model) as pruned:
        batch = {name: value.to("meta") for name, value in batches(model)[0].items()}
        del batch["attention_mask"]  # transformers reads its values
        pruned(**batch).loss.backward()
        assert pruned.get_input_embeddings().weight.grad.shape == (len(KEPT) + 1, D)
    assert model.get_input_embeddings().weight.shape == (V, D)


def count_apart(rank: int, file: str, told: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine = {"train": [{"input_ids": [[3, 8], [41, 3]][rank]}]}
    told.put(kept_ids(Recipe(EmbeddingPruning()).apply(bert(), data=mine)))
    torch.distributed.destroy_process_group()


def test_processes_with_different_shares_of_the_data_keep_the_same_rows(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    told = context.Queue()
    started = [context.Process(target=count_apart, args=(rank, str(tmp_path / "meet"), told)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        assert [told.get(timeout=60) for _ in started] == [[0, 3, 8, 41]] * 2
    finally:
        for process in started:
            process.join(30)


@pytest.mark.parametrize("name", ["minilm", "flan-t5-small"])
def test_a_packaged_model_gives_the_same_loss_and_gradients_with_fewer_rows(name):
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

    from shoestring import assets

    need(name)
    folder = assets.model_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reviews = data("rotten-tomatoes")["train"].select(range(64))
    kind = AutoModelForSequenceClassification if name == "minilm" else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    rows = reviews.map(lambda row: tokenizer(row["text"], max_length=32, truncation=True), remove_columns=["text"])
    batch = dict(tokenizer(reviews["text"][:5], max_length=32, truncation=True, padding=True, return_tensors="pt"))
    if name == "minilm":
        rows = rows.rename_column("label", "labels")
        batch["labels"] = torch.tensor(reviews["label"][:5])
    else:
        words = {0: tokenizer("bad").input_ids, 1: tokenizer("good").input_ids}
        rows = rows.map(lambda row: {"labels": words[row["label"]]}, remove_columns=["label"])
        batch["labels"] = torch.tensor([words[label] for label in reviews["label"][:5]])
    table = model.get_input_embeddings()
    size = table.num_embeddings
    expected = model(**batch).loss
    expected.backward()
    gradient = table.weight.grad.clone()
    model.zero_grad()
    with Recipe(EmbeddingPruning())(model, data={"train": rows}, processor=tokenizer) as pruned:
        ids = torch.tensor(kept_ids(pruned))
        assert table.num_embeddings == len(table.weight) == len(ids) < size / 10
        got = pruned(**batch).loss
        got.backward()
        assert torch.equal(got, expected)
        assert torch.equal(table.weight.grad, gradient[ids])
        with pytest.raises(SettingError, match=r"no row for the id \d+ \('.*ze.*'\)"):
            pruned(**{**batch, **tokenizer(["zebra"] * 5, return_tensors="pt")})
    assert table.num_embeddings == len(table.weight) == size
