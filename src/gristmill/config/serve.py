"""Options of `gristmill serve`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gristmill.config.sections import Auto
from gristmill.config.use_commands import Loading


@dataclass(kw_only=True)
class Serve(Loading):
    """Answer the OpenAI API, completions and chats, over HTTP with a model; Ctrl-C stops."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs an api_key."""
    port: int = 8000
    """Port to listen on; 0: one that is free."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send; unset: GRISTMILL_API_KEY, or none. Others on this machine can
    see options, so rather set the variable."""
    model_name: str | None = None
    """What clients call the model; unset: its directory's name."""
    batch_size: int | Auto = "auto"
    """Replies written at the same time; auto: 8, on a GPU 32."""
    max_length: int | Auto = "auto"
    """Longest prompt and reply together, in tokens; auto: the model's context, or less where that
    of all replies written at the same time would take more than a quarter of the memory."""
    queue_size: int = 64
    """Replies that may wait for their turn; a request beyond them is answered with 429."""
    max_request_bytes: int = 2_000_000
    """Size of a request; a larger one is answered with 413."""
    max_new_tokens: int | Auto = "auto"
    """Tokens of a reply at most where the request does not say; auto: 16 for completions, what
    fits for chats, as OpenAI does."""
    temperature: float = 1.0
    """0 takes the likeliest token; larger is more random. Where the request does not say."""
    top_k: int | None = None
    """Choose among this many likeliest tokens. Where the request does not say."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability. Where the request
    does not say."""
    grace_s: float = 30.0
    """Seconds that replies under way have to end when the server is stopped."""
