"""What a setting of the form `module:name` stands for."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from gristmill.util.errors import UserError


def load_named(option: str, target: str, what: str = "object") -> Any:
    """The object that `option` names as `module:name`, found from the working directory too.

    Raises UserError, which calls it `what` and says what went wrong in the module.
    """
    module, _, name = target.partition(":")
    if not name:
        raise UserError(f"{option} {target} names no {what}. Give module:name.")
    look_here()
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise UserError(
            f"{option} {target} cannot be loaded ({type(error).__name__}: {error}). "
            "Give module:name of something importable from here."
        ) from None


def look_here() -> None:
    """Have modules of the user's own found from the working directory, as `python -m` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")
