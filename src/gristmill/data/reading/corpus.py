"""What a run trains on: one dataset, or several with weights, from folders or object stores."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gristmill.data.reading.chunk_cache import ChunkCache, bytes_in
from gristmill.data.reading.mixture import MAX_WEIGHT, Mixture, Stage
from gristmill.data.reading.order import WINDOW_CHUNKS
from gristmill.data.reading.stream import TokenStream
from gristmill.data.storage import is_url
from gristmill.data.store.dataset import Dataset
from gristmill.util.errors import UserError
from gristmill.util.paths import user_cache_dir

# Chunks that are fetched ahead of reading in order: as many as hide the way to a store.
_IN_ORDER_CHUNKS = 16

MANY_EPOCHS = 4
"""A source read more often than this is worth a warning (arXiv:2305.16264)."""


@dataclass(frozen=True)
class Part:
    """A dataset and its place in a mixture."""

    path: str | Path
    weight: float = 1.0
    name: str = ""
    max_epochs: float | None = None


@dataclass(frozen=True)
class LaterWeights:
    """Weights that hold after so many training tokens, one for each part."""

    from_tokens: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class CacheLimit:
    """Where chunks of object stores go, and how many gigabytes of them."""

    folder: str | None = None
    gigabytes: float | str = "auto"


class Corpus:
    """Opened datasets with the weights that mix them; a mixture of one is that dataset."""

    def __init__(
        self, parts: Sequence[Part], datasets: Sequence[Dataset], later: Sequence[LaterWeights]
    ) -> None:
        self.parts, self.datasets, self._later = tuple(parts), tuple(datasets), tuple(later)
        self.names = tuple(part.name or name_of(part.path) for part in parts)
        self._check_tokenizers()

    @classmethod
    def open(
        cls,
        parts: Sequence[Part],
        *,
        later: Sequence[LaterWeights] = (),
        limit: CacheLimit = CacheLimit(),
        in_order: bool = False,
    ) -> Corpus:
        """The datasets of these parts. Raises UserError as `Dataset.open`, for weights that cannot
        be, and for a cache that is too small. What is only read `in_order`, as held-out text is,
        takes little of the cache."""
        for weights in ([part.weight for part in parts], *(stage.weights for stage in later)):
            _check_weights(weights)
        datasets = [Dataset.open(part.path) for part in parts]
        if remote := [dataset for dataset in datasets if is_url(dataset.path)]:
            cache = open_cache(remote, limit, in_order=in_order)
            for dataset in remote:
                dataset.cache = cache
        return cls(parts, datasets, later)

    @property
    def dataset_id(self) -> str:
        """What tells this data apart from other data: of one dataset its id."""
        if len(self.datasets) == 1 and not self._later:
            return self.datasets[0].dataset_id
        ids = [dataset.dataset_id for dataset in self.datasets]
        # Equal ratios are one mixture, however they are written.
        value: list[Any] = [ids, integer_weights([part.weight for part in self.parts])]
        value += [[s.from_tokens, integer_weights(s.weights)] for s in self._later]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    @property
    def num_token_ids(self) -> int:
        """Largest id + 1 in any of the datasets."""
        return max(dataset.num_token_ids for dataset in self.datasets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets."""
        return sum(dataset.num_tokens for dataset in self.datasets)

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest chunk that every dataset has at least one of."""
        return min(int(dataset.chunk_tokens.max()) for dataset in self.datasets)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token; None where some dataset does not know its text."""
        sizes = [dataset.text_bytes for dataset in self.datasets]
        if not all(sizes):
            return None
        return sum(size or 0 for size in sizes) / self.num_tokens

    @property
    def sources(self) -> tuple[tuple[str, float | None], ...]:
        """Name of each dataset, and the bytes of text per token in it where it knows them."""
        return tuple(
            (name, d.text_bytes / d.num_tokens if d.text_bytes else None)
            for name, d in zip(self.names, self.datasets, strict=True)
        )

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's files that travel with the data."""
        found = (dataset.tokenizer_dir for dataset in self.datasets)
        return next((folder for folder in found if folder is not None), None)

    def begins_with(self, token_id: int | None) -> bool:
        """Whether every document of every dataset begins with this id (None: with none of its own).

        False where a dataset does not say.
        """
        made = [dataset.manifest.tokenizer for dataset in self.datasets]
        return all(record is not None and record.bos_id == token_id for record in made)

    @property
    def items_are_documents(self) -> bool:
        """Whether we prepared all of it, and so know where documents end."""
        return all(dataset.manifest.source is not None for dataset in self.datasets)

    def stream(self, seq_len: int, **options: Any) -> TokenStream:
        """The training samples; `options` as of `TokenStream`."""
        if len(self.datasets) == 1:
            return TokenStream(self.datasets[0], seq_len, **options)
        stages = [Stage(0, integer_weights([part.weight for part in self.parts]))]
        for later in self._later:
            start = round(later.from_tokens / seq_len)
            if start <= stages[-1].start:
                raise UserError(
                    f"a stage from {later.from_tokens:,.0f} tokens on comes before the one it "
                    f"follows is over, or within its first sample ({seq_len} tokens). order stages "
                    "by from_tokens."
                )
            stages.append(Stage(start, integer_weights(later.weights)))
        return TokenStream(self.datasets, seq_len, mixture=Mixture(stages), **options)

    def held_out(self, seq_len: int, *, packing: bool = False) -> TokenStream:
        """All samples once, in their order on the disk, one dataset after another."""
        return TokenStream(
            self.datasets, seq_len, seed=0, shuffle=False, endless=False, packing=packing
        )

    def most_samples(self, stream: TokenStream) -> int | None:
        """How long a run may be before a part is read more often than its `max_epochs`.

        None when no part has a limit.
        """
        limits = [part.max_epochs for part in self.parts]
        if all(limit is None for limit in limits):
            return None

        def fits(samples: int) -> bool:
            read = stream.epochs(samples)
            return all(limit is None or e <= limit for e, limit in zip(read, limits, strict=True))

        low, high = 0, 1
        while fits(high) and high < 2**40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def check_epochs(self, stream: TokenStream, samples: int) -> None:
        """Raise UserError when a run of `samples` reads a part too often."""
        most = self.most_samples(stream)
        if most is None or samples <= most:
            return
        read = stream.epochs(samples)
        worst = next(
            number
            for number, part in enumerate(self.parts)
            if part.max_epochs is not None and read[number] > part.max_epochs
        )
        tokens = most * stream.seq_len
        raise UserError(
            f"{self.names[worst]} would be read {read[worst]:.2f} times, more than its max_epochs "
            f"of {self.parts[worst].max_epochs:g}, in {samples * stream.seq_len:,} tokens of "
            f"training. train at most {tokens:,} tokens, or give it a smaller weight or a larger "
            "max_epochs.",
            fix={"--train.max_tokens": tokens},
        )

    def _check_tokenizers(self) -> None:
        known: dict[str, str] = {}
        for name, dataset in zip(self.names, self.datasets, strict=True):
            if dataset.manifest.tokenizer is not None:
                known.setdefault(dataset.manifest.tokenizer.digest, name)
        if len(known) > 1:
            first, second = list(known.values())[:2]
            raise UserError(
                f"{first} and {second} were prepared with different tokenizers: the same ids mean "
                "different text. prepare one of them again with the tokenizer of the other."
            )


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the ratio of these decimal ones, exact unless that takes too large ones."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    shared = math.gcd(*whole)
    whole = [weight // shared for weight in whole]
    if sum(whole) > MAX_WEIGHT:
        share = Fraction(MAX_WEIGHT // 2, sum(whole))
        whole = [max(1, round(weight * share)) if weight else 0 for weight in whole]
    return tuple(whole)


def _check_weights(weights: Sequence[float]) -> None:
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise UserError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} are no shares. give each source 0 "
            "or more, and at least one more than 0."
        )


def name_of(path: str | Path) -> str:
    """A folder's name; that of the folder above for `train` and its like."""
    parts = [part for part in PurePath(str(path)).parts if part != "train"]
    return parts[-1] if parts else str(path)


def open_cache(
    datasets: Sequence[Dataset], limit: CacheLimit, *, in_order: bool = False
) -> ChunkCache:
    """The cache for chunks of these datasets. Raises UserError when it is too small for them."""
    folder = Path(limit.folder).expanduser() if limit.folder else user_cache_dir() / "chunks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"chunks of an object store cannot be kept in {folder} ({error.strerror}). name a "
            "folder on a local disk.",
            fix={"--data.cache_dir": "FOLDER"},
        ) from error
    chunks = _IN_ORDER_CHUNKS if in_order else WINDOW_CHUNKS
    needed = sum(int(np.sort(dataset.chunks.sizes)[-chunks:].sum()) for dataset in datasets)
    room = int(0.8 * (shutil.disk_usage(folder).free + bytes_in(folder)))
    if isinstance(limit.gigabytes, str):
        size = min(2 * needed, room)
    else:
        size = int(limit.gigabytes * 1e9)
    if in_order:
        return ChunkCache(folder, size, ahead_bytes=needed)
    if size < needed:
        typed = "--data.cache_gb " + f"{size / 1e9:.3g}"
        what = typed if not isinstance(limit.gigabytes, str) else f"the room in {folder}"
        raise UserError(
            f"{what} is too small: the samples are mixed over {WINDOW_CHUNKS} chunks of each "
            f"dataset, {needed / 1e9:.3g} GB in all, and each chunk would be fetched again and "
            f"again ({room / 1e9:.3g} GB could be used there). give it that, or another "
            "--data.cache_dir.",
            fix={"--data.cache_gb": math.ceil(needed / 1e7) / 100},
        )
    return ChunkCache(folder, size)
