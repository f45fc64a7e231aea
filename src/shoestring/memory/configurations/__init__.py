"""Model configurations by name, to plan a run of a well-known model whose files are not at hand.

Each is a file of this folder as `from_pretrained` reads a `config.json`: the fields that differ from the defaults of
its `model_type`. The size and the shape of the model are in it, and no weights. Names are those of the models' pages,
in lower case and without the owner: `llama-3.1-8b`, `qwen2.5-0.5b`, `bert-base` (uncased). Gemma 3 from 4b on takes
images; its text decoder alone has the ending `-text`. `dtype` is the one of the published files; for Gemma 2 of the
instruction-tuned ones.

Differs  Files of flan-t5 hold an output table of its own, which `from_pretrained` keeps; a T5 that is made from a
         configuration always ties it to the embeddings, whatever `tie_word_embeddings` says. So a flan-t5 that is made
         from here is smaller by vocab_size x d_model weights; `scale_decoder_outputs` is False where that is so.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import SettingError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The names of the configurations that come with the package, in order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def path_of(name: str) -> Path:
    """The file of a configuration.

    Raises SettingError if there is none of that name.
    """
    if name not in names():
        raise SettingError(f"There is no known configuration {name!r}. {did_you_mean(name.lower(), names())}")
    return FOLDER / f"{name}.json"


def load(name: str) -> "PretrainedConfig":
    """The configuration, as the class of its `model_type`.

    Raises SettingError if there is none of that name.

    >>> load("llama-3.1-8b").num_hidden_layers
    32
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path_of(name))
