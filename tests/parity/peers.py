"""Other tools in environments of their own, each with a variable that names its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_S = 300


def peer(variable: str, check: str) -> Callable[..., str]:
    """Runs a script with the interpreter of a peer, in a folder; the last line that it prints.

    `variable` names the interpreter, this one where it is not set, and then tests are skipped
    unless the statement `check` passes.
    """
    python = os.environ.get(variable, sys.executable)
    environment = {**os.environ, "PYTHONPATH": ""}

    def run(folder: Path, script: str, *arguments: object) -> str:
        # A file: tools start processes that read it again.
        path = folder / "script.py"
        path.write_text(script)
        done = subprocess.run(
            [python, str(path), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=folder,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return (done.stdout.splitlines() or [""])[-1]

    checked = subprocess.run([python, "-c", check], capture_output=True, text=True, env=environment)
    if checked.returncode != 0:
        assert variable not in os.environ, checked.stderr[-3000:]
        pytest.skip(f"{check}: not so here (set {variable})")
    return run
