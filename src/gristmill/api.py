"""The Python face: what the commands do, as functions.

import gristmill

gristmill.prepare(layout="textfiles", input_dir="books", output_dir="data/books", ...)
gristmill.pretrain(model_name="pythia-14m", data=TextFiles(train_data_path="books"), ...)
gristmill.finetune_lora(checkpoint_dir="out/run", data="my-records.json", ...)
print(gristmill.evaluate("out/run", "hellaswag")["results"])
llm = gristmill.LLM.load("out/run/final")
print(llm.generate("Once upon a time", max_new_tokens=40))
print(llm.chat("What food do llamas eat?"))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from gristmill.config.commands import Prepare, Pretrain
from gristmill.config.data import LitData
from gristmill.config.evaluate import Evaluate
from gristmill.config.finetune import Finetune, FinetuneAdapter, FinetuneFull, FinetuneLora
from gristmill.config.model import ModelConfig
from gristmill.config.tuning_data import JSON, HubRecords, TuningData
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
    _train(_configured(Pretrain, config, settings))


def finetune_full(config: FinetuneFull | None = None, **settings: Any) -> None:
    """Train all weights of a model on instructions or chats, as `gristmill finetune full` does.

    Settings are the command's options (`config.finetune.FinetuneFull`), or one filled dataclass;
    `data` may be a file of records or the name of a set ("Alpaca2k"), and `train`, `eval`, `log`
    and `optimizer` dictionaries of their options.
    """
    _train(_configured(FinetuneFull, config, settings))


def finetune_lora(config: FinetuneLora | None = None, **settings: Any) -> None:
    """Train a low-rank addition to a model, as `gristmill finetune lora` does.

    Settings as of `finetune_full`, and those of `config.finetune.FinetuneLora`.
    """
    _train(_configured(FinetuneLora, config, settings))


def finetune_adapter(config: FinetuneAdapter | None = None, **settings: Any) -> None:
    """Train prefixes of a model's attention, as `gristmill finetune adapter` does.

    Settings as of `finetune_full`, and those of `config.finetune.FinetuneAdapter`.
    """
    _train(_configured(FinetuneAdapter, config, settings))


def evaluate(
    model: str | Path | Evaluate, tasks: str | Sequence[str] | None = None, **settings: Any
) -> dict[str, Any]:
    """Measure a model on tasks of lm-evaluation-harness, as `gristmill evaluate` does.

    `model` is a directory of any kind, and settings are the command's options
    (`config.evaluate.Evaluate`); one filled dataclass may stand for all. Returns what the command
    keeps in results.json, which is written too: `results` by task and metric (`acc,none`),
    `groups`, `config`; and with `log_samples` also `samples`. Raises UserError for what does not
    fit, RunError when the data of a task cannot be had.
    """
    from gristmill.measure.command import measure

    if isinstance(model, Evaluate):
        given = settings if tasks is None else {"tasks": tasks, **settings}
        return measure(_configured(Evaluate, model, given))
    named = None if tasks is None else tasks if isinstance(tasks, str) else list(tasks)
    return measure(
        _configured(Evaluate, None, {"checkpoint_dir": model, "tasks": named, **settings})
    )


class LLM:
    """A language model to write with: `LLM.load(path).generate(prompt)`.

    Several texts may be under way at once, each with memory of its own.
    """

    def __init__(self, loaded: Any) -> None:
        """Wrap an `infer.load.LoadedModel`."""
        self._loaded = loaded
        # Kept for the next text, which often begins as the last one did.
        self._contexts: list[Any] = []

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        precision: str = "auto",
        *,
        tokenizer_dir: str | Path | None = None,
        quantize: Literal["int8", "int4"] | None = None,
    ) -> LLM:
        """The model in a directory of any kind (`final/`, a checkpoint, a run, Hugging Face).

        `auto` precision is bf16-true where the device computes bf16, else 32-true; `quantize` keeps
        the weights in fewer bits. Raises UserError when there is no model, or no tokenizer.
        """
        from gristmill.infer.load import load

        return cls(load(path, device, precision, tokenizer_dir=tokenizer_dir, quantize=quantize))

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

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        batch_size: int | Literal["auto"] = ...,
        **options: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        batch_size: int | Literal["auto"] = ...,
        **options: Any,
    ) -> Iterator[tuple[int, str]]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 50,
        *,
        stream: bool = False,
        batch_size: int | Literal["auto"] = "auto",
        **options: Any,
    ) -> str | list[str] | Iterator[str] | Iterator[tuple[int, str]]:
        """The text that continues `prompt`, or with `stream` an iterator of its pieces.

        Of a list of prompts, the list of their texts, `batch_size` of them written at a time; with
        `stream` an iterator of (number of the prompt, piece). Options are those of
        `config.use_commands.Sampling`: temperature (0.8), top_k (50), top_p (1.0), min_p (0.0),
        repetition_penalty (1.0), stop (a text or several that end it) and seed (1234); the same
        seed gives a prompt the same text. Raises UserError for an option out of range and a prompt
        that leaves no room in the model's context.
        """
        sampling = _configured(Sampling, None, {"max_new_tokens": max_new_tokens, **options})
        if not isinstance(prompt, str):
            pairs = self._write_all(list(prompt), sampling, batch_size)
            return pairs if stream else _joined(pairs, len(prompt))
        pieces = self._write(self._loaded.prompt_ids(prompt), sampling)
        return pieces if stream else "".join(pieces)

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        max_new_tokens: int = ...,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[str]: ...

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        max_new_tokens: int = 50,
        *,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """The reply to a conversation, or with `stream` an iterator of its pieces.

        `messages` are those of the model's chat template, each with a role and a content; one text
        is a single question. Options as of `generate`. The caller keeps the conversation: append
        the reply as `{"role": "assistant", "content": reply}` and ask again; what was read before
        is not read anew. Raises UserError where the model has no chat template.
        """
        from gristmill.infer.conversation import chat_ids, reply_stop_ids
        from gristmill.infer.prompts import is_conversation

        sampling = _configured(Sampling, None, {"max_new_tokens": max_new_tokens, **options})
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not is_conversation(messages):
            raise UserError(
                f"{messages!r} is no conversation. give a list such as "
                '[{"role": "user", "content": "Hello"}].'
            )
        ids = chat_ids(self._loaded, messages)
        pieces = self._write(ids, sampling, stop_ids=reply_stop_ids(self._loaded), goes_on=False)
        return pieces if stream else "".join(pieces)

    def _write(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Collection[int] | None = None,
        goes_on: bool = True,
    ) -> Iterator[str]:
        """The pieces of one text; mistakes are raised here and not at the first piece."""
        from gristmill.infer.load import check_options

        check_options(sampling)
        try:
            context = self._contexts.pop()
        except IndexError:
            context = self._loaded.context()
        try:
            tokens = self._loaded.stream(ids, sampling, stop_ids=stop_ids, context=context)
        except UserError:
            self._contexts.append(context)
            raise

        def pieces() -> Iterator[str]:
            try:
                after = ids if goes_on else ()
                yield from self._loaded.text(tokens, after=after, stops=sampling.stops)
            finally:
                self._contexts.append(context)

        return pieces()

    def _write_all(
        self, prompts: Sequence[str], sampling: Sampling, batch_size: int | str
    ) -> Iterator[tuple[int, str]]:
        """(number of the prompt, piece) of several texts."""
        from gristmill.infer.many import Task, choose_rows, write_texts

        tasks = [Task(self._loaded.prompt_ids(prompt), sampling.seed) for prompt in prompts]
        rows = choose_rows(self._loaded, batch_size, tasks, sampling)
        events = write_texts(self._loaded, tasks, sampling, rows=rows)
        return ((number, event) for number, event in events if isinstance(event, str))


def _joined(pairs: Iterator[tuple[int, str]], count: int) -> list[str]:
    """The texts of (number, piece)."""
    texts = [""] * count
    for number, piece in pairs:
        texts[number] += piece
    return texts


def _train(config: Pretrain | Finetune) -> None:
    """Train where the settings say."""
    from gristmill.launch.start import train

    train(config)


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
        factory = fields[name].default_factory
        if isinstance(value, dict) and name == "model_config":
            values[name] = _configured(ModelConfig, None, value)
        elif isinstance(value, dict) and factory is not dataclasses.MISSING:
            usual = factory()
            values[name] = _configured(type(usual), None, {**vars(usual), **value})
        elif name == "data" and isinstance(value, (str, Path)):
            tunes, named = issubclass(kind, Finetune), str(value)
            values[name] = _records(named) if tunes else LitData(data_path=named)
        elif isinstance(value, Path):
            values[name] = str(value)
    return kind(**values)


def _records(named: str) -> TuningData:
    """A set by its name, or the records of a file or folder."""
    sets = {module.__name__: module for module in HubRecords.__subclasses__()}
    return sets[named]() if named in sets else JSON(json_path=named)
