"""Where results are kept, and what of them is said."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gristmill import __version__
from gristmill.config.evaluate import Evaluate
from gristmill.formats.source import ModelDir
from gristmill.measure import harness
from gristmill.measure.subject import Subject
from gristmill.util.errors import RunError, UserError

FILE, FOLDER, SAMPLES, ANSWERS = "results.json", "evaluate", ".samples", ".answers"


class Results:
    """The place of results, made sure of before they are there."""

    def __init__(self, cfg: Evaluate, source: ModelDir) -> None:
        """Raises UserError where nothing can be written."""
        self.cfg = cfg
        self.path = _path(cfg, source.path)
        if self.path.is_dir():
            raise UserError(
                f"{self.path} is a folder. Name a file: --save_filepath {self.path / FILE}"
            )
        folder = next(place for place in self.path.absolute().parents if place.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(
                f"{self.path} cannot be written (no permission in {folder}). Name another file "
                "with --save_filepath."
            )

    def save(self, measured: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
        """Keep them, older ones in their place with a number; what was kept, samples aside.

        Raises RunError where they cannot be kept.
        """
        whole = dict(measured)
        samples = whole.pop("samples", None) or {}
        whole["config"] = {**subject.describe(), "options": _options(self.cfg)}
        whole["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        whole["gristmill_version"] = __version__
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(harness.to_json(whole) + "\n", samples)
        except OSError as error:
            raise RunError(
                f"the results could not be kept in {self.path} ({error.strerror}). Make room there "
                "and give the same command again."
            ) from None
        return whole

    @property
    def answers_path(self) -> Path:
        """Where answers are kept until there are results."""
        return self.path.with_suffix(ANSWERS)

    def _write(self, text: str, samples: Mapping[str, Any]) -> None:
        """Both under names that nobody else has, and then in their places."""
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        folder = partial.with_suffix(SAMPLES)
        try:
            partial.write_text(text, encoding="utf-8")
            if samples:
                folder.mkdir()
            for task, documents in samples.items():
                lines = "".join(_line(document) for document in documents)
                (folder / f"{task.replace('/', '_')}.jsonl").write_text(lines, encoding="utf-8")
            with _alone(self.path.parent):
                self._place(partial)
                if samples:
                    folder.rename(self.path.with_suffix(SAMPLES))
        finally:
            partial.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _place(self, partial: Path) -> None:
        """The new results in place of older ones, which are moved aside.

        A link never replaces a file, as a move does: where no lock keeps other evaluations away,
        the results of one that was faster are older ones too.
        """
        while True:
            self._make_room()
            try:
                os.link(partial, self.path)
                return
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                partial.rename(self.path)
                return

    def _make_room(self) -> None:
        """Move older results aside, with the first number that is free."""
        samples = self.path.with_suffix(SAMPLES)
        if not (os.path.lexists(self.path) or os.path.lexists(samples)):
            return
        for number in itertools.count(1):
            numbered = _numbered(self.path, number)
            if os.path.lexists(_numbered(samples, number)):
                continue
            with contextlib.suppress(FileExistsError):
                numbered.open("x").close()  # the number is taken
                break
        try:
            self.path.replace(numbered)
        except FileNotFoundError:
            numbered.unlink()
        with contextlib.suppress(FileNotFoundError):  # there may have been none
            samples.rename(_numbered(samples, number))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other evaluations that put results there: file and samples belong together."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems of networks lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _path(cfg: Evaluate, model: Path) -> Path:
    """The file for the results."""
    if cfg.save_filepath is not None:
        return Path(cfg.save_filepath).expanduser()
    if cfg.out_dir is not None:
        return Path(cfg.out_dir).expanduser() / FILE
    if model.is_file():
        return model.parent / FOLDER / FILE
    if model.name.startswith("step-"):
        # A checkpoint goes when newer ones come, and its export when --eval.command has ended.
        runs = [folder for folder in model.absolute().parents if (folder / "run.yaml").is_file()]
        return (runs or [model.parent])[0] / FOLDER / model.name / FILE
    return model / FOLDER / FILE


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _line(document: Any) -> str:
    """One document's sample on a line."""
    return json.dumps(json.loads(harness.to_json(document)), ensure_ascii=False) + "\n"


def _options(cfg: Evaluate) -> dict[str, Any]:
    """The options that were given, but for keys: what tells this evaluation from another."""
    given = dataclasses.asdict(cfg)
    usual = dataclasses.asdict(Evaluate())
    return {k: v for k, v in given.items() if v != usual[k] and k != "access_token"}


def summary(measured: Mapping[str, Any]) -> str:
    """The main figure of each task or group, in one line: the last that a log shows."""
    shown = {**measured.get("results", {}), **measured.get("groups", {})}
    parts = []
    for task, metrics in shown.items():
        values = [
            f"{key.partition(',')[0]} {value:.4f}"
            for key, value in metrics.items()
            if isinstance(value, float) and "_stderr" not in key
        ]
        parts.append(f"{task} {', '.join(values[:2])}")
    more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
    return "; ".join(parts[:6]) + more
