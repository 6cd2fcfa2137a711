"""The `generate` command: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gristmill.config.use_commands import Generate
from gristmill.infer.load import (
    LoadedModel,
    cut_short,
    emit,
    load,
    memory,
    note,
    speed,
    use_few_threads,
)
from gristmill.models.decoding import Context, check_sampling, generate_tokens
from gristmill.util.errors import UserError

__all__ = ["generate", "generate_tokens"]


def generate(cfg: Generate) -> None:
    """Write `num_samples` continuations of the prompt to stdout, each ended by a line break.

    Everything else is on stderr, the prompt included, so that a terminal shows the whole text and
    a pipe gets the continuation alone. Sample i is drawn with seed + i.
    """
    check_sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p)
    if cfg.num_samples < 1:
        raise UserError(f"nothing to generate (num_samples {cfg.num_samples}). give 1 or more.")
    loaded = load(cfg.checkpoint_dir, cfg.device, cfg.precision)
    use_few_threads(loaded)
    note(loaded.summary())
    ids = loaded.prompt_ids(cfg.prompt)
    context = loaded.context(compiled=cfg.compile == "auto")
    for index in range(cfg.num_samples):
        if cfg.num_samples > 1:
            note(f"Sample {index + 1} of {cfg.num_samples} (seed {cfg.seed + index}):")
        _one(loaded, context, cfg, ids, cfg.seed + index)
    note(memory(loaded.device))


def _one(
    loaded: LoadedModel, context: Context, cfg: Generate, ids: Sequence[int], seed: int
) -> None:
    stream = loaded.stream(ids, cfg, generator=loaded.generator(seed), context=context)
    sys.stderr.write(cfg.prompt)
    sys.stderr.flush()
    try:
        for piece in loaded.text(stream, after=ids):
            emit(piece)
    finally:
        # Ctrl-C ends the command (exit code 130) with what was written so far.
        emit("\n")
        if (reason := cut_short(stream, loaded.limit)) and stream.stop == "context":
            note(reason)
        note(speed(stream))
