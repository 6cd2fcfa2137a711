"""Options of the commands that use a model: generate and chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gristmill.config.sections import Auto, Precision


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
    stop: list[str] | None = None
    """Texts that end the reply when the model writes them; they are left out."""
    seed: int = 1234
    """Seed of the choices."""


@dataclass(kw_only=True)
class Generate(Sampling):
    """Continue a prompt with a model."""

    checkpoint_dir: str | None = None
    """Model directory of any kind; the first word after the command."""
    prompt: str = "What food do llamas eat?"
    """Text to continue."""
    num_samples: int = 1
    """How many continuations to write."""
    precision: Precision | Auto = "auto"
    """auto: bf16-true where the processor has bf16 arithmetic, else 32-true."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    compile: Literal["auto", "off"] = "off"
    """auto: compile the decoding step."""


@dataclass(kw_only=True)
class Chat(Sampling):
    """Talk with a model; Enter on an empty prompt leaves."""

    checkpoint_dir: str | None = None
    """Model directory of any kind; the first word after the command."""
    system: str | None = None
    """System prompt, for models whose chat template has one."""
    multiline: bool = False
    """Read prompts of several lines, ended by a line with a single dot."""
    precision: Precision | Auto = "auto"
    """auto: bf16-true where the processor has bf16 arithmetic, else 32-true."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    compile: Literal["auto", "off"] = "off"
    """auto: compile the decoding step."""
