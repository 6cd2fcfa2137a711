"""Imports every module of the package and fails at the first that needs more than is installed.

The hosted job runs it where only the runtime dependencies are installed; `__main__` is left out
because importing it runs the command.
"""

import importlib
import pkgutil

import gristmill

if __name__ == "__main__":
    names = [m.name for m in pkgutil.walk_packages(gristmill.__path__, "gristmill.")]
    names.remove("gristmill.__main__")
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules import")
