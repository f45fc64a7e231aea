"""BitFit: which biases it finds, what it leaves alone, what it keeps for backward, added biases, files, refusals."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    TrainingArguments,
)

from shoestring import Ledger, Recipe, load
from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.recipe import attached_to
from shoestring.selection import BitFit
from shoestring.selection.bitfit import FILE
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, classifier, decoder
from shoestring.training import RecipeTrainer, RunSettings, train

BERT = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "attention.output.LayerNorm",
    "output.LayerNorm",
]


def test_in_bert_base_the_biases_are_as_many_as_the_paper_counts():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    chosen = BitFit().chosen(model)
    assert sum(p.numel() for p in chosen.values()) == 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768 + 768
    assert {n for n in chosen if ".layer.3." in n} == {f"encoder.layer.3.{part}.bias" for part in BERT}
    small = BitFit(biases=["query", "intermediate"]).chosen(model)
    assert sum(p.numel() for p in small.values()) == 12 * (768 + 3072)
    assert set(BitFit(biases=["rest"]).chosen(model)) == {"pooler.dense.bias"}
    parts = ["query", "key", "value", "attention_output", "intermediate", "output", "norm", "rest"]
    found = [set(BitFit(biases=[part]).chosen(model)) for part in parts]
    assert sum(map(len, found)) == len(chosen) == len(set().union(*found))


def test_names_that_only_look_like_biases_are_left_alone():
    model = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, vocab_size=20))
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    with pytest.raises(SettingError, match=r"finds no bias in T5EncoderModel.*name those in added"):
        Recipe(BitFit()).apply(model)
    model.bias_net = nn.Linear(2, 2, bias=False)
    with pytest.raises(SettingError, match="finds no bias"):
        Recipe(BitFit()).apply(model)


def trainer(model: nn.Module, folder, **settings) -> RecipeTrainer:
    given = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    args = TrainingArguments(str(folder), save_strategy="no", disable_tqdm=True, **{**given, **settings})
    return RecipeTrainer(model=model, args=args, train_dataset=CLASSIFIER.rows(count=8))


def test_frozen_weights_are_the_same_after_fifty_steps_with_weight_decay(tmp_path):
    base = classifier()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = Recipe(BitFit()).apply(base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if n.endswith(".bias") and "bert" in n} | {
        "classifier.weight",
        "classifier.bias",
    }
    trainer(model, tmp_path, max_steps=50, weight_decay=0.1).train()
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # whose gradient is what rounding leaves of zero
            assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_gradients_are_those_of_the_plain_model_and_next_to_none_for_keys():
    plain = classifier().double().eval()
    plain(**CLASSIFIER.batch()).loss.backward()
    want = {name: p.grad for name, p in plain.named_parameters()}
    model = Recipe(BitFit()).apply(classifier().double().eval())
    model(**CLASSIFIER.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-12, atol=1e-14)
            if "key" in name:
                query = want[name.replace("key", "query")]
                assert parameter.grad.norm() < 1e-6 * query.norm()


def saved_bytes(*techniques) -> int:
    with Valueless() as mode:
        model = BertModel(BertConfig(num_hidden_layers=2), add_pooling_layer=False).train()
        model = Recipe(*techniques).apply(model) if techniques else model
        with Ledger(model) as ledger:
            model(input_ids=mode.from_tensor(torch.zeros(8, 128, dtype=torch.long)))[0].sum().backward()
        return ledger.report().saved_bytes


def test_less_is_kept_for_backward_than_by_full_tuning_and_by_lora_on_all_layers():
    ours = saved_bytes(BitFit())
    assert ours <= 0.75 * saved_bytes()
    assert ours <= 0.75 * saved_bytes(LoraConfig(r=8, target_modules=["query", "key", "value", "dense"]))


def test_a_file_holds_the_biases_and_gives_the_trained_model(tmp_path):
    base = classifier()
    model = Recipe(BitFit(train_head=False)).apply(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    want = model.eval()(**CLASSIFIER.batch()).logits
    attached_to(model).save(tmp_path)
    header = 130 * sum(p.requires_grad for p in model.parameters())
    assert (tmp_path / "trained.safetensors").stat().st_size <= 4 * count + header
    assert torch.equal(load(classifier().eval(), tmp_path)(**CLASSIFIER.batch()).logits, want)


def test_at_the_size_of_bert_base_a_file_is_three_percent_larger_than_its_numbers_at_most(tmp_path):
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig())
    for name in BitFit().chosen(base):
        module = base.get_submodule(name.removesuffix(".bias"))
        module.bias = nn.Parameter(torch.randn(module.bias.shape))
    model = Recipe(BitFit(train_head=False)).apply(base)
    attached_to(model).save(tmp_path)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 102_912
    assert 1.02 < (tmp_path / "trained.safetensors").stat().st_size / (4 * count) < 1.03  # 98 names, as `Differs` says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "beside LoRA"])
def test_added_biases_start_at_zero_train_are_saved_and_go(dtype, lora, tmp_path):
    def recipe() -> Recipe:
        beside = [LoraConfig(r=2, target_modules=["q_proj"])] if lora else []
        return Recipe(*beside, BitFit(added=["q_proj", "down_proj"]))

    base = decoder().to(dtype).eval()
    names = [name for name, _ in base.named_parameters()]
    layers = [module for module in base.modules() if isinstance(module, nn.Linear)]
    plain = base(**DECODER.batch()).logits
    model = recipe().apply(base)
    assert torch.equal(model.eval()(**DECODER.batch()).logits, plain)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 4
    assert sum(p.numel() for p in biases.values()) == 2 * (24 + 24)
    model(**DECODER.batch()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in biases.values())
    with torch.no_grad():
        for bias in biases.values():
            bias.normal_()
    want = model(**DECODER.batch()).logits
    attached_to(model).save(tmp_path)
    again = load(decoder().to(dtype).eval(), tmp_path)
    assert torch.equal(again.eval()(**DECODER.batch()).logits, want)
    Recipe.remove(model)
    assert [name for name, _ in base.named_parameters()] == names
    assert [module for module in base.modules() if isinstance(module, nn.Linear)] == layers
    assert all(layer.bias is None for layer in layers)
    assert torch.equal(base(**DECODER.batch()).logits, plain)
    (next(tmp_path.rglob(FILE))).unlink()
    with pytest.raises(SettingError, match=r"holds no added_biases"):
        load(decoder().to(dtype), tmp_path)


def test_added_biases_of_another_model_are_refused(tmp_path):
    model = Recipe(BitFit(added=["q_proj"])).apply(decoder())
    attached_to(model).save(tmp_path)
    with pytest.raises(SettingError, match=r"another model: model\.layers\.2\.self_attn\.q_proj\.bias is not the same"):
        load(decoder(num_hidden_layers=3), tmp_path)


def test_one_tensor_for_query_key_and_value_trains_whole_or_not():
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    chosen = BitFit(biases=["key", "query", "value"]).chosen(model)
    assert set(chosen) == {"h.0.attn.c_attn.bias"}
    assert set(BitFit(biases=["output"]).chosen(model)) == {"h.0.mlp.c_proj.bias"}
    for whole, idle in (
        (model, set()),
        (classifier(), {f"bert.encoder.layer.{i}.attention.self.key.bias" for i in (0, 1)}),
    ):
        assert attached_to(Recipe(BitFit()).apply(whole)).idle_parameters() == idle
    with pytest.raises(SettingError, match=r"h\.0\.attn\.c_attn holds the biases of key, query, value in one tensor"):
        BitFit(biases=["query"]).chosen(model)


def test_of_what_predicts_words_only_biases_train():
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Recipe(BitFit()).apply(BertForMaskedLM(BertConfig(**small, vocab_size=20)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith("bias") for name in trained)
    assert {"cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.bias"} <= trained


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match=r"no part 'querry'. Did you mean 'query'"):
        BitFit(biases=["querry"])
    with pytest.raises(SettingError, match="biases of bitfit must be 'all' or a list of query"):
        BitFit(biases="query")
    with pytest.raises(SettingError, match="biases of bitfit must be 'all' or a list of query"):
        BitFit(biases=[])
    with pytest.raises(SettingError, match="finds no bias of query in LlamaForCausalLM"):
        Recipe(BitFit(biases=["query"])).apply(decoder())
    with pytest.raises(SettingError, match="added of bitfit: the model has no module 'query'"):
        Recipe(BitFit(added=["query"])).apply(decoder())
    with pytest.raises(SettingError, match=r"added of bitfit names bert.*query, which has a bias already"):
        Recipe(BitFit(added=["query"])).apply(classifier())
    model = classifier()
    model.bert.pooler.dense.bias = nn.Parameter(torch.zeros(24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SettingError, match=r"bitfit cannot train bert\.pooler\.dense\.bias, a Parameter of int8"):
        Recipe(BitFit()).apply(model)
    assert model.bert.pooler.dense.bias.dtype == torch.int8


def reviews(recipe: list, folder, **fields) -> RunSettings:
    need("minilm", "rotten-tomatoes")
    rows = {"max_train_rows": 32, "max_eval_rows": 8}
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, **rows},
            "recipe": recipe,
            "train": {
                "max_steps": 32,
                "per_device_train_batch_size": 16,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "eval_strategy": "no",
                "seed": 0,
                **fields,
            },
            "output_dir": str(folder),
        }
    )


@pytest.mark.slow
def test_biases_of_the_packaged_encoder_learn_a_few_reviews(tmp_path):
    report = train(reviews([{"bitfit": {}}], tmp_path / "run", learning_rate=1e-2))
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-4:]) / 4 < 0.8 * sum(losses[:2]) / 2, losses


@pytest.mark.slow
def test_added_biases_leave_the_packaged_decoder_as_it_was():
    from transformers import AutoModelForCausalLM

    from shoestring import assets

    need("smollm2")
    base = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2"))
    ids = torch.arange(40, 80).view(2, 20)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        model = Recipe(BitFit(added=["q_proj", "v_proj", "up_proj", "down_proj"])).apply(base)
        assert torch.equal(model(input_ids=ids).logits, plain)
