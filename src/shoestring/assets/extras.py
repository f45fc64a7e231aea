"""Packages that only some converters need: a missing one is named with the extra that brings it."""

from importlib.util import find_spec

from ..errors import SettingError


def need_packages(modules: tuple[str, ...], purpose: str) -> None:
    """Raises SettingError, with the command that installs them, if one of the modules cannot be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise SettingError(
            f"{purpose} needs {' and '.join(missing)}, which is not installed. "
            'Install it with: pip install "shoestring[demo]"'
        )
