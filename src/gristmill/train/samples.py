"""Text that the model writes while it is trained, after the user's prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gristmill.checkpoint.ranks import ALONE, Ranks
from gristmill.models.decoder import Decoder
from gristmill.models.decoding import Context, generate_tokens
from gristmill.tokenizer.tokenizer import Tokenizer

TEMPERATURE, TOP_K = 0.8, 50


def write_sample(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    bos: bool,
    autocast: torch.dtype | None = None,
    encode: Callable[[str], list[int]] | None = None,
    stop_ids: frozenset[int] | None = None,
    ranks: Ranks = ALONE,
) -> str:
    """What the model writes after a prompt, begun with BOS or not; the prompt left out.

    The model is used as it stands, in its training type, and stays as it is; random choices come
    from a source of their own, the same at every call. Blocks run uncompiled: every new length
    would be compiled anew. `encode` makes the ids of a prompt, and `stop_ids` end a text, where
    these are not the tokenizer's own. Ranks that share the model do this together, and get the
    same text.
    """
    ids = tokenizer.encode(prompt, bos=bos) if encode is None else encode(prompt)
    ids = ids or [tokenizer.eos_id or 0]
    with _at_rest(model):
        context = _Together(model, ranks, autocast)
        ids = ids[-max(1, context.limit - max_new_tokens) :]
        new = list(
            generate_tokens(
                context,
                ids,
                max_new_tokens=max_new_tokens,
                temperature=TEMPERATURE,
                top_k=TOP_K,
                eos_ids=tokenizer.stop_ids if stop_ids is None else stop_ids,
                generator=torch.Generator(context.device).manual_seed(seed),
            )
        )
    decoder = tokenizer.decoder()
    # The last few settle whether a leading space is one.
    for token_id in ids[-8:]:
        decoder.put(token_id)
    return "".join([decoder.put(token_id) for token_id in new] + [decoder.flush()])


@contextlib.contextmanager
def _at_rest(model: Decoder) -> Iterator[None]:
    """The model as it decodes, uncompiled; afterwards it is as it was."""
    compiled, training = model.compiled, model.training
    eager: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if compiled:
        eager = torch.compiler.set_stance("force_eager")
    model.eval()
    model.compiled = False
    try:
        with eager:
            yield
    finally:
        model.compiled = compiled
        model.train(training)


class _Together(Context):
    """A text that several ranks write with a model that they share: the first one's logits count.

    So all choose the same tokens, whatever their sums have been rounded to.
    """

    def __init__(self, model: Decoder, ranks: Ranks, autocast: torch.dtype | None) -> None:
        super().__init__(model, autocast=autocast)
        self._ranks = ranks

    def read(self, ids: Sequence[int]) -> Tensor:
        """See `Context.read`."""
        return self._of_main(super().read(ids))

    def add(self, token: Tensor, token_id: int) -> Tensor:
        """See `Context.add`."""
        return self._of_main(super().add(token, token_id))

    def _of_main(self, logits: Tensor) -> Tensor:
        return self._ranks.main_says(logits.cpu()).to(self.device)
