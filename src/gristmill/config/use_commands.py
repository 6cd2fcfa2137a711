"""Options of the commands that use a model: what all have, generate and chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gristmill.config.sections import Auto, Precision

Compile = Literal["auto", "off"] | bool
"""Whether the decoding step is compiled; auto goes on without where that fails."""


@dataclass(kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 50
    """Tokens generated at most."""
    temperature: float = 0.8
    """0 takes the likeliest token; larger is more random."""
    top_k: int | None = 50
    """Choose among this many likeliest tokens."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Choose among tokens at least this many times as probable as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there already become less likely; 1 changes nothing."""
    stop: str | list[str] | None = None
    """Text that ends the reply when the model writes it, or a list of them; it is left out."""
    seed: int = 1234
    """Seed of the choices."""

    @property
    def choosing(self) -> dict[str, Any]:
        """What shapes the choice of each token, by name."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(kw_only=True)
class Loading:
    """Which model is used, and how it is computed."""

    checkpoint_dir: str | None = None
    """Model directory of any kind; the first word after the command."""
    tokenizer_dir: str | None = None
    """Tokenizer to use, with its chat template; unset: the model's own."""
    precision: Precision | Auto = "auto"
    """auto: bf16-true where the processor has bf16 arithmetic, else 32-true."""
    quantize: Literal["int8", "int4"] | None = None
    """Weights in fewer bits, through torchao; int4 where the device has it."""
    device: str = "auto"
    """Kind of device: auto, cpu, cuda or mps; cuda:1 is the second one."""


@dataclass(kw_only=True)
class Writing(Loading, Sampling):
    """What both commands have that show a text as it is written."""

    compile: Compile = "off"
    """Compile the decoding step: auto goes on without where that fails, true does not."""


@dataclass(kw_only=True)
class Generate(Writing):
    """Continue a prompt with a model, or many prompts from a file; without --prompt, one from a
    pipe. `--prompt "…"` at the terminal shows the text as it is written."""

    prompt: str | None = None
    """Text to continue, also as the second word after the command. Unset: what comes through a
    pipe, else a question about llamas."""
    prompt_file: str | None = None
    """Many prompts: one a line, or as JSON lines with `prompt` or `messages`; `-` is the input of
    the command."""
    system: str | None = None
    """System prompt; the prompt is then a question in the model's chat template."""
    chat: bool = False
    """Put the prompt into the model's chat template, as a question, instead of continuing it."""
    special_tokens: bool = False
    """Read the text of special tokens in a prompt as these tokens, not as plain text."""
    num_samples: int = 1
    """How many texts to write for each prompt; number i is drawn with seed + i."""
    batch_size: int | Auto = "auto"
    """Texts written at once; auto: 1 for a single prompt, shown as it is written, else 8, on a
    GPU 32."""
    output: str | None = None
    """File for the texts as JSON lines, or `-` to write these to the output of the command."""
    overwrite: bool = False
    """Replace the file of --output."""


@dataclass(kw_only=True)
class Chat(Writing):
    """Talk with a model; Enter on an empty prompt leaves."""

    system: str | None = None
    """System prompt, for models whose chat template has one."""
    multiline: bool = False
    """Read prompts of several lines, ended by a line with a single dot (or !submit)."""
    history: bool = True
    """Keep prompts for the arrow keys of later chats, in the user's state directory."""
