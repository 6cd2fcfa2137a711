"""What benchmarks share: measured child processes, the machine in words, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
IN_PROCESS = Path(__file__).resolve().parent / "in_process"


@dataclass(frozen=True)
class Child:
    """A process that has ended."""

    seconds: float
    peak_bytes: int
    """Largest resident memory of the process itself, its own children not counted."""


def run_child(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Child:
    """Run a command to its end, output into `log`; RuntimeError with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)}\nended with {process.returncode}:\n{tail}")
    scale = 1 if platform.system() == "Darwin" else 1024
    return Child(time.perf_counter() - started, usage.ru_maxrss * scale)


def run_stamped(
    command: Sequence[str], log: Path, threads: int, compiled: Path
) -> tuple[Child, list[tuple[float, ...]]]:
    """Run a training command whose hook (`in_process/`) writes a line of numbers at each stamp.

    `compiled` is where its compiler keeps what it makes.
    """
    place = log.with_suffix(".stamps")
    place.unlink(missing_ok=True)
    env = {
        "STAMPS": str(place),
        "PYTHONPATH": os.pathsep.join([str(IN_PROCESS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
    }
    child = run_child(command, log, env)
    return child, [tuple(map(float, line.split())) for line in place.read_text().splitlines()]


def gristmill(*words: str) -> list[str]:
    """The command line of one of our commands, in this interpreter."""
    return [sys.executable, "-m", "gristmill", *words]


def high_water(pid: int) -> int:
    """Largest resident memory of a process so far (Linux)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else []
    low, high = (tenths[0], tenths[-1]) if tenths else (values[0], values[0])
    return {"median": statistics.median(values), "p10": low, "p90": high}


def environment(threads: int) -> dict[str, object]:
    """The commit, versions and machine that a figure belongs to."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit + ("+changes" if changed else ""),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of some packages, as the interpreter `python` sees them."""
    code = (
        "import json, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    out = subprocess.run(
        [python, "-c", code, *packages], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(out.stdout)
    return found


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns wide enough for their cells, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join(cells), file=sys.stdout)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
