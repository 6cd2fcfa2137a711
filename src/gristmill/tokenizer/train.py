"""Training of a byte-level BPE tokenizer, the same file for the same text on any machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gristmill.config.commands import TokenizerTrain
from gristmill.util.errors import UserError

# Where a text is parted before merging, as in Llama 3's tokenizer.json (from OpenAI's cl100k_base):
# contractions, words with one character before them, digits in groups of three from the left,
# signs with the line breaks after them, line breaks, other white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RECORD = "tokenizer_training.json"

_BLOCK_CHARS = 16_384
_BLOCKS_PER_BATCH = 256  # what the library counts in parallel at a time
_MAX_MEASURED = 64  # blocks on which bytes per token are measured


@dataclass(frozen=True)
class Trained:
    """What training gave. `vocab_size` is less than asked for when the text has no more pairs."""

    vocab_size: int
    num_bytes: int
    bytes_per_token: float
    is_new: bool


def train_bpe(documents: Iterable[str], cfg: TokenizerTrain, *, share: float = 1.0) -> Trained:
    """Train a tokenizer on `share` of the text of `documents`, taken evenly; write it to out_dir.

    The files appear together at the end. A rerun with the same text and settings leaves them alone.
    Raises UserError for another tokenizer in out_dir (unless `overwrite`), for a vocabulary without
    room for the bytes, and for no text.
    """
    special = special_tokens(cfg)
    settings = _settings(cfg, special, share)
    blocks = _evenly(_blocks(documents), share)
    known = already_there(cfg)
    if known is not None and not cfg.overwrite:
        return _same_or_refuse(cfg, settings, known, blocks)
    seen = _Seen(blocks)
    tokenizer = _new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(seen), trainer=trainer)
    if seen.num_bytes == 0:
        raise UserError(
            f"there is no text to train a tokenizer on (max_bytes {cfg.max_bytes}). "
            "name other input (--input_dir) or allow more of it (--max_bytes 1_000_000_000)."
        )
    if cfg.bos_token:
        # So that `transformers` begins a text as prepared documents begin.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cfg.bos_token} $A",
            pair=f"{cfg.bos_token} $A {cfg.bos_token} $B:1",
            special_tokens=[(cfg.bos_token, special.index(cfg.bos_token))],
        )
    trained = Trained(
        tokenizer.get_vocab_size(), seen.num_bytes, _bytes_per_token(tokenizer, seen.kept), True
    )
    _write(Path(cfg.out_dir or ""), tokenizer, cfg, settings | {"text": seen.digest}, trained)
    return trained


def special_tokens(cfg: TokenizerTrain) -> list[str]:
    """BOS, EOS and further special tokens, ids 0 and up. UserError when they cannot be."""
    tokens = [cfg.bos_token, cfg.eos_token, *cfg.special_tokens]
    special = list(dict.fromkeys(token for token in tokens if token is not None))
    if any(not token.strip() for token in special):
        raise UserError(
            f"a special token is empty ({special}). name it, for example --eos_token '</s>'."
        )
    for token in special:
        if len(_pre_tokenizer().pre_tokenize_str(token)) < 2:
            # Its text could come out of ordinary words, and they would then mean the special token.
            raise UserError(
                f"the special token {token!r} looks like an ordinary word. "
                f"put signs around it, for example '<|{token.strip()}|>'."
            )
    least = 256 + len(special)
    if cfg.vocab_size < least:
        raise UserError(
            f"vocab_size {cfg.vocab_size} has no room for the 256 bytes and {len(special)} special "
            f"tokens. use at least --vocab_size {least}; 4096 to 50000 are usual."
        )
    return special


def already_there(cfg: TokenizerTrain) -> dict[str, Any] | None:
    """The record of the tokenizer in out_dir, empty for one without; None when there is none."""
    if not cfg.out_dir:
        raise UserError("no place to write the tokenizer to. add --out_dir DIR.")
    out_dir = Path(cfg.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file. name a directory (--out_dir).")
    if not any((out_dir / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        record = json.loads((out_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _settings(cfg: TokenizerTrain, special: list[str], share: float) -> dict[str, Any]:
    """All that decides the tokenizer, but for the text."""
    return {
        "algorithm": "byte-level BPE 1",
        "split": SPLIT,
        "vocab_size_asked": cfg.vocab_size,
        "special_tokens": special,
        "bos_token": cfg.bos_token,
        "eos_token": cfg.eos_token,
        "share": share,
    }


def _same_or_refuse(
    cfg: TokenizerTrain, settings: dict[str, Any], known: dict[str, Any], blocks: Iterable[str]
) -> Trained:
    if all(known.get(name) == value for name, value in settings.items()):
        seen = _Seen(blocks)
        for _ in seen:
            pass
        if known.get("text") == seen.digest:
            return Trained(
                known["vocab_size"], known["num_bytes"], known["bytes_per_token"], is_new=False
            )
    raise UserError(
        f"{cfg.out_dir} holds another tokenizer (other text or settings). "
        "name a new directory (--out_dir), or replace it with --overwrite true."
    )


def _new_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def _blocks(documents: Iterable[str]) -> Iterator[str]:
    """The documents in pieces, each of the longer ones ending with a line if it can."""
    for document in documents:
        start = 0
        while len(document) - start > _BLOCK_CHARS:
            line = document.rfind("\n", start + _BLOCK_CHARS // 2, start + _BLOCK_CHARS) + 1
            stop = line or start + _BLOCK_CHARS
            yield document[start:stop]
            start = stop
        yield document[start:]


def _evenly(blocks: Iterable[str], share: float) -> Iterator[str]:
    """Every block for a share of 1, else as many as the share allows, from all over the text."""
    if share >= 1:
        yield from blocks
        return
    num_seen, num_taken = 0, 0
    for block in blocks:
        num_bytes = len(block.encode("utf-8", "replace"))
        num_seen += num_bytes
        if num_taken + num_bytes <= share * num_seen:
            num_taken += num_bytes
            yield block


class _Seen:
    """Passes blocks on; then knows their bytes, their digest, and an even few of them."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._blocks = blocks
        self._digest = xxhash.xxh3_128()
        self.num_bytes = 0
        self.kept: list[str] = []

    def __iter__(self) -> Iterator[str]:
        every = 1
        for index, block in enumerate(self._blocks):
            data = block.encode("utf-8", "replace")
            self._digest.update(data)
            self._digest.update(b"\0")
            self.num_bytes += len(data)
            if index % every == 0:
                self.kept.append(data.decode())
                if len(self.kept) > _MAX_MEASURED:
                    self.kept = self.kept[::2]
                    every *= 2
            yield data.decode()  # lone surrogates, which the library refuses, became "?"

    @property
    def digest(self) -> str:
        """xxh3 of all blocks."""
        return self._digest.hexdigest()


def _batches(blocks: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for block in blocks:
        batch.append(block)
        if len(batch) == _BLOCKS_PER_BATCH:
            yield batch
            batch = []
    yield batch


def _bytes_per_token(tokenizer: Tokenizer, blocks: list[str]) -> float:
    encodings = tokenizer.encode_batch_fast(blocks, add_special_tokens=False)
    num_tokens = sum(len(encoding.ids) for encoding in encodings)
    return round(sum(len(block.encode()) for block in blocks) / max(num_tokens, 1), 4)


def _write(
    out_dir: Path,
    tokenizer: Tokenizer,
    cfg: TokenizerTrain,
    record: dict[str, Any],
    trained: Trained,
) -> None:
    """Write all files beside `out_dir` and move them in, tokenizer.json last."""
    config: dict[str, Any] = {
        "bos_token": cfg.bos_token,
        "eos_token": cfg.eos_token,
        # The class that takes tokenizer.json as it is, in every version of transformers.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # transformers' word for "no limit of its own".
        "model_max_length": int(1e30),
    }
    if cfg.special_tokens:
        config["additional_special_tokens"] = cfg.special_tokens
    facts = {name: value for name, value in asdict(trained).items() if name != "is_new"}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        partial.chmod(0o755)
        (partial / "tokenizer_config.json").write_text(_json(config), encoding="utf-8")
        (partial / RECORD).write_text(_json(record | facts), encoding="utf-8")
        tokenizer.save(str(partial / "tokenizer.json"), pretty=True)
        if not out_dir.exists():
            os.rename(partial, out_dir)
            return
        # Without its definition, what is there is no tokenizer: a kill below leaves no mixture.
        for old in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
            (out_dir / old).unlink(missing_ok=True)
        for name in ("tokenizer_config.json", RECORD, "tokenizer.json"):
            os.replace(partial / name, out_dir / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
