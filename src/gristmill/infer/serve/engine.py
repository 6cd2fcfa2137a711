"""The thread that writes replies: many at a time, new ones joining while others go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gristmill.infer.load import note
from gristmill.infer.serve.reply import Ask, Piece, Reply
from gristmill.models.sampling import sample
from gristmill.tokenizer.tokenizer import Tokenizer

READING_S = 0.1
"""How long prompts are read before the replies under way get their next token."""

PART_TOKENS = 256
"""Tokens of a prompt that are read at once: so long everybody else waits."""

WORTH_HOLDING = 16
"""Tokens that two texts must have in common at their beginning for the later to go on from them."""

Settings = tuple[float, int | None, float, float] | None
"""temperature, top_k, top_p and min_p of a reply; None takes the likeliest token."""


class Rows(Protocol):
    """The sequences that are decoded together: `models.batching.Batch`, or a test's."""

    def read(  # noqa: D102
        self, row: int, ids: Sequence[int], *, held: int, part_tokens: int
    ) -> Iterator[Tensor]: ...
    def step(self, rows: list[int], tokens: list[int]) -> Tensor: ...  # noqa: D102
    def drop(self, row: int) -> None: ...  # noqa: D102
    def kept(self, row: int, count: int) -> int: ...  # noqa: D102


class Full(Exception):
    """The queue has no room for so many more replies."""


class Closing(Exception):
    """The server is being stopped, and the reply was not begun or not finished."""


class Gone(Exception):
    """Nobody waits for the reply any more."""


class ModelFailed(Exception):
    """Computing the reply failed, for lack of memory for instance."""


class Ticket:
    """The replies to one request, as they come: `next` while `has_left`.

    To be used on the event loop that it was made on; only `tell` is the engine's.
    """

    def __init__(self, engine: Engine, num_replies: int) -> None:
        self.created = time.monotonic()
        self.first_s: float | None = None
        self.is_over = False
        self.failure: Exception | None = None
        self._engine = engine
        self._left = num_replies
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

    async def next(self) -> tuple[int, Piece]:
        """The next piece of one of the replies, with the reply's number.

        Raises Gone after `cancel`, Closing when the server stops first, and ModelFailed.
        """
        item = await self._queue.get()
        if isinstance(item, Exception):
            self.failure = item
            raise item
        if item[1].finish is not None:
            self._left -= 1
            self.is_over = self._left == 0
        return item

    @property
    def has_left(self) -> bool:
        """Whether a reply has not ended."""
        return self._left > 0

    def cancel(self) -> None:
        """Give the replies up: what waits is forgotten, what is under way ends with this step."""
        if not self.is_over:
            self.is_over = True
            self._queue.put_nowait(Gone())
            self._engine.forget(self)

    def take(self, item: tuple[int, Piece] | Exception) -> None:
        """Receive what the engine says, on the event loop."""
        if self.first_s is None and not isinstance(item, Exception):
            self.first_s = time.monotonic() - self.created
        self._queue.put_nowait(item)

    def tell(self, items: list[tuple[Ticket, tuple[int, Piece] | Exception]]) -> None:
        """Hand items over to the event loop; for the engine's thread."""
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_hand_out, items)


def _hand_out(items: list[tuple[Ticket, tuple[int, Piece] | Exception]]) -> None:
    for ticket, item in items:
        ticket.take(item)


class _Sequence:
    """One reply in the queue or in a row; there is a `reply` once its prompt has been read.

    `parts` reads the prompt, and `logits` are those after what was read of it.
    """

    __slots__ = ("ask", "logits", "number", "parts", "reply", "ticket")

    def __init__(self, ticket: Ticket, number: int, ask: Ask) -> None:
        self.ticket, self.number, self.ask = ticket, number, ask
        self.reply: Reply | None = None
        self.parts: Iterator[Tensor] = iter(())
        self.logits: Tensor | None = None


class Engine:
    """Decodes up to `rows` replies together, on one thread; up to `queue_size` more wait.

    `make_rows` builds what decodes; it runs on the engine's thread, because what is compiled for a
    GPU belongs to the thread that made it. With `holds`, a prompt that goes on from a text that a
    free row still holds, as the next turn of a chat does, is read from there.
    """

    def __init__(
        self,
        make_rows: Callable[[], Rows],
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        rows: int,
        queue_size: int,
        holds: bool = True,
    ) -> None:
        self._holds = holds
        self.rows, self.queue_size = rows, queue_size
        self._make_rows, self._tokenizer, self._device = make_rows, tokenizer, device
        self._changed = threading.Condition()
        # All below is written under `_changed`; the rows themselves are the thread's own.
        self._waiting: deque[_Sequence] = deque()
        self._active: dict[int, _Sequence] = {}
        # What rows held when they were last used, the row used longest ago first.
        self._held: dict[int, list[int]] = {row: [] for row in range(rows)}
        self._draining = self._stopping = False
        self._failed: BaseException | None = None
        self._outbox: list[tuple[Ticket, tuple[int, Piece] | Exception]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready = threading.Event()

    def start(self) -> None:
        """Start the thread and wait until it can decode; raises what it fails with."""
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def is_alive(self) -> bool:
        """Whether it still writes replies."""
        return self._thread.is_alive() and self._failed is None

    @property
    def has_failed(self) -> bool:
        """Whether it ended although nobody stopped it."""
        return self._failed is not None

    @property
    def num_active(self) -> int:
        """Replies being written."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Replies that wait for their turn."""
        return len(self._waiting)

    def submit(self, asks: Sequence[Ask]) -> Ticket:
        """Begin the replies to one request, all of them or none.

        Raises Full when the queue has no room for them, Closing when the server is being stopped.
        """
        ticket = Ticket(self, len(asks))
        with self._changed:
            if self._draining or not self.is_alive:
                raise Closing
            # Those that a free row takes at once do not wait.
            free = self.rows - len(self._active)
            if len(self._waiting) + len(asks) > self.queue_size + free:
                raise Full
            self._waiting += [_Sequence(ticket, number, ask) for number, ask in enumerate(asks)]
            self._changed.notify()
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Take a ticket's waiting replies out; the thread drops those under way."""
        with self._changed:
            self._waiting = deque(s for s in self._waiting if s.ticket is not ticket)

    def drain(self) -> None:
        """Take no more requests, and give up those that wait; what is under way goes on."""
        with self._changed:
            self._draining = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        self._tell([(s.ticket, Closing()) for s in waiting])

    def stop(self, wait_s: float = 5.0) -> None:
        """End the thread after its present step; replies under way are given up."""
        self.drain()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            rows = self._make_rows()
            self._ready.set()
            while self._wait():
                self._round(rows)
        except BaseException as error:
            self._failed = error
            if self._ready.is_set():
                note(f"The engine has failed; no more replies.\n{traceback.format_exc()}")
        finally:
            self.drain()
            self._give_up(list(self._active), Closing())
            self._ready.set()

    def _wait(self) -> bool:
        """Wait for something to do; False when it is time to end."""
        with self._changed:
            while not (self._waiting or self._active or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _round(self, rows: Rows) -> None:
        """Read some of the prompts that wait, then one more token for every reply under way."""
        for row, sequence in list(self._active.items()):
            if sequence.ticket.is_over:
                self._leave(rows, row)
        start = time.monotonic()
        while self._read(rows) and time.monotonic() - start < READING_S:
            pass
        active = [row for row, sequence in self._active.items() if sequence.reply is not None]
        if active:
            tokens = [self._reply(row).last for row in active]
            with self._trying(rows, active):
                self._choose(rows, active, rows.step(active, tokens))
        self._send()

    def _read(self, rows: Rows) -> bool:
        """Read a part of the prompt whose turn it is; False when none waits for a free row."""
        row = next((row for row, s in self._active.items() if s.reply is None), None)
        if row is None:
            row = self._admit(rows)
        if row is not None:
            with self._trying(rows, [row]):
                self._read_part(rows, row)
        return row is not None

    def _admit(self, rows: Rows) -> int | None:
        """The free row that the reply that has waited longest gets; None when there is none.

        It is the row that holds most of the beginning of its prompt, such as the conversation so
        far, else the one used longest ago.
        """
        with self._changed:
            free = [row for row in self._held if row not in self._active]
            if not free or not self._waiting:
                return None
            sequence = self._waiting.popleft()
            ids = sequence.ask.ids
            shared = {row: rows.kept(row, num_shared(self._held[row], ids)) for row in free}
            row = max(free, key=lambda row: shared[row])
            self._active[row] = sequence
        sequence.parts = rows.read(row, ids, held=shared[row], part_tokens=PART_TOKENS)
        return row

    def _read_part(self, rows: Rows, row: int) -> None:
        sequence = self._active[row]
        logits = next(sequence.parts, None)
        if logits is not None:
            sequence.logits = logits
            return
        assert sequence.logits is not None
        sequence.reply = Reply(sequence.ask, self._tokenizer, self._device)
        self._choose(rows, [row], sequence.logits)
        sequence.logits = None

    @contextlib.contextmanager
    def _trying(self, rows: Rows, active: list[int]) -> Iterator[None]:
        """Where what is done fails, the replies in these rows have failed, and no others."""
        try:
            yield
        except Exception as error:
            note("".join(traceback.format_exception(error)).rstrip())
            for row in active:
                if row in self._active:
                    self._give_up([row], _failure(error))
                    self._hold(rows, row, [])

    @torch.inference_mode()
    def _choose(self, rows: Rows, active: list[int], logits: Tensor) -> None:
        """The next token of each row, from its row of logits [len(active), V].

        What fails for one row (its logits are not numbers, say) is no other's failure.
        """
        chosen = self._sample(rows, active, logits)
        for number, row in enumerate(active):
            if row in chosen:
                with self._trying(rows, [row]):
                    self._put(rows, row, chosen[row], logits[number : number + 1])
        self._send()

    def _put(self, rows: Rows, row: int, token_id: int, logits: Tensor) -> None:
        """Go on with a reply by one token."""
        sequence = self._active[row]
        piece = self._reply(row).put(token_id, logits)
        if piece is None:
            return
        self._outbox.append((sequence.ticket, (sequence.number, piece)))
        if piece.finish is not None:
            self._leave(rows, row)

    def _sample(self, rows: Rows, active: list[int], logits: Tensor) -> dict[int, int]:
        """The next id of each row that has not failed."""
        bent: dict[int, Tensor] = {}
        # Rows that choose alike are sampled together.
        groups: dict[Settings, list[int]] = {}
        for number, row in enumerate(active):
            with self._trying(rows, [row]):
                reply = self._reply(row)
                bent[row] = reply.bend(logits[number : number + 1])
                ask = reply.ask
                alike = (ask.temperature, ask.top_k, ask.top_p, ask.min_p)
                groups.setdefault(None if reply.is_greedy else alike, []).append(row)
        chosen: dict[int, int] = {}
        for settings, members in groups.items():
            try:
                chosen |= self._draw(settings, {row: bent[row] for row in members})
            except Exception:
                # Whose failure it is shows when each is alone.
                for row in members:
                    with self._trying(rows, [row]):
                        chosen |= self._draw(settings, {row: bent[row]})
        return chosen

    def _draw(self, settings: Settings, bent: dict[int, Tensor]) -> dict[int, int]:
        """An id for each row, from its logits [1, V]."""
        some = torch.cat(list(bent.values()))
        # Drawing from such would end a GPU's context, and with it everybody's replies.
        if not some.amax(-1).isfinite().all():
            raise ArithmeticError("the logits are not finite numbers")
        if settings is None:
            ids = some.argmax(-1)
        else:
            temperature, top_k, top_p, min_p = settings
            ids = sample(
                some,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                generator=[self._reply(row).generator for row in bent],
            )
        return dict(zip(bent, ids.tolist(), strict=True))

    def _reply(self, row: int) -> Reply:
        reply = self._active[row].reply
        assert reply is not None
        return reply

    def _leave(self, rows: Rows, row: int) -> None:
        with self._changed:
            sequence = self._active.pop(row)
        # What is read in parts is whole only at its end, and the last token was never read.
        held = [] if sequence.reply is None else sequence.ask.ids + sequence.reply.read_ids
        self._hold(rows, row, held if self._holds else [])

    def _hold(self, rows: Rows, row: int, ids: list[int]) -> None:
        rows.drop(row)
        # At the end: it is the one used last.
        del self._held[row]
        self._held[row] = ids

    def _give_up(self, active: list[int], error: Exception) -> None:
        with self._changed:
            given_up = [self._active.pop(row) for row in active]
        self._tell([(sequence.ticket, error) for sequence in given_up])

    def _send(self) -> None:
        out, self._outbox = self._outbox, []
        self._tell(out)

    @staticmethod
    def _tell(items: list[tuple[Ticket, tuple[int, Piece] | Exception]]) -> None:
        if items:
            items[0][0].tell(items)


def num_shared(held: list[int], ids: list[int]) -> int:
    """How many ids of a new text need not be read, because a row holds them; the last always is."""
    shared = 0
    for one, other in zip(held, ids[:-1], strict=False):
        if one != other:
            break
        shared += 1
    return shared if shared >= WORTH_HOLDING else 0


def _failure(error: Exception) -> ModelFailed:
    first = (str(error).strip().splitlines() or [""])[0]
    return ModelFailed(f"the model failed ({type(error).__name__}: {first}).")
