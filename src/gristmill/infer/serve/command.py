"""The `serve` command: a model behind the OpenAI API, for one person or a small team."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec

from gristmill.config.serve import Serve
from gristmill.infer.conversation import chat_ids, check_system, reply_stop_ids
from gristmill.infer.load import LoadedModel, load_for_command, note
from gristmill.infer.serve import server
from gristmill.infer.serve.app import Service, build_app, is_this_machine
from gristmill.infer.serve.engine import Engine
from gristmill.infer.serve.requests import Defaults, Limits, Reader
from gristmill.models.decoding import check_sampling
from gristmill.util.errors import Interrupted, UserError
from gristmill.util.extras import install_command

KEY_VARIABLE = "GRISTMILL_API_KEY"
SHORTEST_KEY = 8
SHORTEST_LENGTH = 256
"""Tokens of prompt and reply that are worth serving, where nobody says how many."""


def serve(cfg: Serve) -> None:
    """Answer requests until Ctrl-C or SIGTERM, which ends gracefully; a second one ends at once.

    Remarks and a line about each request go to stderr. Raises UserError for what cannot be served
    before the model is loaded, where that can be known.
    """
    _check(cfg)
    key = api_key(cfg)
    with server.bind(cfg.host, cfg.port) as listener:
        address = listener.getsockname()[0]
        if key is None and not is_this_machine(address):
            raise UserError(
                f"other machines can reach --host {cfg.host}, so clients must send a key, and "
                f"there is none. set one first: export {KEY_VARIABLE}=$(openssl rand -hex 16)"
            )
        loaded = load_for_command(cfg)
        if (remark := loaded.template_note()) is not None:
            note(remark)
        service = build_service(cfg, loaded, key)
        engine = service.engine
        app = build_app(service)
        engine.start()

        def ready() -> None:
            note(_described(cfg, service, server.url(listener)))

        web = server.build_server(
            app,
            engine,
            grace_s=cfg.grace_s,
            # Streams, those that wait, and some that only ask how things are.
            max_connections=max(256, 2 * (engine.rows + engine.queue_size)),
            ready=ready,
        )
        web.run(sockets=[listener])
        # Also when there is hurry: Python must not end under a thread that computes.
        engine.stop()
        if web.forced_by is not None:
            raise Interrupted(web.forced_by, "Stopped at once; replies under way were cut.")
        note("Stopped.")


def api_key(cfg: Serve) -> str | None:
    """The key that clients must send: the option's, else the environment's, else None."""
    key = cfg.api_key if cfg.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and (
        len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key
    ):
        raise UserError(
            f"the API key has {len(key)} characters or some that a header cannot hold. give at "
            f"least {SHORTEST_KEY} letters and digits: export {KEY_VARIABLE}=$(openssl rand -hex "
            "16)"
        )
    return key


def build_service(cfg: Serve, loaded: LoadedModel, key: str | None) -> Service:
    """Everything that answers requests, the engine not yet started."""
    rows, max_length = batch_shape(cfg, loaded)
    name = cfg.model_name or loaded.name
    given = None if cfg.max_new_tokens == "auto" else cfg.max_new_tokens
    tokenizer = loaded.tokenizer
    has_chat = tokenizer.chat_template is not None
    reader = Reader(
        model=name,
        limits=Limits(
            max_length=max_length,
            num_ids=loaded.model.config.token_ids,
            max_replies=rows + cfg.queue_size,
        ),
        defaults=Defaults(
            max_new_tokens=given,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        ),
        stop_ids=frozenset(tokenizer.stop_ids),
        chat_stop_ids=reply_stop_ids(loaded),
        prompt_ids=loaded.prompt_ids,
        chat_ids=partial(chat_ids, loaded) if has_chat else None,
        takes_system=has_chat and _takes_system(loaded),
        decode=tokenizer.decode,
    )
    engine = Engine(
        lambda: loaded.batch(rows, max_length),
        tokenizer,
        loaded.device,
        rows=rows,
        queue_size=cfg.queue_size,
        holds=not loaded.model.config.rotates_by_length,
    )
    return Service(
        model=name,
        engine=engine,
        reader=reader,
        host=cfg.host,
        max_request_bytes=cfg.max_request_bytes,
        api_key=key,
    )


def batch_shape(cfg: Serve, loaded: LoadedModel) -> tuple[int, int]:
    """How many replies are written at the same time, and how long prompt and reply may be."""
    on_cpu = loaded.device.type == "cpu"
    rows = (8 if on_cpu else 32) if cfg.batch_size == "auto" else cfg.batch_size
    if cfg.max_length == "auto":
        fits = loaded.cached_length(rows)
        if fits < min(loaded.limit, SHORTEST_LENGTH):
            raise UserError(
                f"the cache of {rows} replies does not fit into a quarter of the memory "
                f"({fits} tokens each). write fewer at a time, or say --max_length.",
                {"--batch_size": max(1, loaded.cached_rows(min(loaded.limit, SHORTEST_LENGTH)))},
            )
        return rows, fits
    if not 2 <= cfg.max_length <= loaded.limit:
        raise UserError(
            f"--max_length {cfg.max_length} is not from 2 to the model's context "
            f"({loaded.limit} tokens). leave it out for the longest that fits.",
            {"--max_length": loaded.limit if cfg.max_length > 1 else None},
        )
    return rows, cfg.max_length


def _takes_system(loaded: LoadedModel) -> bool:
    """Whether the chat template has a place for a system prompt."""
    try:
        check_system(loaded, "0123456789")
    except UserError:
        return False
    return True


def _check(cfg: Serve) -> None:
    """Raise UserError for options that mean nothing, and where packages are missing."""
    if cfg.checkpoint_dir is None:
        raise UserError(
            "no model given. name a model directory as the first word: gristmill serve "
            "out/quickstart/run"
        )
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving needs packages that are not installed ({', '.join(missing)}). Install them: "
            f"{install_command('serve')}"
        )
    least = {
        "batch_size": 1,
        "queue_size": 0,
        "max_request_bytes": 1000,
        "grace_s": 0,
    }
    for name, low in least.items():
        value = getattr(cfg, name)
        if value != "auto" and value < low:
            raise UserError(f"--{name} {value} is too small. give {low} or more.")
    length = 1 if cfg.max_new_tokens == "auto" else cfg.max_new_tokens
    check_sampling(length, cfg.temperature, cfg.top_k, cfg.top_p)


def _described(cfg: Serve, service: Service, url: str) -> str:
    engine, limits = service.engine, service.reader.limits
    has_chat = service.reader.chat_ids is not None
    # A key that was typed is in no variable, and is not printed.
    which = f"${KEY_VARIABLE}" if cfg.api_key is None else "YOUR_KEY"
    key = "" if service.api_key is None else f' -H "Authorization: Bearer {which}"'
    asked = (
        '"messages": [{"role": "user", "content": "Hello"}]'
        if has_chat
        else '"prompt": "Once upon a time"'
    )
    path = "chat/completions" if has_chat else "completions"
    lines = [
        f"Serving {service.model}: {engine.rows} replies at a time of up to {limits.max_length} "
        f"tokens with their prompts, {engine.queue_size} more may wait; "
        + ("clients need the key." if key else "no key, for this machine only."),
        f"Listening on {url}/v1 (OpenAI API); Ctrl-C stops. For example:",
        f"  curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{{{asked}}}'",
    ]
    if not has_chat:
        lines.insert(1, "The model has no chat template: completions only.")
    return "\n".join(lines)
