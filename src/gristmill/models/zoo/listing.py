"""The named models as a table for people: sizes counted, nothing built."""

from __future__ import annotations

from gristmill.config.model import ModelConfig
from gristmill.models import zoo
from gristmill.models.counts import num_parameters

_HEADER = ("name", "parameters", "layers", "width", "heads/kv", "context", "rows")


def table() -> list[str]:
    """A header and a line for each named model, sorted by name, in aligned columns."""
    rows = [_HEADER, *(_row(name, model.config) for name, model in zoo.models().items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def short(count: int) -> str:
    """A number as people say it: 1.1 B, 14.1 M."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            value = count / unit
            return f"{value:.0f} {letter}" if value >= 99.95 else f"{value:#.3g} {letter}"
    return str(count)


def _row(name: str, config: ModelConfig) -> tuple[str, ...]:
    return (
        name,
        short(num_parameters(config)),
        str(config.num_layers),
        str(config.hidden_size),
        f"{config.num_heads}/{config.kv_heads}",
        f"{config.max_seq_length:,}",
        f"{config.vocab_size:,}",
    )
