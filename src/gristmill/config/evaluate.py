"""Options of `gristmill evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gristmill.config.sections import Auto, Precision
from gristmill.config.use_commands import Loading


@dataclass(kw_only=True)
class Evaluate(Loading):
    """Measure a model on tasks of lm-evaluation-harness (the extra `evaluate`)."""

    tasks: list[str] | str | None = None
    """Tasks, groups or tags, as hellaswag,arc_easy; `*` stands for anything; a task's own .yaml
    file works too. `gristmill evaluate list` prints all."""
    include_path: list[str] | str | None = None
    """Folder with task files of your own."""
    num_fewshot: int | None = None
    """Examples in front of each question; unset: as each task defines it."""
    limit: float | None = None
    """Documents of each task, for a try: a number, or below 1 a share."""
    batch_size: int | str = "auto"
    """How much is computed at a time: as many tokens as this many of the longest texts have; of
    texts that the model writes, this many. auto: what suits the device."""
    out_dir: str | None = None
    """Directory for the results and for the model as a Hugging Face directory; unset: no such copy,
    the results go to evaluate/ beside the weights."""
    save_filepath: str | None = None
    """File for the results; unset: results.json in out_dir. Older results are kept, numbered."""
    force_conversion: bool = False
    """Replace another model that out_dir holds; the same one is left alone."""
    use_cache: str | None = None
    """File that answers are kept in for later evaluations of the same weights; unset: until this
    one has its results, so that one that was stopped goes on."""
    log_samples: bool = False
    """Keep what the model made of each document, in results.samples/TASK.jsonl."""
    apply_chat_template: bool = False
    """Put questions as the model's chat template says."""
    fewshot_as_multiturn: bool | None = None
    """Put examples as turns of the chat; false: all in one question. Unset: true."""
    system_instruction: str | None = None
    """Text in front of every question."""
    gen_kwargs: str | None = None
    """How tasks that let the model write do it, as temperature=0.8,top_k=50,max_gen_toks=128."""
    precision: Precision | Auto = "auto"
    """auto: that of the weights, so that results are those of other tools; bf16-mixed and
    bf16-true are faster where the processor has bf16 arithmetic."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Another way to say precision: float32 is 32-true, bfloat16 is bf16-true."""
    seed: int | None = None
    """Seed of the choice of examples and of what is drawn; unset: those of lm_eval."""
    confirm_run_unsafe_code: bool = False
    """Let tasks run the programs that the model writes, on this machine."""
    access_token: str | None = field(default=None, repr=False)
    """Token for tasks whose data ask for one; unset: HF_TOKEN or the hub's own login."""
