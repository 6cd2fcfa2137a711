"""A model directory of any kind, loaded with its tokenizer and ready to write text."""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from gristmill.config.use_commands import Compile, Loading, Sampling
from gristmill.formats.model_dir import load_model
from gristmill.formats.tokenizer_files import load_tokenizer
from gristmill.infer.quantize import quantize as round_weights
from gristmill.infer.stops import StopText
from gristmill.models.batching import Batch
from gristmill.models.cache import kv_cache_bytes
from gristmill.models.counts import num_parameters
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, Continuation, check_sampling, generate_tokens
from gristmill.models.device import (
    autocast_dtype,
    choose_device,
    describe,
    host_memory_bytes,
    memory_bytes,
    resolve_precision,
    weight_dtype,
)
from gristmill.models.kernels import NOT_FOR_THESE, use_kernels
from gristmill.models.zoo.chat import chat_template
from gristmill.tokenizer import prompt_styles
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """A decoder in evaluation mode, its tokenizer, and what was chosen to compute it with."""

    name: str
    model: Decoder
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    quantize: str | None = None
    knows_template: bool = False
    """Whether its chat template is not in its files but among what is known of named models."""
    decodes_with: str = "torch"
    """Whose products a step is made of, and why not the kernels' where they could be."""

    @property
    def limit(self) -> int:
        """Longest sequence in tokens, prompt and reply together."""
        return self.model.config.max_seq_length

    def context(self, *, compiled: Compile = "off") -> Context:
        """An empty key-value cache for one sequence, its decoding step compiled if asked for.

        `auto` goes on without where that fails, True raises UserError.
        """
        autocast = autocast_dtype(self.precision)
        context = Context(self.model, autocast=autocast)
        self._compile(context, compiled)
        return context

    @staticmethod
    def _compile(decoding: Context | Batch, compiled: Compile) -> None:
        if compiled not in ("auto", True):
            return
        note("Compiling the decoding step …")
        start = time.perf_counter()
        reason = decoding.compile()
        if reason and compiled is True:
            raise UserError(f"cannot compile ({reason}). leave --compile out.")
        note(
            f"Not compiled ({reason}); going on without."
            if reason
            else f"Compiled in {time.perf_counter() - start:.1f} s."
        )

    def batch(
        self,
        rows: int,
        max_length: int | None = None,
        *,
        compiled: Compile = "off",
    ) -> Batch:
        """Room for `rows` sequences decoded together, each up to `max_length` (unset: limit).

        `compiled` as in `context`.
        """
        autocast = autocast_dtype(self.precision)
        batch = Batch(self.model, rows, max_length or self.limit, autocast=autocast)
        self._compile(batch, compiled)
        return batch

    def cached_length(self, rows: int) -> int:
        """How long each of so many texts may be: a quarter of the device's memory is for them."""
        lengths = range(self.limit + 1)
        return bisect_right(lengths, self._cache_memory(), key=partial(self._cache_bytes, rows)) - 1

    def cached_rows(self, length: int) -> int:
        """How many texts of such a length fit into that quarter."""
        return self._cache_memory() // self._cache_bytes(1, length)

    def _cache_bytes(self, rows: int, length: int) -> int:
        width = 4 if self.precision == "32-true" else 2
        return kv_cache_bytes(self.model.config, rows, length, width)

    def _cache_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 4
        return host_memory_bytes() // 4

    def prompt_ids(self, prompt: str, *, special: bool = False) -> list[int]:
        """The ids of a text to continue; with `special`, special tokens written in it are these.

        BOS comes first where the model was made with it, which its tokenizer's files say:
        `add_bos_token` in tokenizer_config.json, else what tokenizer.json puts around a text, else
        the custom of SentencePiece models (yes). An empty prompt is BOS, or else EOS, alone: the
        start of a document.
        """
        ids = self.tokenizer.encode(prompt, special=special)
        if self.tokenizer.adds_bos and ids[:1] != [self.tokenizer.bos_id]:
            ids = [self.tokenizer.bos_id, *ids]
        if not ids:
            for start in (self.tokenizer.bos_id, self.tokenizer.eos_id):
                if start is not None:
                    return [start]
        return self.checked(ids)

    def checked(self, ids: list[int]) -> list[int]:
        """The same ids; raises UserError when the model has no embedding for one of them."""
        rows = self.model.config.vocab_size
        if ids and max(ids) >= rows:
            raise UserError(
                f"the tokenizer does not belong to this model (token id {max(ids)}, model has "
                f"{rows}). put the tokenizer that the model was trained with into its directory."
            )
        return ids

    def stream(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Collection[int] | None = None,
        generator: torch.Generator | None = None,
        context: Context | None = None,
    ) -> Continuation:
        """The ids that follow `ids`; ends at `stop_ids` (unset: the tokenizer's)."""
        return generate_tokens(
            context or self.context(),
            ids,
            max_new_tokens=sampling.max_new_tokens,
            **sampling.choosing,
            eos_ids=frozenset(self.tokenizer.stop_ids if stop_ids is None else stop_ids),
            generator=generator or self.generator(sampling.seed),
        )

    def generator(self, seed: int) -> torch.Generator:
        """The source of random choices for a seed."""
        return torch.Generator(self.device).manual_seed(seed)

    def text(
        self, ids: Iterable[int], *, after: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> Iterator[str]:
        """The text of `ids` in pieces as they come, as it reads behind the ids `after`.

        It ends before the first of the texts `stops`; a `Continuation` then has "stop" as its end.
        """
        decoder = TextDecoder(self.tokenizer, after, stops)
        for token_id in ids:
            if piece := decoder.put(token_id):
                yield piece
            if decoder.stopped:
                break
        if rest := decoder.flush():
            yield rest
        if decoder.stopped and isinstance(ids, Continuation):
            ids.stop = "stop"

    def template_note(self) -> str | None:
        """What there is to say of how questions are put, where its files have no template."""
        style = self.tokenizer.prompt_style
        if self.knows_template:
            return "Its files have no chat template; questions are put as its model card says."
        if style is None:
            return None
        if prompt_styles.is_known(style):
            return f"Questions are put in the style {style}, which {prompt_styles.FILE} names."
        how = "the tokenizer's template says" if self.tokenizer.chat_template else "they stand"
        return (
            f"{prompt_styles.FILE} names the style {style}, which is not known here: questions are "
            f"put as {how}. A chat_template.jinja beside it says otherwise."
        )

    def summary(self) -> str:
        """One line: model, size, device, precision and backend."""
        rounded = f", weights in {self.quantize}" if self.quantize else ""
        size = num_parameters(self.model.config)
        return (
            f"Model: {self.name} ({_short(size)} parameters, context {self.limit} tokens) "
            f"on {describe(self.device, self.precision)}{rounded}, "
            f"decoding with {self.decodes_with}"
        )


class TextDecoder:
    """Turns the ids of a text into what may be shown of it, as it reads behind the ids `after`."""

    def __init__(
        self, tokenizer: Tokenizer, after: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._decoder = tokenizer.decoder()
        # The last few settle whether a leading space is one.
        for token_id in after[-8:]:
            self._decoder.put(token_id)
        self._gate = StopText(stops)

    @property
    def stopped(self) -> bool:
        """Whether one of the stops has come: nothing follows."""
        return self._gate.stopped

    def put(self, token_id: int) -> str:
        """The text that one more id lets out, perhaps empty."""
        return self._gate.put(self._decoder.put(token_id))

    def flush(self) -> str:
        """The text still withheld, at the end."""
        return self._gate.put(self._decoder.flush()) + self._gate.flush()


PICTURES = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    127: 0x2421,
    **{code: 0xFFFD for code in range(128, 160)},
}

ONE_THREAD_PARAMETERS = 16_000_000
"""Below this size the work between two waits for other threads is some microseconds."""


def use_few_threads(loaded: LoadedModel) -> None:
    """Let a small model on a CPU decode on one thread, unless OMP_NUM_THREADS says otherwise.

    Its step is hundreds of operations too short to share: waiting for a second thread costs more
    than it brings, and on a busy machine ten times more. For commands only: the number of threads
    is the whole process's.
    """
    size = num_parameters(loaded.model.config)
    if (
        loaded.device.type == "cpu"
        and size < ONE_THREAD_PARAMETERS
        and "OMP_NUM_THREADS" not in os.environ
    ):
        torch.set_num_threads(1)


def load(
    checkpoint_dir: str | Path,
    device: str,
    precision: str,
    *,
    tokenizer_dir: str | Path | None = None,
    quantize: Literal["int8", "int4"] | None = None,
) -> LoadedModel:
    """The model in a directory of any kind, on the device and in the precision asked for.

    `auto` precision is bf16-true where the device computes bf16, else 32-true. `tokenizer_dir`
    unset takes the tokenizer that lies with the model. `quantize` rounds the matrices of linear
    layers. Raises UserError when there is no such directory, or no model or tokenizer in it.
    """
    chosen = choose_device(device)
    resolved = resolve_precision(precision, chosen, bf16="bf16-true")
    tokenizer, knows_template = open_tokenizer(checkpoint_dir, tokenizer_dir)
    model = load_model(Path(checkpoint_dir), device=chosen, dtype=weight_dtype(resolved))
    if model.config.num_token_ids is None and tokenizer.num_token_ids < model.config.vocab_size:
        # Rows behind the last token were never trained and could win over trained ones.
        model.config = replace(model.config, num_token_ids=tokenizer.num_token_ids)
    # Where the processor has other units or there is no compiler, torch's products are used.
    missing = use_kernels(model, note)
    decodes_with = "torch" if missing == NOT_FOR_THESE else f"torch ({missing})"
    if missing is None:
        decodes_with = "gristmill's kernels"
    if quantize is not None:
        round_weights(model, quantize, chosen)
    name = model_name(checkpoint_dir)
    return LoadedModel(
        name, model, tokenizer, chosen, resolved, quantize, knows_template, decodes_with
    )


def open_tokenizer(
    checkpoint_dir: str | Path, tokenizer_dir: str | Path | None = None
) -> tuple[Tokenizer, bool]:
    """The tokenizer at `tokenizer_dir`, or else that of the model, with a chat template if there is
    one; and whether this is not in its files but known of a model of this name.

    Raises UserError when there is no tokenizer.
    """
    if tokenizer_dir is not None:
        return Tokenizer.load(tokenizer_dir), False
    tokenizer = load_tokenizer(checkpoint_dir)
    known = None if tokenizer.chat_template else chat_template(model_name(checkpoint_dir))
    if known is not None:
        tokenizer.chat_template = known
    return tokenizer, known is not None


def load_for_command(cfg: Loading) -> LoadedModel:
    """The model that a command's options name, ready to decode; says what was chosen.

    For commands only, as `use_few_threads`. Raises UserError as `load`, and when none is named.
    """
    if cfg.checkpoint_dir is None:
        raise UserError(
            "no model given. name a model directory as the first word: gristmill "
            f"{type(cfg).__name__.lower()} out/quickstart/run"
        )
    return load_aloud(
        cfg.checkpoint_dir,
        cfg.device,
        cfg.precision,
        tokenizer_dir=cfg.tokenizer_dir,
        quantize=cfg.quantize,
    )


def load_aloud(
    checkpoint_dir: str | Path,
    device: str,
    precision: str,
    *,
    tokenizer_dir: str | Path | None = None,
    quantize: Literal["int8", "int4"] | None = None,
) -> LoadedModel:
    """`load`, with as few threads as the model wants, and what was chosen is said."""
    loaded = load(checkpoint_dir, device, precision, tokenizer_dir=tokenizer_dir, quantize=quantize)
    use_few_threads(loaded)
    note(loaded.summary())
    return loaded


def check_options(sampling: Sampling) -> None:
    """Raise UserError for options of sampling that are out of range."""
    check_sampling(sampling.max_new_tokens, **sampling.choosing)
    if "" in sampling.stops:
        raise UserError("a stop text is empty. give it some text, or leave --stop out.")


def model_name(path: str | Path) -> str:
    """What a model directory is called, for people: its last telling parts."""
    full = Path(os.path.abspath(path))
    if full.name in ("final", "hf") or full.name.startswith("step-"):
        return f"{full.parent.name}/{full.name}"
    return full.name


def speed(stream: Continuation) -> str:
    """The line that says how long a reply took."""
    rate = stream.num_tokens / stream.total_s if stream.total_s else 0.0
    return (
        f"Time for inference: {stream.total_s:.2f} sec total, {rate:.2f} tokens/sec, "
        f"{stream.num_tokens} tokens (first after {stream.first_s:.2f} sec)"
    )


def cut_short(stream: Continuation, limit: int) -> str | None:
    """A line that says that a text ended before the model ended it, if so."""
    if stream.stop == "context":
        return f"Stopped: the model's context is full ({limit} tokens, prompt included)."
    if stream.stop == "interrupt":
        return "Stopped: interrupted."
    if stream.stop == "max_new_tokens":
        return f"Stopped: --max_new_tokens {stream.num_tokens} reached."
    return None


def memory(device: torch.device) -> str:
    """The line that says how much memory was used."""
    return f"Memory used: {memory_bytes(device).peak / 1e9:.2f} GB"


def note(text: str) -> None:
    """Say something that is not the model's text: on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def emit(text: str) -> None:
    """Show the model's text: on stdout, at once.

    On a terminal, control characters are shown as pictures: they could move the cursor, or worse.
    """
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """The text with pictures (U+2400 on) of control characters, but for tabs and line breaks."""
    return text.translate(PICTURES)


def _short(count: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return str(count)
