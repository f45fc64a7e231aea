"""Libraries that have something to say on every import, whatever a run is about."""

import logging

# of a kernel for 4-bit layers on CPU, of kernels for GPUs that cannot be loaded, and of how torchao is written
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree")


def quiet_imports() -> None:
    """Keep them silent, but for errors; to be called before they are imported."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
