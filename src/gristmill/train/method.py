"""What a run trains of its model, and what it leaves behind: the whole of it, unless told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gristmill.config.model import ModelConfig
from gristmill.formats.hf import write as write_model_dir
from gristmill.formats.model_dir import load_weights
from gristmill.models.counts import num_parameters
from gristmill.models.init import init_weights
from gristmill.parallel.weights import put
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from gristmill.train.job import Job


class Method:
    """All parameters are trained, and the run ends with a model directory.

    Others derive from it. They are called in this order: `check` before data is read, `adapt` and
    `fill` when the model is built, `files` for every checkpoint, `write` at the end.
    """

    name = ""
    """What is trained, in a few words, for the line that a run begins with; empty: everything."""
    trained_only = False
    """Whether checkpoints hold the trained parameters alone: the others are as `fill` made them."""

    def check(self, model: ModelConfig) -> None:
        """Raise UserError for settings that do not suit the model; before any data is read."""
        if model.adaption_prompt is not None:
            raise UserError(
                f"{model.name} has the vectors of `gristmill finetune adapter`, which no other "
                "training takes along. Train its base."
            )

    def adapt(self, model: nn.Module) -> None:
        """Add modules to the whole decoder and choose what is trained (`requires_grad`).

        The model and what is added are on the meta device (this runs under it); nothing is cut or
        compiled yet.
        """

    def fill(self, model: nn.Module, job: Job) -> None:
        """Give every parameter its value, through `parallel.weights.put`: it may be a part of one.

        Before the optimizer is built. A checkpoint's values come later, over these.
        """
        if job.start_dir is not None:
            load_weights(model, job.start_dir, put=put)
        else:
            init_weights(model, job.cfg.seed, put=put)

    def num_saved(self, model: ModelConfig) -> int:
        """About how many parameters a checkpoint holds."""
        return num_parameters(model)

    def files(self, job: Job) -> dict[str, str]:
        """Small files that every checkpoint gets beside its own, by name."""
        return {}

    def write(
        self, job: Job, weights: Mapping[str, Tensor], final: Path, files: dict[str, str]
    ) -> None:
        """Write `final/` whole, on rank 0; `weights` are what a checkpoint holds, `files` go along.

        Without several ranks they are the model's own tensors, else they come from the last
        checkpoint.
        """
        write_model_dir(
            final, job.model, weights, tokenizer_dir=job.tokenizer_dir, extra_files=files
        )
