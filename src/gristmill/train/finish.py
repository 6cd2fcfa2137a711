"""The end of a run: the last checkpoint, then the model directory that people load."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import yaml
from torch import Tensor

from gristmill import __version__
from gristmill.checkpoint.store import RECORD_NAME, step_path
from gristmill.config.parse import to_dict
from gristmill.formats.safetensors_io import open_tensors, weight_files
from gristmill.train.run import Run
from gristmill.util.errors import Interrupted, RunError
from gristmill.util.secrets import redacted

FINAL = "final"
TRAINING_FILE = "training.json"
"""What `final/` was trained to: lets a longer run tell that it is not its own end."""


def is_finished(run: Run) -> bool:
    """Whether the run's last step and its `final/` are both there; said to the user if so."""
    if run.start_from is None or not run.own_start or not run.complete():
        return False
    exportable = run.job.exportable
    final_step = run.ranks.main_says(_final_step(run.job.out_dir))
    if exportable and final_step != run.state.step:
        return False
    run.checkpointer.close()
    if not run.mesh.is_main:
        return True
    print(
        f"{run.job.out_dir} is finished: {run.state.step:,} steps, {run.state.tokens:,} tokens. "
        f"The model is in {run.job.out_dir / FINAL if exportable else run.start_from}. "
        f"A larger {_limit(run)} goes on from here; --overwrite true starts again."
    )
    return True


def finish(run: Run) -> None:
    """Save the last step, and unless a signal ended the run write `final/`.

    Raises Interrupted after a signal, RunError when a checkpoint could not be written.
    """
    if run.last_saved_step != run.state.step:
        run.save(last=True)
    if run.heart is not None:
        run.heart.close()  # from here on nobody waits for the others
    run.checkpointer.wait()
    if run.stop_signal is not None and not run.complete():
        run.checkpointer.close()
        saved = "not saved" if run.checkpointer.failed else "saved"
        raise Interrupted(
            run.stop_signal,
            f"{signal.Signals(run.stop_signal).name}: stopped at step {run.state.step:,}, {saved}. "
            "Run the same command again to go on.",
        )
    if run.state.step < run.job.length.total_steps:
        why = "a source has been read as often as it may be, with what rewinds passed over,"
        if not run.out_of_data:
            why = "--train.max_time is over"
        run.console.note(f"{why} at step {run.state.step:,}; a larger {_limit(run)} goes on")
    # Several ranks together have their weights in what they have just saved, or nowhere.
    saved = step_path(run.job.out_dir, run.state.step)
    written = run.mesh.world == 1 or (saved / RECORD_NAME).is_file()
    if run.job.exportable and written:
        if run.mesh.is_main:
            _write_final(run, saved)
        run.console.finished(run.job.out_dir / FINAL)
    elif written:
        run.console.finished(saved)
    if run.checkpointer.failed:
        raise RunError(
            f"a checkpoint of {run.job.out_dir} could not be written (see above). "
            "Free some space; the same command then goes on from what is there."
        )
    run.checkpointer.close()


def _write_final(run: Run, saved: Path) -> None:
    if run.mesh.world == 1:
        weights: Mapping[str, Tensor] = run.model.state_dict()
    else:
        weights = open_tensors(weight_files(saved / "weights"))
    files = {
        "hyperparameters.yaml": yaml.safe_dump(redacted(to_dict(run.job.cfg)), sort_keys=False),
        TRAINING_FILE: json.dumps(
            {"gristmill": __version__, "step": run.state.step, "tokens": run.state.tokens}
        ),
        **run.job.tokenizer_files,
    }
    run.job.method.write(run.job, weights, run.job.out_dir / FINAL, files)


def _limit(run: Run) -> str:
    """The setting that ended the run."""
    train = run.job.cfg.train
    if run.state.step < run.job.length.total_steps:
        return "max_epochs of the source" if run.out_of_data else "--train.max_time"
    if train.max_steps is not None:
        return "--train.max_steps"
    return "--train.epochs" if train.epochs is not None else "--train.max_tokens"


def _final_step(out_dir: Path) -> int | None:
    try:
        return int(json.loads((out_dir / FINAL / TRAINING_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None
