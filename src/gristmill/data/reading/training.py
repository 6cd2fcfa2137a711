"""The samples that a training reads, from its settings: here alone, for whoever shows them too."""

from __future__ import annotations

from gristmill.config.sections import TrainArgs
from gristmill.data.reading.corpus import Corpus
from gristmill.data.reading.stream import TokenStream
from gristmill.util.errors import UserError


def training_stream(settings: TrainArgs, corpus: Corpus, *, seq_len: int, seed: int) -> TokenStream:
    """The stream whose samples a training with these settings takes one after another.

    Raises UserError for settings that do not suit the data.
    """
    return corpus.stream(
        seq_len,
        seed=seed,
        packing=is_packed(settings, corpus),
        spread=settings.batch_order == "spread",
    )


def document_mask(settings: TrainArgs, corpus: Corpus) -> bool:
    """Whether documents are kept apart: as typed, else where we know that items are documents."""
    typed = settings.document_mask
    return corpus.items_are_documents if typed == "auto" else typed


def is_packed(settings: TrainArgs, corpus: Corpus) -> bool:
    """Whether samples are packed; UserError where it is not known what a document is."""
    if settings.packing == "concat":
        return False
    if not document_mask(settings, corpus):
        raise UserError(
            "--train.packing best_fit packs whole documents, and it is not known whether the items "
            f"of {' and '.join(corpus.names)} are documents: gristmill did not prepare all of it. "
            "If they are, say so with --train.document_mask true; else leave packing out.",
            {"--train.document_mask": "true"},
        )
    return True
