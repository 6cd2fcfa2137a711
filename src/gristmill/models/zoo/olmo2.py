"""OLMo 2 (arXiv:2501.00656): what attention and feed-forward add is normalised, not what they read;
queries and keys are normalised over all heads together."""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ATTENTION_BIAS, STANDARD, Word, replaced

WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    *layer_weights(
        "model.layers.{i}.",
        "layers.{i}.",
        {
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "self_attn.q_norm": "attn.q_norm",
            "self_attn.k_norm": "attn.k_norm",
            "post_attention_layernorm": "attn_post_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
            "post_feedforward_layernorm": "mlp_post_norm",
        },
    ),
    *layer_weights("", "", {"model.norm": "norm", "lm_head": "head"}),
)

WORDS = (
    *replaced(STANDARD, Word("rms_norm_eps", "norm_eps", 1e-5)),
    ATTENTION_BIAS,
)

OLMO2 = {"pre_norm": False, "post_norm": True, "qk_norm": "full"}
SIZE = {
    **OLMO2,
    "vocab_size": 100352,
    "max_seq_length": 4096,
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "eos_token_id": 100257,
}
B7 = {**SIZE, **shape(32, 4096, 32, 32, 11008)}
B13 = {**SIZE, **shape(40, 5120, 40, 40, 13824)}

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    weights=WEIGHTS,
    words=WORDS,
    fixed=OLMO2,
    models=table(
        "olmo2",
        size("OLMo-2-0425-1B", "allenai/", SIZE, shape(16, 2048, 16, 16, 8192)),
        size("OLMo-2-1124-7B", "allenai/", B7),
        size("OLMo-2-1124-7B-SFT", "allenai/", B7),
        size("OLMo-2-1124-7B-DPO", "allenai/", B7),
        size("OLMo-2-1124-7B-Instruct", "allenai/", B7),
        size("OLMo-2-1124-13B", "allenai/", B13),
        size("OLMo-2-1124-13B-SFT", "allenai/", B13),
        size("OLMo-2-1124-13B-DPO", "allenai/", B13),
        size("OLMo-2-1124-13B-Instruct", "allenai/", B13),
        size("OLMo-2-0325-32B", "allenai/", SIZE, shape(64, 5120, 40, 8, 27648)),
    ),
)
