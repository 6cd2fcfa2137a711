"""GGUF, the files of llama.cpp: its architectures as data, both ways, without torch.

Metadata and tensors have the same names in all architectures, so one table does for them; what an
architecture does otherwise stands in its row. What llama.cpp does with a file is the reference
(https://github.com/ggml-org/llama.cpp): a row is here when its results were compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gristmill.config.model import MixtureOfExperts, ModelConfig, RopeScaling
from gristmill.models.zoo.family import differences
from gristmill.models.zoo.weights import Shapes, Weight
from gristmill.util.errors import UserError

Metadata = Mapping[str, Any]
Values = Callable[[str], list[float]]

ARCHITECTURE = "general.architecture"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
PROGRAM = "llama-cli"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TABLES = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
# Of no meaning to llama.cpp: the weight of the load-balancing loss, for training on, and a sliding
# window that is as long as the context.
_BALANCE = "gristmill.balance_loss"
_WINDOW = "gristmill.sliding_window"
QKV = "blk.{i}.attn_qkv"
# Numbers that multiply something, without a field of ours; one is none.
_SCALES = ("logit_scale", "embedding_scale", "residual_scale")
_BLOCK = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "post_attention_norm": "attn_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def _both(theirs: str, *ours: str, layout: str = "same") -> tuple[Weight, ...]:
    """Lines for a module's weight and bias."""
    return tuple(
        Weight(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), layout)
        for kind in ("weight", "bias")
    )


COMMON = (
    Weight(EMBEDDING, ("embed.weight",)),
    Weight("position_embd.weight", ("positions.weight",)),
    *_both("output_norm", "norm"),
    *_both("output", "head"),
    *(w for t, o in _BLOCK.items() for w in _both(f"blk.{{i}}.{t}", f"layers.{{i}}.{o}")),
    Weight("blk.{i}.ffn_gate_inp.weight", ("layers.{i}.mlp.router.weight",)),
    *(
        Weight(f"blk.{{i}}.ffn_{part}_exps.weight", (f"layers.{{i}}.mlp.experts.{part}.weight",))
        for part in ("gate", "up", "down")
    ),
)
"""The tensors of every architecture; `{i}` is the block."""

FUSED_QKV = _both(QKV, *(f"layers.{{i}}.attn.{part}" for part in "qkv"), layout="blocks")
SECOND_NORM = (
    *_both("blk.{i}.attn_norm_2", "layers.{i}.attn_norm"),
    *_both("blk.{i}.attn_norm", "layers.{i}.mlp_norm"),
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is particular to one architecture of llama.cpp."""

    name: str
    """The value of `general.architecture`."""
    classes: tuple[str, ...]
    """Architectures of transformers that are converted to it; the first that fits is taken."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that it implies."""
    weights: tuple[Weight, ...] = ()
    """Lines that take the place of those in `COMMON`."""
    fused_qkv: bool = False
    """Files are written with query, key and value in one tensor; they are read either way."""
    eps: str = "attention.layer_norm_rms_epsilon"
    """The key of the number added to the variance."""
    windows: bool = False
    """llama.cpp knows the sliding window of some blocks."""
    parallel: str | None = None
    """Parallel residual: the key that says it, or `norms` where the tensors do."""
    second_norm: bool = False
    """Where attention and feed-forward have a normalisation each, that of attention is the second
    in the file."""
    long_rope: bool = False
    """LongRoPE (arXiv:2402.13753) is one of its rotary scalings."""
    clip: bool = False
    """Queries, keys and values may be cut to a range."""
    demands: Mapping[str, Any] = field(default_factory=dict)
    """Fields that llama.cpp takes for granted here, though the files could say otherwise."""
    more: Callable[[dict[str, Any], Metadata], dict[str, Any]] | None = None
    """Fields that take more than a key: the fields so far, metadata -> fields."""

    def key(self, name: str) -> str:
        """The full key of a value of this architecture."""
        return f"{self.name}.{name}"

    def table(self, names: Collection[str]) -> tuple[Weight, ...]:
        """Names and layouts of the tensors in a file that has tensors of these names."""
        fused = any(".attn_qkv." in name for name in names)
        second = any(".attn_norm_2." in name for name in names)
        lines = (*COMMON, *self.weights, *(FUSED_QKV if fused else ()))
        return (*lines, *(SECOND_NORM if second else ()))

    def table_for(self, config: ModelConfig) -> tuple[Weight, ...]:
        """The same for a file to be written."""
        second = self.second_norm and not config.shared_norm
        names = [".attn_qkv."] * self.fused_qkv + [".attn_norm_2."] * second
        return self.table(names)


def architecture(metadata: Metadata) -> Architecture:
    """The row for a file. UserError names what is supported."""
    name = metadata.get(ARCHITECTURE)
    if name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"GGUF architecture {name!r} is not supported. Supported: {supported}.")
    return ARCHITECTURES[name]


def parse(row: Architecture, metadata: Metadata, shapes: Shapes, values: Values) -> ModelConfig:
    """Our configuration of a file: its metadata, shapes of its tensors, numbers of a small one.

    `family` is left to the caller. UserError names a key that is missing or not supported.
    """
    out = _sizes(row, metadata, shapes)
    out |= _switches(row, metadata, shapes)
    out |= _rope(row, metadata, shapes, values, out)
    out |= row.fixed
    out |= row.more(out, metadata) if row.more else {}
    clip = metadata.get(row.key("attention.clamp_kqv")) or None
    if clip is not None and row.clip:
        out["qkv_clip"] = clip
    for key in (*_SCALES, "attention.scale", *(() if row.clip else ("attention.clamp_kqv",))):
        value = metadata.get(row.key(key))
        neutral = (None, 0.0, 1.0) if key in _SCALES else (None, 0.0)
        if value not in neutral:
            raise UserError(f"{row.key(key)} is {value}, which is not supported.")
    if out["head_dim"] * out["num_heads"] == out["hidden_size"]:
        out["head_dim"] = None
    return ModelConfig(**out)


def describe(row: Architecture, config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model: whole numbers, numbers with a point, words, yes and no."""
    words: dict[str, Any] = {
        "context_length": config.max_seq_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
        row.eps: float(config.norm_eps),
        "vocab_size": config.vocab_size,
    }
    if config.head_size * config.num_heads != config.hidden_size or row.windows:
        words |= {"attention.key_length": config.head_size}
        words |= {"attention.value_length": config.head_size}
    if any(config.rotates):
        words["rope.dimension_count"] = round(config.head_size * config.rope_fraction)
        words["rope.freq_base"] = float(config.rope_theta)
    if row.parallel is not None and row.parallel != "norms":
        words[row.parallel] = config.parallel_residual
    if config.moe is not None:
        words["expert_count"] = config.moe.num_experts
        words["expert_used_count"] = config.moe.num_experts_per_token
        words["expert_feed_forward_length"] = config.moe.intermediate_size
    if row.windows and config.sliding_window is not None:
        words["attention.sliding_window"] = config.sliding_window
    if config.qkv_clip is not None and row.clip:
        words["attention.clamp_kqv"] = float(config.qkv_clip)
    if config.attention_softcap is not None:
        words["attn_logit_softcapping"] = float(config.attention_softcap)
    if config.logit_softcap is not None:
        words["final_logit_softcapping"] = float(config.logit_softcap)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        words["rope.scaling.attn_factor"] = scaling.table_factor
    if scaling is not None and scaling.kind in ("llama3", "yarn", "longrope"):
        words["rope.scaling.original_context_length"] = scaling.original_max_seq_length
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        words["rope.scaling.type"] = scaling.kind
        words["rope.scaling.factor"] = float(scaling.factor)
    out = {ARCHITECTURE: row.name, **{row.key(key): value for key, value in words.items()}}
    if config.moe is not None and config.moe.balance_loss:
        out[_BALANCE] = float(config.moe.balance_loss)
    if not row.windows and config.sliding_window is not None:
        out[_WINDOW] = config.sliding_window
    return out


def row_for(
    config: ModelConfig, family_class: str, shapes: Callable[[Architecture], Shapes]
) -> Architecture:
    """The architecture whose files say all of a model; that of its family before others.

    `shapes(row)` are those of the tensors as the row has them. UserError names what cannot be said,
    and the architectures that can be written.
    """
    rows = sorted(ARCHITECTURES.values(), key=lambda row: family_class not in row.classes)
    lost: list[str] = []
    for row in rows:
        found = _lost(row, config, shapes)
        if not found:
            return row
        lost = lost or found
    raise UserError(
        f"llama.cpp has no words for {', '.join(lost)} of this model, or gristmill does not know "
        f"them. Written are the architectures {', '.join(ARCHITECTURES)}. For others export to "
        "Hugging Face (--format hf) and use llama.cpp's convert_hf_to_gguf.py."
    )


def rope_factors(config: ModelConfig) -> dict[str, list[float]]:
    """Tensors with divisors of the rotary frequencies, that some scalings have: name -> values."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":  # arXiv:2407.21783
        size = round(config.head_size * config.rope_fraction)
        return {ROPE_FACTORS: _factors(size, config.rope_theta, scaling)}
    if scaling is not None and scaling.kind == "longrope":  # arXiv:2402.13753
        long, short = scaling.long_factors or (), scaling.short_factors or ()
        return {LONG_FACTORS: list(long), SHORT_FACTORS: list(short)}
    return {}


def _lost(
    row: Architecture, config: ModelConfig, shapes: Callable[[Architecture], Shapes]
) -> list[str]:
    """What would be lost in a file of this architecture."""
    try:
        tensors = shapes(row)
    except KeyError as error:
        return [f"the parameter {error.args[0]}"]
    values = rope_factors(config)
    tensors = dict(tensors) | {name: (len(numbers),) for name, numbers in values.items()}
    try:
        back = parse(row, describe(row, config), tensors, values.__getitem__)
    except UserError as error:
        return [str(error)]
    demands = dict(row.demands)
    if config.sliding_window is not None and config.sliding_window < config.max_seq_length:
        demands |= {} if row.windows else {"sliding_window": None}
    refused = [f"{k}={getattr(config, k)}" for k, v in demands.items() if getattr(config, k) != v]
    return list(dict.fromkeys([*refused, *differences(config, back)]))


def _need(row: Architecture, metadata: Metadata, name: str, default: Any = None) -> Any:
    """The value of a key, the same for every block."""
    value = metadata.get(row.key(name), default)
    if value is None:
        raise UserError(f"{row.key(name)} is missing. Convert the model again.")
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{row.key(name)} differs between blocks, which is not supported.")
        return value[0]
    return value


def _sizes(row: Architecture, metadata: Metadata, shapes: Shapes) -> dict[str, Any]:
    if EMBEDDING not in shapes:
        raise UserError(f"tensor {EMBEDDING} is missing. Download or convert the model again.")
    hidden = _need(row, metadata, "embedding_length")
    heads = _need(row, metadata, "attention.head_count")
    size = _need(row, metadata, "attention.key_length", hidden // heads)
    if _need(row, metadata, "attention.value_length", size) != size:
        raise UserError(f"{row.key('attention.value_length')} is not {size}, the width of a key.")
    kv_heads = _need(row, metadata, "attention.head_count_kv", heads)
    inner = _need(row, metadata, "feed_forward_length", 4 * hidden)
    out: dict[str, Any] = {
        "name": "-".join(metadata.get("general.name", "").split()) or "custom",
        "vocab_size": shapes[EMBEDDING][0],
        "max_seq_length": _need(row, metadata, "context_length"),
        "num_layers": _need(row, metadata, "block_count"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "intermediate_size": inner,
        "norm_eps": _need(row, metadata, row.eps),
        "attention_softcap": metadata.get(row.key("attn_logit_softcapping")),
        "logit_softcap": metadata.get(row.key("final_logit_softcapping")),
        "sliding_window": metadata.get(row.key("attention.sliding_window"))
        or metadata.get(_WINDOW),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    if metadata.get(row.key("expert_count")):
        out["moe"] = MixtureOfExperts(
            num_experts=_need(row, metadata, "expert_count"),
            num_experts_per_token=_need(row, metadata, "expert_used_count"),
            intermediate_size=_need(row, metadata, "expert_feed_forward_length", inner),
            balance_loss=metadata.get(_BALANCE, 0.0),
        )
    return out


def _switches(row: Architecture, metadata: Metadata, shapes: Shapes) -> dict[str, Any]:
    """What the names of the tensors say."""

    def has(*names: str) -> bool:
        return any(name in shapes for name in names)

    out: dict[str, Any] = {
        "tie_embeddings": not has(HEAD),
        "head_bias": has("output.bias"),
        "norm_bias": row.fixed.get("norm") != "layernorm" or has("output_norm.bias"),
        "qkv_bias": has("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
        "attention_out_bias": has("blk.0.attn_output.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
    }
    if row.second_norm:
        out["shared_norm"] = not has("blk.0.attn_norm_2.weight")
    if row.parallel == "norms":
        out["parallel_residual"] = out["shared_norm"] = not has("blk.0.ffn_norm.weight")
    elif row.parallel is not None:
        out["parallel_residual"] = bool(_need(row, metadata, row.parallel, True))
    return out


def _rope(
    row: Architecture, metadata: Metadata, shapes: Shapes, values: Values, out: dict[str, Any]
) -> dict[str, Any]:
    """Base, share of the head and scaling of the rotary frequencies."""
    if row.fixed.get("positions") == "learned":
        return {}
    theta = float(_need(row, metadata, "rope.freq_base", 10000.0))
    rotated = _need(row, metadata, "rope.dimension_count", out["head_dim"])
    rope = {"rope_theta": theta, "rope_fraction": rotated / out["head_dim"]}
    kind = metadata.get(row.key("rope.scaling.type"), "none")
    if ROPE_FACTORS in shapes:
        original = metadata.get(row.key("rope.scaling.original_context_length"), 8192)
        scaled = _scaling_of(values(ROPE_FACTORS), rotated, theta, original)
        return rope | {"rope_scaling": scaled}
    if LONG_FACTORS in shapes and SHORT_FACTORS in shapes and row.long_rope:
        return rope | {"rope_scaling": _long_rope(row, metadata, values, out["max_seq_length"])}
    if LONG_FACTORS in shapes or kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"the rotary scaling ({kind}) is not supported from GGUF. "
            "Use the model's Hugging Face directory."
        )
    if kind == "none":
        return rope
    factor = float(_need(row, metadata, "rope.scaling.factor"))
    if kind == "linear":
        scaling = None if factor == 1 else RopeScaling(kind=kind, factor=factor)
        return rope | {"rope_scaling": scaling}
    original = _need(row, metadata, "rope.scaling.original_context_length")
    scaling = RopeScaling(kind=kind, factor=factor, original_max_seq_length=original)
    return rope | {"rope_scaling": scaling}


def _long_rope(row: Architecture, metadata: Metadata, values: Values, context: int) -> RopeScaling:
    original = _need(row, metadata, "rope.scaling.original_context_length")
    scaling = RopeScaling(
        kind="longrope",
        factor=context / original,
        original_max_seq_length=original,
        long_factors=tuple(values(LONG_FACTORS)),
        short_factors=tuple(values(SHORT_FACTORS)),
    )
    attention = _need(row, metadata, "rope.scaling.attn_factor", 1.0)
    if math.isclose(attention, scaling.usual_attention_factor, rel_tol=1e-6):
        return scaling
    return replace(scaling, attention_factor=attention)


def _scaling_of(numbers: list[float], size: int, theta: float, original: int) -> RopeScaling | None:
    """Llama 3's scaling with these divisors; a file has them and not all that they came from."""
    factor = max(numbers)
    if factor == 1:
        return None
    scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_length=original)
    expected = _factors(size, theta, scaling)
    if len(expected) == len(numbers) and all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, numbers)
    ):
        return scaling
    raise UserError(
        f"the divisors in {ROPE_FACTORS} are none that are known. "
        "Use the model's Hugging Face directory."
    )


def _factors(size: int, theta: float, scaling: RopeScaling) -> list[float]:
    low = scaling.original_max_seq_length / scaling.low_freq_factor
    high = scaling.original_max_seq_length / scaling.high_freq_factor
    out = []
    for dim in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (dim / size)
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(scaling.factor)
        else:
            share = scaling.original_max_seq_length / wavelength - scaling.low_freq_factor
            share /= scaling.high_freq_factor - scaling.low_freq_factor
            out.append(1 / ((1 - share) / scaling.factor + share))
    return out


BARE = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, "head_bias": False}
BIASED = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "head_bias": False}
TIED, UNTIED = {"tie_embeddings": True}, {"tie_embeddings": False}
LAYERNORM: dict[str, Any] = {"norm": "layernorm", "mlp": "plain"}
EPS = "attention.layer_norm_epsilon"
GEMMA: dict[str, Any] = {"norm_unit_offset": True, "activation": "gelu_tanh"}


def _gemma(out: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    return {"embedding_scale": out["hidden_size"] ** 0.5}


def _gemma_scale(layers_27b: int, pattern: tuple[bool, ...]) -> Callable[..., dict[str, Any]]:
    """The 27B sizes divide scores by the root of hidden_size / heads; no key says it."""

    def more(out: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
        scale = None
        if out["num_layers"] == layers_27b:
            scale = (out["hidden_size"] / out["num_heads"]) ** -0.5
        window = {"sliding_pattern": pattern} if out["sliding_window"] else {}
        return {**_gemma(out, metadata), "attention_scale": scale, **window}

    return more


_gemma_2 = _gemma_scale(46, (True, False))
_gemma_3_scale = _gemma_scale(62, (True, True, True, True, True, False))


def _gemma_3(out: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    local = metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    return {**_gemma_3_scale(out, metadata), "rope_local_theta": float(local)}


_PAIRS = tuple(
    line
    for part in "qk"
    for line in _both(
        f"blk.{{i}}.attn_{part}", f"layers.{{i}}.attn.{part}", layout="pairs_per_head"
    )
)
_GATE_UP = (
    Weight(
        "blk.{i}.ffn_up.weight",
        ("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"),
        "blocks",
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="llama",
            classes=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
            weights=_PAIRS,
            demands={"head_bias": False},
        ),
        Architecture(
            name="smollm3",
            classes=("SmolLM3ForCausalLM",),
            fixed={"rope_pattern": (True, True, True, False)},
            weights=_PAIRS,
            demands=BARE,
        ),
        Architecture(
            name="qwen2", classes=("Qwen2ForCausalLM",), demands=BARE | {"qkv_bias": True}
        ),
        Architecture(
            name="qwen3",
            classes=("Qwen3ForCausalLM",),
            fixed={"qk_norm": "head"},
            demands=BARE,
        ),
        Architecture(
            name="qwen3moe",
            classes=("Qwen3MoeForCausalLM",),
            fixed={"qk_norm": "head"},
            demands=BARE,
        ),
        Architecture(
            name="gemma",
            classes=("GemmaForCausalLM",),
            fixed=GEMMA,
            demands=BARE | TIED,
            more=_gemma,
        ),
        Architecture(
            name="gemma2",
            classes=("Gemma2ForCausalLM",),
            fixed=GEMMA | {"post_norm": True},
            windows=True,
            demands=BARE | TIED,
            more=_gemma_2,
        ),
        Architecture(
            name="gemma3",
            classes=("Gemma3ForCausalLM",),
            fixed=GEMMA | {"post_norm": True, "qk_norm": "head"},
            windows=True,
            demands=BARE | TIED,
            more=_gemma_3,
        ),
        Architecture(
            name="phi2",
            classes=("PhiForCausalLM",),
            fixed=LAYERNORM
            | {"activation": "gelu_tanh", "parallel_residual": True, "shared_norm": True},
            eps=EPS,
            demands=BIASED | UNTIED | {"head_bias": True},
        ),
        Architecture(
            name="phi3",
            classes=("Phi3ForCausalLM",),
            weights=_GATE_UP,
            fused_qkv=True,
            long_rope=True,
            demands=BARE,
        ),
        Architecture(
            name="gpt2",
            classes=("GPT2LMHeadModel",),
            fixed=LAYERNORM | {"activation": "gelu_tanh", "positions": "learned"},
            eps=EPS,
            fused_qkv=True,
            demands=BIASED,
        ),
        Architecture(
            name="gptneox",
            classes=("GPTNeoXForCausalLM",),
            fixed=LAYERNORM | {"activation": "gelu"},
            eps=EPS,
            fused_qkv=True,
            parallel="use_parallel_residual",
            demands=BIASED | UNTIED,
        ),
        Architecture(
            name="falcon",
            classes=("FalconForCausalLM",),
            fixed=LAYERNORM | {"activation": "gelu", "parallel_residual": True},
            eps=EPS,
            fused_qkv=True,
            second_norm=True,
            demands=BARE,
        ),
        Architecture(
            name="stablelm",
            classes=("StableLmForCausalLM",),
            fixed={"norm": "layernorm"},
            eps=EPS,
            parallel="norms",
            demands=UNTIED | {"attention_out_bias": False, "mlp_bias": False},
        ),
        Architecture(
            name="olmo2",
            classes=("Olmo2ForCausalLM",),
            fixed={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
            demands=BARE | UNTIED,
        ),
        Architecture(
            name="olmo",
            classes=("OlmoForCausalLM",),
            fixed={"norm": "layernorm", "norm_weight": False, "norm_bias": True},
            weights=_PAIRS,
            demands=BARE,
            eps=EPS,
            clip=True,
        ),
        Architecture(
            name="starcoder2",
            classes=("Starcoder2ForCausalLM",),
            fixed=LAYERNORM | {"activation": "gelu_tanh"},
            eps=EPS,
            demands=BIASED,
        ),
    )
}
