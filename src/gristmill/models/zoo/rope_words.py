"""Rotary settings in `config.json`, of both generations: base, scaling, local base, rotated share.

transformers 4 has a base and `rope_scaling` beside each other, transformers 5 one `rope_parameters`
with both, or one for each type of layer. We read either, and write the older words: 5 reads them as
4 does.
"""

from __future__ import annotations

from typing import Any

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.util.errors import UserError

Json = dict[str, Any]

LOCAL_THETA = "rope_local_base_freq"
FRACTION = {"rope_theta": "partial_rotary_factor", "rotary_emb_base": "rotary_pct"}
"""The word for the rotated share of each head, beside the word for the base."""

KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")
ALIASES = {"su": "longrope"}
"""Names that older files have for a kind."""

NUMBERS = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("attention_factor",),
}
"""Words of a kind beside `factor` that are fields of ours by the same name."""

KNOWN = {
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "truncate"),
    *("original_max_position_embeddings", "short_factor", "long_factor"),
    *(word for words in NUMBERS.values() for word in words),
    "finetuned",  # says where the weights come from
}


def parse_rope(raw: Json, theta_key: str = "rope_theta") -> Json:
    """Fields of `ModelConfig` about rotation, from either generation of `config.json`.

    `rope_scaling` is always among them; `rope_theta`, `rope_local_theta` and `rope_fraction` only
    if the file says something about them, so that an architecture's own default can stand.
    `theta_key` is the word for the base outside of `rope_parameters`. Raises UserError for a kind
    of scaling, or a setting of one, that is not supported.
    """
    by_type = raw.get("rope_parameters") or {}
    local = None
    if "full_attention" in by_type or "sliding_attention" in by_type:
        rope, local = _by_layer_type(by_type)
    else:
        rope = by_type or raw.get("rope_scaling") or {}
    out: Json = {"rope_scaling": _parse_scaling(rope, raw)}
    theta = rope.get("rope_theta") or raw.get(theta_key)
    if theta is not None:
        out["rope_theta"] = float(theta)
    fraction = rope.get("partial_rotary_factor")
    if fraction is None:
        fraction = raw.get(FRACTION.get(theta_key, "partial_rotary_factor"))
    if fraction is not None:
        out["rope_fraction"] = float(fraction)
    local_theta = raw.get(LOCAL_THETA) if local is None else local.get("rope_theta", theta)
    if local_theta is not None and (local is None or local != rope):
        out["rope_local_theta"] = float(local_theta)
    return out


def _by_layer_type(rope: Json) -> tuple[Json, Json | None]:
    """Settings of the blocks without and with a sliding window; the latter must have no scaling.

    The second is None where the two are the same.
    """
    strange = sorted(set(rope) - {"full_attention", "sliding_attention"})
    missing = [key for key in ("full_attention", "sliding_attention") if not rope.get(key)]
    if strange or missing:
        named = f"has {strange[0]!r}" if strange else f"lacks {missing[0]!r}"
        raise UserError(
            f"rope_parameters {named}. Supported layer types: full_attention, sliding_attention."
        )
    full, local = rope["full_attention"], rope["sliding_attention"]
    if full == local:
        return full, None
    if _kind(local) != "default":
        raise UserError(
            f"rope_parameters of sliding_attention are of type {_kind(local)!r}. "
            "Supported: default, or the same as full_attention."
        )
    if full.get("partial_rotary_factor") != local.get("partial_rotary_factor"):
        raise UserError(
            "rope_parameters have two values of partial_rotary_factor. Supported: one for all."
        )
    return full, local


def _kind(rope: Json) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "yarn" and rope.get("short_factor"):  # what the first files of longrope said
        return "longrope"
    return ALIASES.get(kind, kind)


def _parse_scaling(rope: Json, raw: Json) -> RopeScaling | None:
    kind = _kind(rope)
    strange = sorted(key for key in set(rope) - KNOWN if rope[key] is not None)
    if strange and kind in ("default", *KINDS):
        raise UserError(
            f"rotary scaling has {strange[0]}={rope[strange[0]]!r}, which is not supported. "
            f"Supported: {', '.join(sorted(KNOWN))}."
        )
    if kind == "default":
        return None
    if kind not in KINDS:
        supported = ", ".join(("default", *KINDS))
        raise UserError(f"rotary scaling is {kind!r}. Supported: {supported}.")
    out: Json = {"kind": kind}
    if kind == "dynamic":
        out["original_max_seq_length"] = int(_required(raw, "max_position_embeddings"))
    elif kind != "linear":
        out["original_max_seq_length"] = _original(kind, rope, raw)
    out["factor"] = _factor(rope, raw, out.get("original_max_seq_length"))
    for word in NUMBERS.get(kind, ()):
        if kind == "llama3":
            _required(rope, word)
        if rope.get(word) is not None:
            out[word] = float(rope[word])
    if kind == "yarn":
        out["truncate"] = rope.get("truncate") is not False
    if kind == "longrope":
        for length in ("short", "long"):
            factors = _required(rope, f"{length}_factor")
            out[f"{length}_factors"] = tuple(float(value) for value in factors)
    return RopeScaling(**out)


def _original(kind: str, rope: Json, raw: Json) -> int:
    """Context before scaling: longrope has it beside `rope_scaling`, the others in it."""
    places = (raw, rope) if kind == "longrope" else (rope,)
    for place in places:
        if place.get("original_max_position_embeddings"):
            return int(place["original_max_position_embeddings"])
    return int(_required(raw, "max_position_embeddings"))


def _factor(rope: Json, raw: Json, original: int | None) -> float:
    """`factor`, which yarn and longrope may leave to be the ratio of the two contexts."""
    if rope.get("factor") is None and _kind(rope) in ("yarn", "longrope"):
        assert original is not None
        return float(_required(raw, "max_position_embeddings")) / original
    return float(_required(rope, "factor"))


def _required(raw: Json, key: str) -> Any:
    if raw.get(key) is None:
        raise UserError(f"{key} is missing. Get the model's own config.json.")
    return raw[key]


def check_rope(rope: Json, supported: tuple[str, ...]) -> None:
    """UserError where a file has a switch of rotation that its architecture lacks.

    `rope` is what `parse_rope` gives. Such a model would run, and differently.
    """
    fraction, local = rope.get("rope_fraction", 1.0), rope.get("rope_local_theta")
    if fraction != 1.0 and "rope_fraction" not in supported:
        raise UserError(f"partial_rotary_factor is {fraction}. Supported: 1.0.")
    if local is not None and "rope_local_theta" not in supported:
        raise UserError(
            f"The rotary base of blocks with a sliding window is {local}. "
            "Supported: the same as in the others."
        )


def rope_words(config: ModelConfig, theta_key: str = "rope_theta") -> Json:
    """Rotary settings of a model in words that transformers 4 and 5 both read.

    `rope_scaling` is None where there is none; the local base and the rotated share are left out
    where they say nothing.
    """
    out: Json = {theta_key: config.rope_theta, "rope_scaling": _scaling_words(config)}
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        original = config.rope_scaling.original_max_seq_length
        out["original_max_position_embeddings"] = original
    if config.rope_local_theta is not None:
        out[LOCAL_THETA] = config.rope_local_theta
    if config.rope_fraction != 1.0:
        out[FRACTION.get(theta_key, "partial_rotary_factor")] = config.rope_fraction
    return out


def _scaling_words(config: ModelConfig) -> Json | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    kind, original = scaling.kind, scaling.original_max_seq_length
    if kind == "longrope":
        # Three keys under these names are all that Phi-3's configuration class of 4 lets pass.
        out: Json = {
            "type": kind,
            "short_factor": list(scaling.short_factors or ()),
            "long_factor": list(scaling.long_factors or ()),
        }
        if scaling.factor != config.max_seq_length / original:
            # 4 takes the ratio of the contexts all the same: what comes of it is said too.
            out |= {"factor": scaling.factor, "attention_factor": scaling.table_factor}
            out["original_max_position_embeddings"] = original
    else:
        out = {"rope_type": kind, "factor": scaling.factor}
    if kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = original
    if kind == "yarn" and not scaling.truncate:
        out["truncate"] = False
    usual = RopeScaling()
    for word in NUMBERS.get(kind, ()):
        value = getattr(scaling, word)
        if kind == "llama3" or value != getattr(usual, word):
            out[word] = value
    return out
