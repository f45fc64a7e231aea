"""Writing a converted model as the files `from_pretrained` reads, and making sure that it reads them all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


def write_model(
    folder: Path, model_class: "type[PreTrainedModel]", config: "PreTrainedConfig", weights: "dict[str, Tensor]"
) -> None:
    """Writes configuration and weights, and opens them once.

    weights: by the names of the model's published checkpoints. Those stay; the names inside a model change between
        releases of transformers, which maps the one to the other when it loads.

    Raises RunFailed if the opened model lacks a weight, knows one of them not at all, or in another shape.
    """
    from safetensors.torch import save_file

    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = model_class.from_pretrained(folder, output_loading_info=True)
    _, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise RunFailed(f"The converted {model_class.__name__} does not fit this release of transformers: {wrong}")
