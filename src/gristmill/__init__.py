"""gristmill: raw text to a language model, one command per stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.api import (
        LLM,
        evaluate,
        finetune_adapter,
        finetune_full,
        finetune_lora,
        prepare,
        pretrain,
    )

__version__ = "0.1.0.dev0"
__all__ = [
    "LLM",
    "__version__",
    "evaluate",
    "finetune_adapter",
    "finetune_full",
    "finetune_lora",
    "prepare",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    # Nothing is imported with the package: the command line's help must answer at once.
    if name in __all__:
        from gristmill import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
