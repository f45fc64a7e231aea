r"""Token windows: the exact gradients of long sequences, with the activations of one window of tokens at a time.

Source   Oliaro et al., FlexLLM, arXiv:2402.18789: token-level forward and backward, derived anew
Update   of a window [a, b) with queries Q, P = softmax(c Q K[:b]^T + mask), dP = dO V[:b]^T, D = rowsum(P dP):
         dS = P (dP - D), dV[:b] += P^T dO, dK[:b] += c dS^T Q, then dX[a:b] from dQ = c dS K[:b], dK[a:b] and dV[a:b];
         windows last to first. Where tokens see later ones, dX gets its part from dK and dV after all windows
Shapes   X [batch, tokens, width], K and V [batch, kv_heads, tokens, head_width]
Trains   what trained before, with the gradients it had
Costs    layer_major keeps X of each block, and while one is in backward has its K, V, their gradients in float32 and
         the activations of a window. window_major keeps K and V of all blocks, in backward has their gradients too,
         and the activations of a window in all blocks. Blocks run again in backward: a third of a step of full tuning,
         half of one of LoRA. Cross-attention computes keys and values of the encoder's states once a window
Differs  layer_major computes K and V of a block again from X, where the paper keeps them (`keep_keys`). Dropout of each
         window draws from a seed of its own: one number a block, where the paper's form needs a state a window
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..technique import Advised, Phase, Technique, register_technique
from .base import BlockTechnique, Pass
from .stacks import BlockCall, Stack, refuse_several_devices, refuse_token_mixing
from .window_budget import bytes_of, tokens_within
from .windowed_blocks import WindowedBlocks, sees_later

DEFAULT_TOKENS = 256


@register_technique
@dataclass(kw_only=True)
class TokenWindows(BlockTechnique):
    """Runs blocks over windows of tokens, forward and backward; gradients are those of the whole sequence.

    window_tokens: tokens in a window, at least 1; 256 if neither it nor memory_budget is given.
    memory_budget: bytes, or text such as "2GiB", that the window is chosen for. It covers what the blocks keep and have
        at their peak, not weights, their gradients, embedding, head and loss.
    schedule: "layer_major" takes all windows through a block before the next block; "window_major" takes a window
        through all blocks before the next window, in causal stacks (an encoder beside them stays layer by layer).
    keep_keys: keep keys and values in layer_major, for up to a tenth less time.

    Raises SettingError for other values, and in the first step where a budget is too small for the batch.
    """

    name: ClassVar[str] = "token_windows"
    advised = (Advised(40, "blocks run over windows of tokens: exact, about half as much time again"),)
    graph_in_blocks: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    handles_attention = True

    window_tokens: int | None = None
    memory_budget: int | str | None = None
    schedule: Literal["layer_major", "window_major"] = "layer_major"
    keep_keys: bool = False

    def __post_init__(self) -> None:
        if self.window_tokens is not None and self.window_tokens < 1:
            raise SettingError(f"window_tokens of token_windows must be at least 1, got {self.window_tokens}.")
        if self.schedule not in ("layer_major", "window_major"):
            raise SettingError(f"schedule of token_windows must be layer_major or window_major, got {self.schedule!r}.")
        if self.memory_budget is not None:
            bytes_of(self.memory_budget, "memory_budget of token_windows")
            if self.window_tokens is not None:
                raise SettingError("window_tokens and memory_budget of token_windows both set the window; give one.")
        self._chosen: dict[tuple[Any, ...], tuple[int, int]] = {}  # window and kept bytes by place and shape of batch

    @property
    def runs_whole_stacks(self) -> bool:
        """Whether windows go through all blocks of a stack."""
        return self.schedule == "window_major"

    def check_recipe(self, others: Sequence[Technique]) -> None:
        for other in others:
            if other.phase == Phase.RECOMPUTATION:
                raise SettingError(f"token_windows runs blocks again in backward by itself; leave {other.name} out.")

    def check(self, model: nn.Module, stacks: list[Stack]) -> None:
        for stack in stacks:
            refuse_token_mixing(stack, self.name)
            refuse_several_devices(stack, self.name)
            _refuse_dropped_paths(stack)
        if self.schedule == "layer_major":
            return
        if not any(stack.causal for stack in stacks):
            raise SettingError(
                "schedule window_major of token_windows needs blocks in which tokens see earlier ones only, but those "
                f"of {stacks[0].name} see all; use schedule='layer_major'."
            )
        dropped = [
            name
            for name, value in vars(getattr(model, "config", None) or object).items()
            if "layerdrop" in name and isinstance(value, float) and value > 0
        ]
        if dropped:
            raise SettingError(
                f"token_windows cannot leave out blocks in window_major; set {dropped[0]} of the model to 0."
            )

    def begin(self, current: Pass) -> None:
        current.state = {}  # bytes that each stack keeps

    def run(self, stack: Stack, call: BlockCall) -> Tensor:
        blocks = WindowedBlocks(stack, [call], self._tokens(stack, [call]), self.keep_keys)
        return blocks.run()

    def run_stack(self, stack: Stack, calls: list[BlockCall]) -> Tensor:
        hidden = calls[0].hidden
        lowest = len(calls) if not stack.causal else _lowest_trained(stack, hidden)
        for call in calls[:lowest]:
            hidden = self.run(stack, replace(call, hidden=hidden))
        if lowest == len(calls):
            return hidden
        calls = [replace(calls[lowest], hidden=hidden), *calls[lowest + 1 :]]
        if stack.causal and any(map(sees_later, calls)):
            raise SettingError(
                f"schedule window_major of token_windows got an attention_mask by which tokens of {stack.name} see "
                "later ones; use schedule='layer_major'."
            )
        return WindowedBlocks(stack, calls, self._tokens(stack, calls)).run()

    def _tokens(self, stack: Stack, calls: list[BlockCall]) -> int:
        """Tokens in a window: as set, or as the budget allows."""
        if self.memory_budget is None:
            return self.window_tokens or DEFAULT_TOKENS
        hidden = calls[0].hidden
        trains = hidden.requires_grad or _lowest_trained(stack, hidden) <= calls[-1].index
        if not trains or not torch.is_grad_enabled():
            return DEFAULT_TOKENS
        assert self.current is not None
        before = sum(size for name, size in self.current.state.items() if name != stack.name)
        place = (stack.name, calls[0].index, len(calls), hidden.shape, hidden.dtype, before)
        if place not in self._chosen:
            measured = WindowedBlocks(stack, calls, hidden.shape[1], self.keep_keys)
            num_blocks = len(stack) - min(_lowest_trained(stack, hidden), calls[0].index)

            def bytes_of_window(tokens: int) -> int:
                peak = measured.peak_of_window(tokens)
                return before + measured.kept_bytes(num_blocks) + measured.backward_bytes() + peak

            budget = bytes_of(self.memory_budget, "memory_budget of token_windows")
            tokens = tokens_within(budget, hidden.shape[1], bytes_of_window)
            self._chosen[place] = tokens, measured.kept_bytes(num_blocks)
        tokens, self.current.state[stack.name] = self._chosen[place]
        return tokens


def _lowest_trained(stack: Stack, hidden: Tensor) -> int:
    """The first block that gradients reach; the number of blocks if there is none."""
    if hidden.requires_grad:
        return 0
    trained = (i for i, block in enumerate(stack.blocks) if any(p.requires_grad for p in block.parameters()))
    return next(trained, len(stack))


def _refuse_dropped_paths(stack: Stack) -> None:
    for name, module in stack.blocks.named_modules():
        if "DropPath" in type(module).__name__ and float(getattr(module, "drop_prob", 0) or 0) > 0:
            raise SettingError(
                f"token_windows cannot drop whole samples, as {stack.name}.{name} does; set drop_path_rate of the "
                "model to 0."
            )
