r"""Unfreeze: whole blocks and norms of the pretrained model train, and what stands beside it in the recipe.

Source   a part of ExPLoRA: Khanna, Irgau, Lobell, Ermon 2025, arXiv:2406.10973; alone, the usual partial fine-tuning
Update   all weights of the blocks U, all weights of norms, and of the modules named; every other one stays
Trains   for a ViT with blocks of width d, U of u of its L blocks, LoRA of rank r on query and value beside it:
         u (12 d^2 + 13 d) + (L - u) 4 r d, and of the norms outside of U 4 d a block and 2 d after the last
Costs    gradient and optimizer state of what trains
Differs  An adapter inside a block of U would learn what the block's own weights learn: it keeps its start.
         Weights train in place: taken off, the recipe leaves what they learned in them. Of a tiny encoder LoRA alone
         and the last block alone were as good as both (docs/results; probes 0.639, 0.626 and 0.644), where the paper
         has both ahead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..blocks.stacks import Stack, find_stacks
from ..errors import SettingError
from ..norms import is_norm
from ..targets import targeted
from ..technique import register_technique
from .base import Selection, named_parameters, pretrained_modules


@register_technique
@dataclass
class Unfreeze(Selection):
    """Blocks train whole, by their index; norms and other modules too, where asked.

    blocks: indices in each stack of transformer blocks, of which an encoder-decoder has two; -1 is the last one. With
        none, only the new head trains: a linear probe.
    norms: whether every norm trains.
    modules: names or ends of names of modules that train whole beside those, such as "patch_embeddings".
    """

    name: ClassVar[str] = "unfreeze"

    blocks: list[int] = field(default_factory=lambda: [-1])
    norms: bool = False
    modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if twice := sorted({index for index in self.blocks if self.blocks.count(index) > 1}):
            raise SettingError(f"blocks of {self.name} names block {twice[0]} twice; give each one once.")

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Train what is chosen; adapters in blocks that train whole keep their start."""
        with super().attach(model) as inner:
            chosen = {id(p) for p in self.chosen(model).values()}
            for block in self._blocks(model):
                for parameter in block.parameters():
                    parameter.requires_grad_(id(parameter) in chosen)
            yield inner

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of the blocks, norms and modules.

        Raises SettingError if nothing would train, or if the model has no such block or module.
        """
        modules = dict(pretrained_modules(model))
        whole = self._blocks(model)
        if self.modules:
            whole += targeted(modules, self.modules, None, self.name).values()
        if self.norms:
            whole += [module for module in modules.values() if is_norm(module)]
        wanted = {part for module in whole for part in module.modules()}.intersection(modules.values())
        found = {name: p for name, module, _, p in named_parameters(model) if module in wanted}
        if not found and not any(p.requires_grad for p in model.parameters()):
            raise SettingError(
                f"{self.name} has nothing to train: it names no blocks, norms or modules, and there is no new head. "
                "Set blocks, such as [-1] for the last one."
            )
        return found

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks named, of every stack.

        Raises SettingError if there are no blocks, a stack has no such block, or one block is named from both ends.
        """
        found: list[nn.Module] = []
        for stack in self._stacks(model) if self.blocks else ():
            count = len(stack)
            places: dict[int, int] = {}
            for index in self.blocks:
                if not -count <= index < count:
                    raise SettingError(
                        f"blocks of {self.name} must be from {-count} to {count - 1}, since {stack.name} has {count} "
                        f"blocks, got {index}."
                    )
                if (other := places.setdefault(index % count, index)) != index:
                    raise SettingError(
                        f"blocks of {self.name} names one block of {stack.name} twice, as {other} and as {index}; give "
                        "it once."
                    )
            found += [stack.blocks[place] for place in sorted(places)]
        return found

    def _stacks(self, model: nn.Module) -> list[Stack]:
        try:
            return find_stacks(model)
        except SettingError as error:
            raise SettingError(f"{error} Set blocks of {self.name} to [], and name modules, or set norms.") from error
