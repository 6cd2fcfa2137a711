"""A command of the user's, started beside training on the weights of new checkpoints."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from gristmill.checkpoint.store import complete, step_of
from gristmill.parallel.mesh import RENDEZVOUS
from gristmill.util.secrets import redact

FOLDER = "eval"
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
"""Beginnings of the variables that would make the command a member of this run."""


class Evaluation:
    """Runs `command` every `interval` steps in the background, one at a time.

    `{model}` in it becomes a Hugging Face directory with the weights of the newest checkpoint, and
    `{step}` its step. What it writes goes to `out_dir/eval/step-….log`; `say` is given its end.
    The exported weights go when it has ended; checkpoints stay where they are.
    """

    def __init__(
        self, command: str, interval: int, out_dir: Path, say: Callable[[str], None]
    ) -> None:
        self.command, self.interval, self.out_dir, self._say = command, interval, out_dir, say
        self._next_step = 0
        self._done_step = -1
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._said: deque[str] = deque()
        shutil.rmtree(
            out_dir / FOLDER / "weights", ignore_errors=True
        )  # of a start that was killed

    def begin_after(self, step: int) -> None:
        """Leave alone what has been evaluated up to `step`."""
        self._next_step = (step // self.interval + 1) * self.interval
        self._done_step = step

    def look(self, step: int) -> None:
        """Start, if it is due and a checkpoint that new is complete; costs nothing otherwise."""
        self._tell()
        if step >= self._next_step and (self._thread is None or not self._thread.is_alive()):
            self._start(self._next_step)

    def close(self, *, wait: bool) -> None:
        """Evaluate the last checkpoint and wait for it, or end at once what is running."""
        try:
            if self._thread is not None and self._thread.is_alive():
                if wait:
                    self._say("waiting for --eval.command (Ctrl-C leaves it)")
                else:
                    self._stop()
                self._thread.join()
            if wait and self._start(self._done_step + 1) and self._thread is not None:
                self._thread.join()
        except KeyboardInterrupt:
            self._stop()
        self._tell()

    def _tell(self) -> None:
        """Say what the thread has to say; it does not speak itself, in the midst of a line."""
        while self._said:
            self._say(self._said.popleft())

    def _start(self, first_step: int) -> bool:
        newest = next(iter(complete(self.out_dir)), None)
        if newest is None or step_of(newest) < first_step:
            return False
        step = step_of(newest)
        self._next_step = (step // self.interval + 1) * self.interval
        self._done_step = step
        weights = self.out_dir / FOLDER / "weights" / newest.name
        source = newest
        try:
            weights.parent.mkdir(parents=True, exist_ok=True)
            held = weights.with_name(f"{newest.name}.source")
            # Links: the checkpoint may be removed while it is read.
            source = Path(shutil.copytree(newest, held, copy_function=os.link))
        except OSError:
            source = newest
        self._thread = threading.Thread(
            target=self._run, args=(source, weights, step), name="evaluation", daemon=True
        )
        self._thread.start()
        return True

    def _run(self, source: Path, weights: Path, step: int) -> None:
        log = self.out_dir / FOLDER / f"step-{step:08}.log"
        command = self.command.replace("{model}", shlex.quote(str(weights.resolve())))
        command = command.replace("{step}", str(step))
        export = [sys.executable, "-m", "gristmill", "export", str(source), str(weights)]
        try:
            with log.open("wb") as output:
                code = self._call(export, output)
                what = "the export for --eval.command"
                if code == 0:
                    code, what = self._call(command, output), "--eval.command"
            log.write_text(redact(log.read_text(errors="replace")))
            if not self._stopped:
                last = _last_line(log)
                self._said.append(f"step {step:,}: {what} ended with {code}: {last} ({log})")
        except OSError as error:
            self._said.append(f"step {step:,}: --eval.command could not be run ({error})")
        finally:
            shutil.rmtree(weights.parent, ignore_errors=True)

    def _call(self, command: list[str] | str, output: object) -> int:
        if self._stopped:
            return -signal.SIGTERM
        environment = {k: v for k, v in os.environ.items() if not k.startswith(RANK_VARIABLES)}
        environment.pop(RENDEZVOUS, None)
        self._process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.DEVNULL,
            stdout=output,  # type: ignore[arg-type]
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C for the run is not for it, and it ends as a whole
        )
        if self._stopped:
            self._stop()
        return self._process.wait()

    def _stop(self) -> None:
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no output")
