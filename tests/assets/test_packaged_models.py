"""The packaged models: converted here and now, opened as users open them, and asked something they must know."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from shoestring import assets
from shoestring.assets import ctranslate2, dinov2, gguf, t5, whisper
from shoestring.errors import SettingError
from shoestring.testing.assets import need


def installed(name):
    """The folder of the carrier's files."""
    need(name)
    return assets.cache_folder() / name / "files"


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def size_on_disk(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    dinov2.convert(installed("dinov2-small"), folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5.convert(installed("flan-t5-small"), folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    whisper.convert(installed("whisper-tiny-en"), folder)
    return folder


def test_minilm_puts_paraphrases_together():
    need("minilm")
    folder = assets.model_folder("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    assert count(model) == 22_713_216
    texts = ["A man is playing a guitar.", "Someone plays an acoustic guitar.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        sentences = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    alike = torch.nn.functional.cosine_similarity(sentences[0], sentences[1:])
    assert alike[0] > 0.7
    assert abs(alike[1]) < 0.2


def test_minilm_takes_a_classification_head():
    need("minilm")
    model = AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm"), num_labels=3)
    assert model.classifier.weight.shape == (3, 384)
    assert next(model.parameters()).dtype == torch.float32


def test_smollm2_knows_the_capital_of_france():
    need("smollm2")
    folder = assets.model_folder("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert count(model) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert next(model.parameters()).dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."


def test_smollm2_keeps_its_chat_template_and_length():
    need("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("smollm2"))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_a_converted_gguf_is_what_transformers_reads_from_it(tmp_path):
    files = installed("smollm2")
    gguf.convert_smollm2(files, tmp_path)
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    expected = AutoModelForCausalLM.from_pretrained(files, gguf_file=file, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizers = [AutoTokenizer.from_pretrained(files, gguf_file=file), AutoTokenizer.from_pretrained(tmp_path)]
    text = "Tokens, 12.5 % of them <|im_end|>\n\n  größer?"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_dinov2_computes_what_its_onnx_graph_computes(dinov2_folder):
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = AutoModel.from_pretrained(dinov2_folder).eval()
    assert count(model) == 22_056_576
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(picture).last_hidden_state

    exported = onnx.load(str(installed("dinov2-small") / "vit_s_focus.onnx"))
    graph, backbone = exported.graph, "/backbone/layernorm/Add_1_output_0"
    end = next(place for place, node in enumerate(graph.node) if backbone in node.output)
    del graph.node[end + 1 :]
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(backbone, onnx.TensorProto.FLOAT, None))
    (expected,) = ReferenceEvaluator(exported).run(None, {graph.input[0].name: picture.numpy()})
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_dinov2_takes_other_sizes_and_prepares_pictures(dinov2_folder):
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(dinov2_folder)
    assert processor(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
    model = AutoModel.from_pretrained(dinov2_folder)
    assert model(torch.zeros(1, 3, 98, 98)).last_hidden_state.shape == (1, 1 + 7 * 7, 384)


def test_flan_t5_translates_into_german(t5_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(t5_folder), AutoModelForSeq2SeqLM.from_pretrained(t5_folder)
    assert count(model) == 76_961_152
    prompt = tokenizer("translate English to German: The house is wonderful.", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20)[0]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Das Haus ist wunderbar."


def test_flan_t5_cuts_texts_at_its_own_length_only_when_asked(t5_folder):
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    assert len(tokenizer("word " * 700).input_ids) == 701
    assert len(tokenizer("word " * 700, truncation=True).input_ids) == 512


def test_flan_t5_can_be_saved_and_opened_again(t5_folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not again.config.scale_decoder_outputs
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.shared.weight)


def test_whisper_has_its_shapes(whisper_folder):
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    assert count(model) == 37_760_256
    assert model.proj_out.weight.data_ptr() == model.model.decoder.embed_tokens.weight.data_ptr()
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.d_model) == (4, 4, 384)
    processor = WhisperProcessor.from_pretrained(whisper_folder)
    features = processor(torch.zeros(16_000).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 3000)
    labels = processor.tokenizer(" hello").input_ids
    special = processor.tokenizer.convert_ids_to_tokens([labels[0], labels[1], labels[-1]])
    assert special == ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
    with torch.no_grad():
        logits = model(input_features=features, labels=torch.tensor([labels])).logits
    assert logits.shape == (1, len(labels), 51_864)
    assert logits.isfinite().all()


def test_whisper_hears_nothing_in_silence(whisper_folder):
    processor = WhisperProcessor.from_pretrained(whisper_folder)
    model = WhisperForConditionalGeneration.from_pretrained(whisper_folder)
    features = processor(torch.zeros(32_000).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    ids = model.generate(features, max_new_tokens=8)
    assert len(processor.batch_decode(ids, skip_special_tokens=True)[0].split()) <= 2


def test_whisper_loses_only_biases_that_are_zero(whisper_folder):
    source = ctranslate2.read_tensors(installed("whisper-tiny-en") / "model.bin")
    for layer in range(4):
        for side in ("encoder", "decoder"):
            assert not source[f"{side}/layer_{layer}/self_attention/linear_0/bias"].chunk(3)[1].any()
        assert not source[f"decoder/layer_{layer}/attention/linear_1/bias"].chunk(2)[0].any()
    weights = load_file(whisper_folder / "model.safetensors")
    fused = source["encoder/layer_3/self_attention/linear_0/weight"]
    names = [f"model.encoder.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]
    assert torch.equal(torch.cat([weights[name] for name in names]), fused)


def test_another_version_of_ctranslate2_is_refused(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes((9).to_bytes(4, "little"))
    with pytest.raises(SettingError, match="version 9; version 6 can be read"):
        ctranslate2.read_tensors(file)


def test_the_catalogue_knows_how_large_conversions_are(dinov2_folder, t5_folder, whisper_folder):
    for name, folder in [
        ("dinov2-small", dinov2_folder),
        ("flan-t5-small", t5_folder),
        ("whisper-tiny-en", whisper_folder),
    ]:
        assert size_on_disk(folder) == pytest.approx(assets.get(name).converted_bytes, rel=0.001)
