"""Libraries that have something to say on every import or step, whatever a run is about."""

import logging
import warnings

# of a kernel for 4-bit layers on CPU, of kernels for GPUs that cannot be loaded, and of how torchao is written
TALKATIVE = ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree")


def quiet_imports() -> None:
    """Keep them silent, but for errors; to be called before they are imported."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep libraries from writing between the lines of a command; errors still come through."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
