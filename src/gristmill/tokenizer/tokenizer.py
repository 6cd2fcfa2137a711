"""The tokenizer of a model or dataset: text to ids and back, whichever file defines it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path

from gristmill.tokenizer import gguf_vocabulary, prompt_styles
from gristmill.tokenizer.huggingface import HuggingFaceBackend
from gristmill.tokenizer.long_text import Cutter, Encoded
from gristmill.tokenizer.sentencepiece_model import SentencePieceBackend
from gristmill.tokenizer.sidecar import (
    DEFINITION,
    FILES,
    GENERATION,
    TEMPLATE,
    Sidecar,
    read_json,
    read_sidecar,
)
from gristmill.tokenizer.stream import StreamDecoder
from gristmill.util.errors import UserError
from gristmill.util.gguf_header import find_gguf
from gristmill.util.paths import download_command, resolve_model_dir

_DEFINITIONS = ("tokenizer.json", "tokenizer.model")

# For a tokenizer.json that came alone (GPT-2's is published so): what its makers call the tokens.
_USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>")
_USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer:
    """Text to ids and back, exactly as `tokenizer.json` or `tokenizer.model` defines it.

    Nothing is added to a text unless asked for, and special tokens written in a text are ordinary
    text unless `special=True`. Lone surrogates are read as U+FFFD.
    """

    def __init__(self, path: Path, sidecar: Sidecar) -> None:
        self.path = path
        self.chat_template = sidecar.chat_template
        self._sidecar = sidecar
        self.backend: HuggingFaceBackend | SentencePieceBackend = (
            HuggingFaceBackend(path)
            if path.suffix == ".json"
            else SentencePieceBackend(path, sidecar.added)
        )
        self.kind = self.backend.kind
        self.num_token_ids = self.backend.num_token_ids
        self.bos_id = self._resolve(sidecar.bos, sidecar.bos_known, self.backend.bos_id, _USUAL_BOS)
        self.eos_id = self._resolve(sidecar.eos, sidecar.eos_known, self.backend.eos_id, _USUAL_EOS)
        self.prompt_style = sidecar.prompt_style
        """The class of LitGPT's that says how the model is asked, unless it has a template."""
        if self.prompt_style is not None and prompt_styles.is_known(self.prompt_style):
            bos_token = self.bos_token if self.adds_bos else None
            self.chat_template = prompt_styles.template(self.prompt_style, bos_token=bos_token)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in the directory (or file) `path`, tokenizer.json before tokenizer.model.

        A directory's own `tokenizer/` and `final/` are looked into too, so datasets, checkpoints
        and runs work; a GGUF file has its tokenizer in it. Raises UserError when there is none or
        it cannot be read.
        """
        definition = _find(path)
        return cls(definition, read_sidecar(definition.parent))

    @cached_property
    def digest(self) -> str:
        """sha256 of the defining file, in hex; with tokens added beside a .model, of these too."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.kind == "sentencepiece" and self._sidecar.added:
            added = sorted((t.id, t.content, t.special) for t in self._sidecar.added)
            digest.update(json.dumps(added).encode())
        return digest.hexdigest()

    @property
    def bos_token(self) -> str | None:
        """Text of the BOS token."""
        return None if self.bos_id is None else self.backend.token_text(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """Text of the EOS token."""
        return None if self.eos_id is None else self.backend.token_text(self.eos_id)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special (control) tokens."""
        return tuple(self.backend.special)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: EOS, and all that the model's files name."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys(eos + self._sidecar.stop_ids))

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the model was made for prompts that start with BOS, as its files say."""
        if self._sidecar.add_bos is not None:
            return self._sidecar.add_bos and self.bos_id is not None
        return self.backend.prompt_starts_with(self.bos_id)

    @property
    def cutter(self) -> Cutter:
        """Where long texts may be cut without changing their ids."""
        return self.backend.cutter

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """The ids of `text`, BOS and EOS around them if asked for.

        With `special`, the text of special tokens becomes their ids (for rendered chats). Raises
        UserError when BOS or EOS is asked for and the tokenizer has none.
        """
        before = [self._required(self.bos_id, "bos")] if bos else []
        after = [self._required(self.eos_id, "eos")] if eos else []
        return before + self.backend.encode(text, special=special) + after

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """(ids uint32[N], offsets int64[len(texts) + 1]): text i is ids[offsets[i]:offsets[i+1]].

        No BOS, no EOS. Memory is bounded for long texts where the tokenizer allows it.
        """
        return self.backend.encode_batch(texts)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids` (any iterable of ints); ids that have no token have no text."""
        return self.backend.decode([int(i) for i in ids], skip_special=skip_special)

    def decoder(self, *, skip_special: bool = True) -> StreamDecoder:
        """An object that turns ids into text one by one: `.put(id)`, and `.flush()` at the end."""
        return StreamDecoder(partial(self.backend.decode, skip_special=skip_special))

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's own files to `directory`, which is made if needed.

        What only the model's files beside it say goes into a `generation_config.json`.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        names = {name: self.path.parent / name for name in FILES}
        # A definition under another name (a file was named on the command line) gets the usual one.
        names[f"tokenizer{self.path.suffix}"] = self.path
        for name, source in names.items():
            if source.is_file() and source.resolve() != (target / name).resolve():
                shutil.copyfile(source, target / name)
        is_elsewhere = target.resolve() != self.path.parent.resolve()
        if self.prompt_style is not None and self.chat_template is not None and is_elsewhere:
            (target / TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        beside = (self._sidecar.bos, self._sidecar.eos)
        is_said_beside = len(self.stop_ids) > 1 or any(isinstance(end, int) for end in beside)
        if is_said_beside and is_elsewhere:
            ends = {"bos_token_id": self.bos_id, "eos_token_id": self.stop_ids}
            (target / GENERATION).write_text(json.dumps(ends) + "\n")

    def _resolve(
        self, named: str | int | None, known: bool, own: int | None, usual: tuple[str, ...]
    ) -> int | None:
        """The id of BOS or EOS: as the files name it, else the model's own, else the usual one."""
        if isinstance(named, str):
            return self.backend.token_id(named)
        if isinstance(named, int):
            return named if 0 <= named < self.num_token_ids else None
        if known or own is not None:
            return own
        return next((self.backend.special[t] for t in usual if t in self.backend.special), None)

    def _required(self, token_id: int | None, role: str) -> int:
        if token_id is None:
            raise UserError(
                f"the tokenizer in {self.path.parent} has no {role.upper()} token. name one as "
                f'"{role}_token" in its tokenizer_config.json, or do without it.'
            )
        return token_id


def _find(path: str | Path) -> Path:
    """The defining file that `path` means."""
    root = resolve_model_dir(path)
    if root.is_file():
        if find_gguf(root) is not None:
            return gguf_vocabulary.unpack(root)
        if root.suffix not in (".json", ".model"):
            raise UserError(
                f"{root} is not a tokenizer (neither .json, .model nor .gguf). "
                "name a directory with tokenizer.json or tokenizer.model."
            )
        return root
    for folder in (root, root / "tokenizer", root / "final"):
        made_from = read_json(folder / "tokenizer_config.json").get(DEFINITION)
        for name in (made_from, *_DEFINITIONS):
            if name in _DEFINITIONS and (folder / name).is_file():
                return folder / name
    packed = find_gguf(root)
    if packed is not None:
        return gguf_vocabulary.unpack(packed)
    found = "no tokenizer.json or tokenizer.model in it" if root.is_dir() else "no such directory"
    fetch = None if root.is_dir() else download_command(path)
    fetched = f"fetch one with `{fetch} --tokenizer_only true`, " if fetch else ""
    raise UserError(
        f"no tokenizer at {path} ({found}). name a directory with one, {fetched}or make one with "
        "`gristmill tokenizer train --input_dir TEXT --out_dir DIR`."
    )
