"""The optimizer's state of a parameter whose numbers come, go and change places while it trains."""

from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import SettingError

# their update of one number depends on others of the same tensor, or their state is laid out by its shape
NOT_BY_NUMBER = frozenset({"adafactor", "lamb", "lars", "muon", "shampoo", "soap", "galoreadamw", "apollo", "came"})


def check_by_number(optimizer: Optimizer | None, technique: str) -> None:
    """Refuse optimizers that do not treat every number by itself.

    Raises SettingError with the optimizer's name.
    """
    kind = type(optimizer).__name__
    if kind.lower() in NOT_BY_NUMBER:
        raise SettingError(
            f"{technique} trains single numbers, but {kind} mixes those of one tensor in its updates: use one that "
            "keeps a state for each number, such as adamw_torch or sgd."
        )


def carry_state(
    optimizer: Optimizer, parameter: nn.Parameter, old_size: int, sources: Int[Tensor, " n"], technique: str
) -> None:
    """Give a parameter of n numbers that had `old_size` the state of the numbers it has kept, and zeros for new ones.

    sources: where each number was before; -1 for one that is new. Zeros are what the state would be if its gradient
    had been zero so far, in Adam and its like.

    Raises SettingError if there is state that is not one number for each of the parameter's, naming the optimizer.
    """
    state = optimizer.state.get(parameter, {})
    kept = sources >= 0
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue  # counts of steps
        if value.shape != (old_size,) or is_traceable_wrapper_subclass(value):
            raise SettingError(
                f"{technique} cannot go on with {type(optimizer).__name__}: its state {key!r}, of shape "
                f"{tuple(value.shape)}, is not one number for each of {old_size} that train. Use adamw_torch or sgd."
            )
        carried = value.new_zeros(len(sources))
        carried[kept] = value[sources[kept]]
        state[key] = carried
