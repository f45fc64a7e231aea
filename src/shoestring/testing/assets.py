"""Assets in tests: `need("minilm")` at the top of a test that uses one."""

import os

import pytest

from shoestring import assets
from shoestring.errors import SettingError


def need(*names: str) -> None:
    """Installs the named assets unless they are; the calling test fails, with the reason, if one cannot be had.

    With SHOESTRING_OFFLINE=1 in the environment nothing is downloaded, and the test is skipped with the command to run.
    """
    missing = [name for name in names if not assets.is_installed(name)]
    if missing and os.environ.get("SHOESTRING_OFFLINE") == "1":
        pytest.skip(f"SHOESTRING_OFFLINE=1 and not installed; run: shoestring assets install {' '.join(missing)}")
    try:
        assets.install(missing)
    except SettingError as error:
        pytest.fail(str(error), pytrace=False)
