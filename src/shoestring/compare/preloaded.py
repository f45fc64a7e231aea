"""What the server process of a comparison imports, once for all runs."""

from ..quiet import quiet_imports

quiet_imports()

from . import worker  # noqa: E402, F401
