"""Where in a transformer block a method can sit: after attention, after the feed-forward part, on the residual stream.

Blocks are found in the model by the modules they have; what the modules of one layout are called is data, one row of
`LAYOUTS`. A block that no row describes is refused rather than guessed at: the same names stand for a norm before a
sub-layer in one model and after it in another.

pre-LN    x -> x + attention(LN(x)) -> x + ffn(LN(x))    entry: the norm before the ffn
post-LN   x -> LN(x + attention(x)) -> LN(x + ffn(x))    entry: the first linear of the ffn; last_norm: the second LN
"""

import re
from dataclasses import dataclass, replace

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

SCALES_OF_RESIDUAL = ("residual_scale", "scaling_factor", "depth_scaled_residual_add", "input_residual")
"""What blocks have whose output is not stream + part: MiniCPM3, ESMC, Beam, Doge."""


@dataclass(frozen=True)
class Layout:
    """The names of the parts of one sort of block, relative to the block.

    attention: the module whose output the block adds to the residual stream after attention.
    feedforward: the same for the feed-forward part.
    entry: the module whose input is the residual stream that the feed-forward part is added to.
    norms: all direct children that normalise or scale, those of cross-attention aside; others mean another layout.
    last_norm: post-LN blocks only: the norm of the sum after the feed-forward part.
    cross_attention: as `attention`, for attention to an encoder; blocks without it match as well.
    classes: regular expression of class names, where module names alone do not tell the layout.
    attribute: a name and the value it must have on the block; None as value: the block must not have it.
    parallel: attention and feed-forward part are added to the stream together, so that no sum stands between them.
    """

    attention: str
    feedforward: str
    entry: str
    norms: str = ""
    last_norm: str = ""
    cross_attention: str = ""
    classes: str = ".*"
    attribute: tuple[str, object] = ("residual_multiplier", None)
    parallel: bool = False

    def describes(self, block: nn.Module) -> bool:
        """Whether `block` is laid out like this."""
        name, value = self.attribute
        if any(hasattr(block, scale) for scale in SCALES_OF_RESIDUAL):
            return False
        children = {n for n, _ in block.named_children() if re.search("norm|^ln_|scale", n)}
        return (
            all(has_module(block, part) for part in (self.attention, self.feedforward, self.entry, self.last_norm))
            and {n for n in children if not re.search("cross_?attn|encoder_attn", n)} == set(self.norms.split())
            and re.fullmatch(self.classes, type(block).__name__) is not None
            and getattr(block, name, None) == value
        )


_SEQ2SEQ = Layout(
    "self_attn.out_proj",
    "fc2",
    "final_layer_norm",
    "self_attn_layer_norm final_layer_norm",
    cross_attention="encoder_attn.out_proj",
)
_SEQ2SEQ_POST = replace(_SEQ2SEQ, entry="fc1", last_norm="final_layer_norm")
_NEOX = Layout(
    "attention.dense",
    "mlp.dense_4h_to_h",
    "post_attention_layernorm",
    "input_layernorm post_attention_layernorm",
)

LAYOUTS = (
    # BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa
    Layout(
        "attention.output.dense",
        "output.dense",
        "intermediate.dense",
        last_norm="output.LayerNorm",
        cross_attention="crossattention.output.dense",
        classes="(?!IBert|MobileBert).*",  # whose layers give two tensors, or stand in a narrower stream
    ),
    # MPNet
    Layout("attention.attn.o", "output.dense", "intermediate.dense", last_norm="output.LayerNorm"),
    # DistilBERT
    Layout(
        "attention.out_lin", "ffn.lin2", "ffn.lin1", "sa_layer_norm output_layer_norm", last_norm="output_layer_norm"
    ),
    # ALBERT
    Layout("attention.dense", "ffn_output", "ffn", "full_layer_layer_norm", last_norm="full_layer_layer_norm"),
    # ModernBERT
    Layout("attn.Wo", "mlp.Wo", "mlp_norm", "attn_norm mlp_norm"),
    # ViT; its modules were renamed within transformers 5
    Layout("attention.o_proj", "mlp.fc2", "layernorm_after", "layernorm_before layernorm_after", classes="ViTLayer"),
    Layout(
        "attention.output.dense",
        "output.dense",
        "layernorm_after",
        "layernorm_before layernorm_after",
        classes="(ViT|ViTMAE|ViTMSN|DeiT)Layer",
    ),
    # DINOv2: after layer scale
    Layout("layer_scale1", "layer_scale2", "norm2", "norm1 norm2 layer_scale1 layer_scale2"),
    # CLIP, SigLIP
    Layout("self_attn.out_proj", "mlp.fc2", "layer_norm2", "layer_norm1 layer_norm2"),
    # GPT-2
    Layout(
        "attn.c_proj",
        "mlp.c_proj",
        "ln_2",
        "ln_1 ln_2",
        cross_attention="crossattention.c_proj",
        classes=".+Block",  # and not Block, of the first GPT, whose norms come after
    ),
    # Llama, Mistral, Qwen, SmolLM, Gemma, Phi-3
    Layout(
        "self_attn.o_proj",
        "mlp.down_proj",
        "post_attention_layernorm",
        "input_layernorm post_attention_layernorm",
    ),
    # Gemma 2 and 3: norms before and after each part
    Layout(
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm",
    ),
    # OLMo 2: norms after each part only, inside the residual branch
    Layout(
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp.gate_proj",
        "post_attention_layernorm post_feedforward_layernorm",
    ),
    # Phi and GPT-NeoX: attention and feed-forward part side by side
    Layout("self_attn.dense", "mlp.fc2", "input_layernorm", "input_layernorm", parallel=True),
    replace(_NEOX, attribute=("use_parallel_residual", True), parallel=True),
    replace(_NEOX, attribute=("use_parallel_residual", False)),
    # T5 encoder and decoder
    Layout("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", "layer.1.layer_norm"),
    Layout(
        "layer.0.SelfAttention.o",
        "layer.2.DenseReluDense.wo",
        "layer.2.layer_norm",
        cross_attention="layer.1.EncDecAttention.o",
    ),
    # one set of names for pre-LN and post-LN: the class tells, in OPT a setting
    replace(_SEQ2SEQ, classes="(Whisper|MBart|Pegasus|Blenderbot|M2M100|Speech2Text)(En|De)coderLayer"),
    replace(_SEQ2SEQ_POST, classes="(Bart|PLBart|Marian|BlenderbotSmall)(En|De)coderLayer"),
    replace(_SEQ2SEQ, classes="OPTDecoderLayer", attribute=("do_layer_norm_before", True)),
    replace(_SEQ2SEQ_POST, classes="OPTDecoderLayer", attribute=("do_layer_norm_before", False)),
)


# the layers that read what enters attention, and what enters the feed-forward part, by the end of their names
ATTENTION_INPUT = re.compile(
    r"(.*\.)?(q|k|v|query|key|value|[qkv]_(proj|lin)|in_proj|(query|key|value)_proj|qkv|qkv_proj|Wqkv|c_attn|query_key_value|(q|kv)_a_proj(_with_mqa)?)"
)
FEEDFORWARD_INPUT = re.compile(
    r"(.*\.)?(fc1|c_fc|fc_in|lin1|Wi|wi|wi_[01]|w[13]|(gate|up|gate_up)_proj|intermediate[._]dense|dense_h_to_4h|ffn"
    r"|weights_in)"
)
CROSS_ATTENTION = re.compile(r".*(cross_?att|encoder_attn|EncDecAttention).*")


def input_group(name: str) -> str:
    """What a layer of this dotted name reads: the same words for all layers of one parent that read the same.

    Layers with no name known to read what enters attention or the feed-forward part are each by themselves, and so
    are those of cross-attention, which read two things. Wrappers of adapters leave no trace in the words.
    """
    name = name.replace("base_model.model.", "").replace(".base_layer", "")
    parent = name.rpartition(".")[0]
    for part, pattern in (("attention", ATTENTION_INPUT), ("feedforward", FEEDFORWARD_INPUT)):
        if pattern.fullmatch(name) and not CROSS_ATTENTION.fullmatch(name):
            return f"{parent}.{part}_input"
    return name


def input_layers(model: nn.Module) -> dict[str, int]:
    """The layers that read what enters attention or the feed-forward part, with the index of their block."""
    return {
        f"{stack}.{index}.{name}": index
        for stack, blocks in stacks(model)
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if input_group(name) != name and hasattr(module, "weight")  # and not FFN, a module around its layers
    }


def has_module(module: nn.Module, name: str) -> bool:
    """Whether `module` has a descendant of that dotted name; the empty name is the module itself."""
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def layout_of(block: nn.Module) -> Layout | None:
    """The layout of a block, or None where no row of `LAYOUTS` describes it."""
    return next((layout for layout in LAYOUTS if layout.describes(block)), None)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module, Layout]]:
    """Every block of a known layout, with its dotted name, in order.

    Raises ValueError if there is none, naming the blocks the model has and their modules.
    """
    found = []
    for name, stack in stacks(model):
        for index, block in enumerate(stack):
            if (layout := layout_of(block)) is not None:
                found.append((f"{name}.{index}" if name else str(index), block, layout))
    if found:
        return found
    longest = max(stacks(model), key=lambda item: len(item[1]), default=None)
    what = "has no list of equal blocks"
    if longest is not None:
        block = longest[1][0]
        parts = ", ".join(n for n, m in block.named_modules() if n and not list(m.children()))
        what = f"is made of {type(block).__name__}, a block of unknown layout with the modules {parts}"
    raise ValueError(
        f"{type(model).__name__} {what}. Set target_modules to the modules to adapt and, if the form reads the "
        "residual stream, reads to the module whose input that is."
    )


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Every list of blocks of one class, with its dotted name; encoder and decoder apart."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]


def task_head(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside of the pretrained part of a transformers model.

    None of a model that predicts words: it was pretrained with all that stands before its output embeddings.
    """
    backbone = getattr(model, "base_model", model)
    if backbone is model:  # it does not say what of it is pretrained, as CLIP with a classifier does not
        named = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
        return [p for head in named if isinstance(head, nn.Module) for p in head.parameters()]
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None and getter() is not None:
        return []
    known = {id(p) for p in backbone.parameters()}
    return [p for p in model.parameters() if id(p) not in known]


def freeze_but_head(model: nn.Module, train_head: bool) -> None:
    """Freeze all parameters but those of the head that train; these as well unless `train_head`."""
    head = {id(p) for p in task_head(model)} if train_head else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in head)


def place_in_stack(model: nn.Module, key: str) -> tuple[str, int, int] | None:
    """Where the module `key` is in the outermost list of blocks around it, of whatever layout they are.

    The name of the list, the index of the block and the number of blocks; None where no list is around it.
    """
    parts = key.split(".")
    for length in range(1, len(parts)):
        name, index = ".".join(parts[:length]), parts[length]
        if index.isdigit() and isinstance(stack := model.get_submodule(name), nn.ModuleList):
            return name, int(index), len(stack)
    return None


def block_around(model: nn.Module, key: str) -> tuple[str, Layout] | None:
    """The name and layout of the block that the module `key` belongs to; None where its layout is unknown."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        if (layout := layout_of(model.get_submodule(name))) is not None:
            return name, layout
    return None
