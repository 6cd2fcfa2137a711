"""The Python face: what the commands do, as functions.

import gristmill

gristmill.prepare(layout="textfiles", input_dir="books", output_dir="data/books", ...)
gristmill.pretrain(model_name="pythia-14m", data=TextFiles(train_data_path="books"), ...)
llm = gristmill.LLM.load("out/run/final")
print(llm.generate("Once upon a time", max_new_tokens=40))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from gristmill.config.commands import Prepare, Pretrain
from gristmill.config.data import LitData
from gristmill.config.model import ModelConfig
from gristmill.config.use_commands import Sampling
from gristmill.util.errors import UserError

T = TypeVar("T")


def prepare(config: Prepare | None = None, **settings: Any) -> None:
    """Turn raw text into a dataset, as `gristmill prepare` does.

    Settings are the command's options (`config.commands.Prepare`), or one filled dataclass.
    """
    from gristmill.data.prepare import prepare as run

    run(_configured(Prepare, config, settings))


def pretrain(config: Pretrain | None = None, **settings: Any) -> None:
    """Train a model, as `gristmill pretrain` does.

    Settings are the command's options (`config.commands.Pretrain`), or one filled dataclass;
    `train`, `eval`, `log` and `optimizer` may be dictionaries of their options.
    """
    from gristmill.launch.start import train as run

    run(_configured(Pretrain, config, settings))


class LLM:
    """A language model to write with: `LLM.load(path).generate(prompt)`."""

    def __init__(self, loaded: Any) -> None:
        """Wrap an `infer.load.LoadedModel`."""
        self._loaded = loaded
        self._context = loaded.context()

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", precision: str = "auto") -> LLM:
        """The model in a directory of any kind (`final/`, a checkpoint, a run, Hugging Face).

        `auto` precision is bf16-true where the device computes bf16, else 32-true. Raises
        UserError when there is no model.
        """
        from gristmill.infer.load import load

        return cls(load(path, device, precision))

    @property
    def model(self) -> Any:
        """The decoder, a `torch.nn.Module` in evaluation mode."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The `gristmill.tokenizer.tokenizer.Tokenizer`."""
        return self._loaded.tokenizer

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> str: ...

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...

    def generate(
        self, prompt: str, max_new_tokens: int = 50, *, stream: bool = False, **options: Any
    ) -> str | Iterator[str]:
        """The text that continues `prompt`, or with `stream` an iterator of its pieces.

        Options are those of `config.use_commands.Sampling`: temperature (0.8), top_k (50), top_p
        (1.0) and seed (1234); the same seed gives the same text. One text at a time per object.
        """
        sampling = _configured(Sampling, None, {"max_new_tokens": max_new_tokens, **options})
        ids = self._loaded.prompt_ids(prompt)
        tokens = self._loaded.stream(ids, sampling, context=self._context)
        pieces: Iterator[str] = self._loaded.text(tokens, after=ids)
        return pieces if stream else "".join(pieces)


def _configured(kind: type[T], config: T | None, settings: dict[str, Any]) -> T:
    """The dataclass `kind` from a filled one or from settings by name."""
    if config is not None:
        if not isinstance(config, kind):
            raise UserError(
                f"{config!r} is no {kind.__name__}. give settings by name, for example "
                f"{dataclasses.fields(kind)[0].name}={config!r}."  # type: ignore[arg-type]
            )
        if settings:
            raise UserError(
                f"a {kind.__name__} and settings beside it ({', '.join(settings)}). give one of "
                "the two: gristmill.config.commands has the dataclasses."
            )
        return config
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in fields]
    if unknown:
        raise UserError(
            f"unknown setting ({', '.join(unknown)}). {kind.__name__} has: {', '.join(fields)}."
        )
    values = dict(settings)
    for name, value in settings.items():
        section = ModelConfig if name == "model_config" else fields[name].default_factory
        if isinstance(value, dict) and section is not dataclasses.MISSING:
            values[name] = _configured(section, None, value)  # type: ignore[arg-type]
        elif name == "data" and isinstance(value, (str, Path)):
            values[name] = LitData(data_path=str(value))
        elif isinstance(value, Path):
            values[name] = str(value)
    return kind(**values)
