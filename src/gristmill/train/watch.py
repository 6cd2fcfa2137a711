"""What looks at a run from beside: a profile, sampled text, and evaluations of the user's own.

None of it changes what is trained. All of it happens on rank 0, but for the text, which all ranks
write together as they share the model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gristmill.config.commands import Training
from gristmill.formats.hf import TOKENIZER_WORDS
from gristmill.models.decoder import Decoder
from gristmill.models.device import autocast_dtype
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.train.evaluation import Evaluation
from gristmill.train.profile import Profile, window
from gristmill.train.samples import write_sample
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from gristmill.train.run import Run

SAMPLE_TOKENS = 64
"""Tokens of a sampled text, when `--eval.sample_tokens` is not typed."""


class Watch:
    """The onlookers of one run, asked before and after every step."""

    def __init__(self, run: Run) -> None:
        """Raises UserError for what this run cannot do, before its first step."""
        self._run = run
        job, cfg = run.job, run.job.cfg
        self._profile: Profile | None = None
        self._evaluation: Evaluation | None = None
        steps = window(cfg.profile, start_step=run.state.step, total_steps=job.length.total_steps)
        if steps is not None and run.mesh.is_main:
            self._profile = Profile(*steps, job.out_dir, job.device)
        elif cfg.profile and steps is None:
            run.console.note(f"--profile {cfg.profile}: no step of it is left to make")
        self._prompts = _prompts(cfg)
        self._sample_interval = job.length.eval_interval
        if cfg.eval.sample_interval != "auto":
            self._sample_interval = cfg.eval.sample_interval
        if self._prompts:
            self._tokenizer = self._sampling_tokenizer()
        if cfg.eval.command is not None and not job.exportable:
            raise UserError(
                "--eval.command is given a Hugging Face directory, and this model has none "
                "(--allow_unexportable). Leave it out; checkpoints are in the run's directory.",
                {"--eval.command": None},
            )
        if cfg.eval.command is not None and run.mesh.is_main:
            interval = job.length.save_interval
            if cfg.eval.command_interval != "auto":
                interval = cfg.eval.command_interval
            self._evaluation = Evaluation(cfg.eval.command, interval, job.out_dir, run.console.note)
            self._evaluation.begin_after(run.state.step)

    def before_step(self) -> None:
        """Begin to profile where the window begins."""
        if self._profile is not None:
            self._profile.before_step(self._run.state.step + 1)

    def after_step(self) -> None:
        """Look at the model as the step just made has left it."""
        run = self._run
        step = run.state.step
        if self._prompts and (step % self._sample_interval == 0 or run.complete()):
            self._sample()
        if self._evaluation is not None:
            self._evaluation.look(step)
        if self._profile is not None:
            self._say(self._profile.after_step(step))

    def close(self, *, finished: bool) -> None:
        """End what is under way; a run that has `finished` waits for its last evaluation."""
        if self._profile is not None:
            self._say(self._profile.finish(self._run.state.step))
        if self._evaluation is not None:
            self._evaluation.close(wait=finished)

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            self._run.console.note(line)

    def _sampling_tokenizer(self) -> Tokenizer:
        job = self._run.job
        if job.tokenizer_dir is None:
            raise UserError(
                "--eval.sample_prompt needs a tokenizer, and the dataset has none. Give "
                "--tokenizer_dir DIR."
            )
        return Tokenizer.load(job.tokenizer_dir)

    def _adds_bos(self) -> bool:
        """Whether prompts begin with BOS, as the files of the run's model say it."""
        said = json.loads(self._run.job.tokenizer_files.get(TOKENIZER_WORDS, "{}"))
        return bool(said.get("add_bos_token", self._tokenizer.adds_bos))

    def _sample(self) -> None:
        run = self._run
        for number, prompt in enumerate(self._prompts, 1):
            run.beat(f"sample {number} of step {run.state.step:,}")
            text = f"{prompt}|{self._continued(prompt)}"
            name = "sample" if len(self._prompts) == 1 else f"sample/{number}"
            run.console.note(f"step {run.state.step:,}  {text}")
            if run.trackers is not None:  # of rank 0
                run.trackers.text(name, text, run.state.step)

    def _continued(self, prompt: str) -> str:
        run, job = self._run, self._run.job
        assert isinstance(run.model, Decoder)
        return write_sample(
            run.model,
            self._tokenizer,
            prompt,
            max_new_tokens=job.cfg.eval.sample_tokens or SAMPLE_TOKENS,
            seed=job.cfg.seed % 2**63,
            bos=self._adds_bos(),
            autocast=autocast_dtype(job.precision),
            encode=job.prompt_ids,
            stop_ids=job.stop_ids,
            ranks=run.ranks,
        )


def _prompts(cfg: Training) -> list[str]:
    typed = cfg.eval.sample_prompt
    if typed is None:
        return []
    return [typed] if isinstance(typed, str) else list(typed)
