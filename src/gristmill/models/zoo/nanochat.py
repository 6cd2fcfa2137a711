"""nanochat (https://github.com/karpathy/nanochat) as `transformers` has it: squared ReLU,
normalisations without weight (of the embeddings, queries and keys too), capped logits.

Its rotation turns the other way, which is ours after the two halves of each query and key head
change places. It normalises queries and keys behind the rotation; without a weight that is the
same as before it.
"""

from __future__ import annotations

from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ACTIVATIONS, ATTENTION_BIAS, STANDARD, Word, replaced

_LAYER = "model.layers.{i}."
WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    Weight(_LAYER + "self_attn.q_proj.weight", ("layers.{i}.attn.q.weight",), "halves_swapped"),
    Weight(_LAYER + "self_attn.q_proj.bias", ("layers.{i}.attn.q.bias",), "halves_swapped"),
    Weight(_LAYER + "self_attn.k_proj.weight", ("layers.{i}.attn.k.weight",), "halves_swapped"),
    Weight(_LAYER + "self_attn.k_proj.bias", ("layers.{i}.attn.k.bias",), "halves_swapped"),
    *layer_weights(
        _LAYER,
        "layers.{i}.",
        {
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "mlp.fc1": "mlp.up",
            "mlp.fc2": "mlp.down",
        },
    ),
    Weight("lm_head.weight", ("head.weight",)),
)

WORDS = (
    *replaced(STANDARD, Word("hidden_act", "activation", "relu2", ACTIVATIONS)),
    ATTENTION_BIAS,
    Word("final_logit_softcapping", "logit_softcap", 15.0, nullable=True),
)

NANOCHAT = {"norm_weight": False, "embedding_norm": True, "qk_norm": "head", "mlp": "plain"}
SIZE = {
    **NANOCHAT,
    "activation": "relu2",
    "logit_softcap": 15.0,
    "norm_eps": 1e-6,
    "vocab_size": 65536,
    "max_seq_length": 2048,
}


FAMILY = Family(
    name="nanochat",
    architecture="NanoChatForCausalLM",
    model_type="nanochat",
    weights=WEIGHTS,
    words=WORDS,
    fixed=NANOCHAT,
    models=table(
        "nanochat",
        size("nanochat-d20", "nanochat-students/", SIZE, shape(20, 1280, 10, 10, 5120)),
        size("nanochat-d32", "karpathy/", SIZE, shape(32, 2048, 16, 16, 8192)),
    ),
)
