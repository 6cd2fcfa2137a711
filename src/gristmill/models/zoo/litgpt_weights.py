"""LitGPT's tensors as data: the names of each generation, and of its relatives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from gristmill.config.model import ModelConfig
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import Json

BLOCK = "transformer.h.{i}."
OURS = "layers.{i}."
QKV = tuple(f"{OURS}attn.{part}" for part in "qkv")
# What held query, key and value in each generation, and how.
FUSED = {"attn.qkv": "blocks", "attn.attn": "groups", "attn.c_attn": "blocks"}
MODULES = {
    "norm_1": "attn_norm",
    "post_attention_norm": "attn_post_norm",
    "norm_2": "mlp_norm",
    "post_mlp_norm": "mlp_post_norm",
    "attn.proj": "attn.o",
    "attn.norm_q": "attn.q_norm",
    "attn.norm_k": "attn.k_norm",
}
LATENT = {
    "attn.q_a_proj": "attn.q_down",
    "attn.q_a_norm": "attn.q_norm",
    "attn.q_b_proj": "attn.q_up",
    "attn.kv_a_proj_with_mqa": "attn.kv_down",
    "attn.kv_a_norm": "attn.kv_norm",
    "attn.kv_b_proj": "attn.kv_up",
    "attn.proj": "attn.o",
}
PLAIN = {"mlp.fc": "mlp.up", "mlp.proj": "mlp.down"}
GATED = {"mlp.fc_1": "mlp.gate", "mlp.fc_2": "mlp.up", "mlp.proj": "mlp.down"}
# TinyLlama's own training code, whose feed-forward layer is xformers' SwiGLU.
SWIGLU = {"mlp.swiglu.w1": "mlp.gate", "mlp.swiglu.w2": "mlp.up", "mlp.swiglu.w3": "mlp.down"}
# lit-llama (2023).
LIT_LLAMA = {
    "attn.c_proj": "attn.o",
    "mlp.c_fc1": "mlp.gate",
    "mlp.c_fc2": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
LIT_LLAMA_NORMS = {"rms_1": "attn_norm", "rms_2": "mlp_norm"}
ENDS = (
    Weight("lm_head.weight", ("head.weight",)),
    Weight("lm_head.bias", ("head.bias",)),
    Weight("transformer.wte.weight", ("embed.weight",)),
)
DROPPED = r"(^|\.)(cos|sin|rope_cache|mask_cache|inv_freq|kv_cache\.[kv])$"
"""The tensor that stays in fp32."""
WRAPPERS = ("_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "module.")
"""What torch.compile, Fabric and FSDP put into names."""

# LLaMA (arXiv:2302.13971) came without a configuration; (blocks, width) -> heads.
LLAMA_HEADS = {(32, 4096): 32, (40, 5120): 40, (60, 6656): 52, (80, 8192): 64}


def weights(
    config: ModelConfig, names: Iterable[str] = (), raw: Json | None = None
) -> tuple[Weight, ...]:
    """The table of tensors: of the generation that `names` are from, LitGPT's own without any.

    raw: the words that the configuration was read from; they say in which order the rows that
    are rotated lie.
    """
    present = {re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in names}
    old = f"{BLOCK}attn.c_attn.weight" in present
    out = list(ENDS)
    if old:
        out += [Weight("transformer.ln_f.scale", ("norm.weight",))]
        out += [
            Weight(f"{BLOCK}{theirs}.scale", (f"{OURS}{ours}.weight",))
            for theirs, ours in LIT_LLAMA_NORMS.items()
        ]
        out += layer_weights(BLOCK, OURS, LIT_LLAMA)
    else:
        out += layer_weights("transformer.", "", {"ln_f": "norm"})
        out += layer_weights(BLOCK, OURS, MODULES if config.latent_attention is None else _latent())
        if config.latent_attention is not None and (raw or {}).get("rope_interleave"):
            pairs = {"q_up": "pairs_per_head", "kv_down": "pairs_at_end"}
            out = _with_layouts(out, pairs)
        swiglu = f"{BLOCK}mlp.swiglu.w1.weight" in present
        gated = SWIGLU if swiglu else GATED
        out += layer_weights(BLOCK, OURS, PLAIN if config.mlp == "plain" else gated)
    fused = next((name for name in FUSED if f"{BLOCK}{name}.weight" in present), "attn.qkv")
    for kind in ("weight", "bias"):
        parts = tuple(f"{part}.{kind}" for part in QKV)
        out.append(Weight(f"{BLOCK}{fused}.{kind}", parts, FUSED[fused]))
    return (*out, *_experts())


def _latent() -> dict[str, str]:
    norms = {theirs: ours for theirs, ours in MODULES.items() if not theirs.startswith("attn.")}
    return norms | LATENT


def _with_layouts(table: list[Weight], layouts: dict[str, str]) -> list[Weight]:
    """The lines with another layout for some modules of ours, named by their last name."""
    return [
        replace(line, layout=layouts.get(line.ours[0].split(".")[-2], line.layout))
        for line in table
    ]


def _experts() -> list[Weight]:
    out = [
        Weight(f"{BLOCK}mlp.gate.weight", (f"{OURS}mlp.router.weight",)),
        Weight(f"{BLOCK}mlp.gate.e_score_correction_bias", (f"{OURS}mlp.selection_bias",)),
    ]
    for theirs, ours in {"fc_1": "gate", "fc_2": "up", "proj": "down"}.items():
        out.append(
            Weight(
                f"{BLOCK}mlp.experts.{{e}}.{theirs}.weight",
                (f"{OURS}mlp.experts.{ours}.weight",),
                "experts",
            )
        )
        out.append(
            Weight(
                f"{BLOCK}mlp.shared_experts.{theirs}.weight", (f"{OURS}mlp.shared.{ours}.weight",)
            )
        )
    return out


def unwrapped(name: str) -> str:
    """The name of a tensor without what compilers and wrappers put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_dropped(name: str) -> bool:
    """Whether a tensor is a table and no weight."""
    return re.search(DROPPED, name) is not None


def config_from_shapes(layers: int, rows: int, hidden: int, inner: int) -> ModelConfig | None:
    """LLaMA 7B, 13B, 30B or 65B, which the shapes of a lit-llama file name; None for another."""
    heads = LLAMA_HEADS.get((layers, hidden))
    if heads is None:
        return None
    return ModelConfig(
        vocab_size=rows,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=inner,
        norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
