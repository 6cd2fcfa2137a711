"""Whether a fast engine encodes exactly as the tokenizer's definition, found out and remembered."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import xxhash

from gristmill.tokenizer.long_text import Encoded, size
from gristmill.util.paths import user_cache_dir

MAX_SAMPLE_BYTES = 1_000_000
_GATE = 1  # raise when the awkward texts change: old verdicts then no longer count
_MAX_SAMPLES = 64


# Texts that tell tokenizers apart: white space, control characters, scripts, digits, runs, code.
# fmt: off
_AWKWARD = [
    *("", " ", "  ", "   a", "a   ", "\t", "\n", "\n\n", "\n\n\n  x", "\r\n", "a\r\n\r\nb", "\r"),
    *(" \n \n ", "a \u00a0 b", "\u3000全角\u3000", "\u2028x\u2029", "\x0b\x0c", "\x85y", "\x1cz"),
    *("\x00", "a\x00b", "\x01\x7f", "\ufeffBOM", "\ufffd", "a\ufffd\ufffdb", "\U0010ffff"),
    "\u200b",
    *("🙂", "👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍🏽👍", "1️⃣", "🇩🇪🇫🇷", "☃️ ☃"),
    *("é", "e\u0301", "ạ̈̈", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢", "\u0301start", "ﬁ ﬀ Ⅷ ½ ² ①"),
    *("İıſ", "ǅ ß ẞ Σς"),
    *("中文字符测试。", "日本語のテキスト、カタカナ", "한국어 가나다", "\u1112\u1161\u11ab"),
    "𠮷野家",
    *("שלום עולם", "مرحبا بالعالم ١٢٣", "हिन्दी क्ष", "ภาษาไทย", "Привет, мир", "ქართული"),
    *("\u202eabc\u202c", "don't I'll WE'VE it's they're I'M 'tis 's '", "can’t won’t ’s"),
    "rock'n'roll",
    *("1", "12", "123", "1234", "1234567890" * 5, "3.14159e-10", "1,000,000", "x1y22z333", "٣٤٥"),
    *("a" * 20_000, " " * 3_000, "\n" * 3_000, "ab" * 5_000, "中" * 3_000, "-" * 300, "=" * 79),
    *(" a" * 500, "\t" * 50 + "x", "0" * 1_000, "!" * 500, "🙂" * 300, "e\u0301" * 300),
    "\u0301" * 50,
    "def f(x: int) -> str:\n    return f'{x!r}'  # why?\n\n\nclass A(B):\n\tpass\n",
    "#include <stdio.h>\r\nint main(void) { return a->b[0] << 2; }\r\n",
    '{"key": [1, 2.5, null], "näme": "\\u00e9\\n"}\n',
    "<html><body class='x'>&nbsp;&#39;</body></html>",
    "https://example.org/a?b=c&d=%20e#f user@example.org C:\\dir\\file.txt",
    "$\\frac{a}{b} \\in \\mathbb{R}^{n}$ — “quotes” … ‘x’",
    "mixedСловоmit文字und123\tTab\u00a0NBSP  two   three    four",
    *("<s>", "</s>", "[INST] x [/INST]", "<|im_start|>user\n", "<|endoftext|>", "▁x ▁ ▁▁", "Ġx Ċ"),
]
# fmt: on


class EncodesBatch(Protocol):
    """Anything that encodes a list of texts to (ids uint32, offsets int64)."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """(ids uint32[N], offsets int64[len(texts) + 1])."""
        ...


@dataclass
class Verdict:
    """What is known of an engine on a tokenizer; `reason` is empty while no text differed."""

    definition: str
    gate: int = _GATE
    reason: str = ""
    samples: list[str] = field(default_factory=list)  # digests of texts of jobs that were equal


def examine(
    definition: EncodesBatch,
    engine: EncodesBatch,
    *,
    name: str,
    special_tokens: Iterable[str],
    sample_texts: Iterable[str],
    path: Path,
) -> Verdict:
    """The verdict on `engine`: awkward texts and up to 1 MB of the job's own encode alike or not.

    What was compared before, as remembered at `path` for the definition called `name`, is not
    compared again; what is found out now is remembered there.
    """
    verdict = recall(path, name)
    is_news = verdict is None
    if verdict is None:
        verdict = Verdict(
            name, reason=difference(definition, engine, awkward_texts(special_tokens))
        )
    sample = [] if verdict.reason else _sample(sample_texts)
    digest = xxhash.xxh3_128_hexdigest("\x00".join(sample).encode("utf-8", "replace"))
    if sample and digest not in verdict.samples:
        verdict.reason = difference(definition, engine, sample)
        verdict.samples = [*verdict.samples, digest][-_MAX_SAMPLES:]
        is_news = True
    if is_news:
        remember(path, verdict)
    return verdict


def difference(definition: EncodesBatch, engine: EncodesBatch, texts: Sequence[str]) -> str:
    """Where two encoders differ on `texts`, in words; empty when they agree."""
    expected, starts = definition.encode_batch(texts)
    found, found_starts = engine.encode_batch(texts)
    if len(expected) == len(found) and (expected == found).all() and (starts == found_starts).all():
        return ""
    for index, text in enumerate(texts):
        a = expected[starts[index] : starts[index + 1]].tolist()
        b = found[found_starts[index] : found_starts[index + 1]].tolist()
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            return f"{text[:60]!r} differs at token {at}: {a[at : at + 3]} against {b[at : at + 3]}"
    return "the offsets differ"


def awkward_texts(special_tokens: Iterable[str]) -> list[str]:
    """Texts that tell tokenizers apart, among them the text of special tokens in all positions."""
    special = list(special_tokens)[:64]
    written = [
        "".join(special),
        *special,
        *(f"a{t}b {t} c\n{t}\n {t}{t} x" for t in special),
        *(t[:-1] for t in special),
    ]
    return [*_AWKWARD, *written, *_mixtures(special)]


def _mixtures(special: list[str]) -> list[str]:
    """Random sequences, always the same ones, of pieces that interact."""
    draw = random.Random(20261121)
    pieces = [
        *(" ", "  ", "\n", "\r\n", "\t", "a", "The", "ing", "é", "e\u0301", "中", "한", "ש", "ع"),
        *(
            "🙂",
            "\u200d",
            "7",
            "42",
            "2026",
            "'s",
            "'",
            "’",
            ".",
            ",",
            "(",
            ")",
            "{",
            "}",
            "<",
            ">",
            "|",
        ),
        *("_", "-", "#", "\u00a0", "\u3000", "\u0301", "\x00", "Ab", "XY", "ß", *special),
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(2, 40))) for _ in range(500)]


def _sample(texts: Iterable[str]) -> list[str]:
    """The first of `texts`, up to `MAX_SAMPLE_BYTES` in all."""
    sample: list[str] = []
    left = MAX_SAMPLE_BYTES
    for text in texts:
        part = text if text.isascii() else text[: max(left // 3, 1)]
        sample.append(part[:left])
        left -= size(sample[-1])
        if left <= 0:
            break
    return sample


def verdict_path(tokenizer_digest: str, engine: str, version: str) -> Path:
    """The file that remembers a verdict, in the user's cache."""
    return user_cache_dir() / "engines" / f"{tokenizer_digest[:32]}-{engine}-{version}.json"


def recall(path: Path, definition: str) -> Verdict | None:
    """The verdict remembered at `path`, if it was found with this gate and definition."""
    try:
        verdict = Verdict(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if (verdict.gate, verdict.definition) == (_GATE, definition) else None


def remember(path: Path, verdict: Verdict) -> None:
    """Keep `verdict` for the next job; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(asdict(verdict), file)
        os.replace(file.name, path)
    except OSError:
        return
