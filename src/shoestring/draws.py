"""Random numbers that are drawn again: torch's generators go back to where they were."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def undrawn(devices: Iterable[torch.device]) -> Iterator[None]:
    """After, the CPU and these devices draw what they would have without what was drawn inside."""
    others = {device for device in devices if device.type not in ("cpu", "meta")}
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng([]))
        for kind in {device.type for device in others}:
            of_kind = [device for device in others if device.type == kind]
            undo.enter_context(torch.random.fork_rng(of_kind, device_type=kind))
        yield
