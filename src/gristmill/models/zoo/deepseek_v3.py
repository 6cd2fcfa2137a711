"""DeepSeek-V3 (arXiv:2412.19437): as V2, but experts are scored by a sigmoid and kept evenly loaded
by a bias that takes part in the choice only (arXiv:2408.15664).

The files also have a block that predicts the token after the next one (behind the last),
which a decoder does not need. Most are in fp8 and want converting.
"""

from __future__ import annotations

from typing import Any

from gristmill.config.model import MixtureOfExperts, ModelConfig
from gristmill.models.zoo.deepseek_v2 import (
    CONSTANTS,
    GET_UNQUANTIZED,
    WEIGHTS,
    WORDS,
    experts_words,
    latent_fields,
    latent_words,
    parse_experts,
    parse_latent,
    shape,
    yarn,
)
from gristmill.models.zoo.family import Family
from gristmill.models.zoo.sizes import size, table
from gristmill.models.zoo.weights import Weight
from gristmill.models.zoo.words import Json, require

_BIAS = Weight(
    "model.layers.{i}.mlp.gate.e_score_correction_bias", ("layers.{i}.mlp.selection_bias",)
)
_IMPLIED = {"score": "sigmoid", "selection_bias": True}


def _parse(raw: Json) -> Json:
    groups: dict[str, Any] = {}
    if (raw.get("n_group") or 1) > 1:
        groups = {"num_groups": raw["n_group"], "group_score": "top2"}
        groups["num_groups_per_token"] = require(raw, "topk_group")
    return {**parse_latent(raw), "moe": parse_experts(raw, **_IMPLIED, **groups)}


def _words(config: ModelConfig) -> Json:
    # transformers takes the count for one where nothing is said.
    return {**latent_words(config), **experts_words(config), "num_nextn_predict_layers": 0}


def _experts(count: int, per_token: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "moe": MixtureOfExperts(
            num_experts=count,
            num_experts_per_token=per_token,
            intermediate_size=width,
            score="sigmoid",
            selection_bias=True,
            balance_loss=0.001,
            **more,
        )
    }


_B671 = {
    "vocab_size": 129280,
    "max_seq_length": 163840,
    "norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    **shape(61, 7168, 128, 18432),
    **latent_fields(1536, yarn(40.0, 1.0)),
    **_experts(
        256,
        8,
        2048,
        num_shared_experts=1,
        num_dense_layers=3,
        scale=2.5,
        num_groups=8,
        num_groups_per_token=4,
        group_score="top2",
    ),
}
_B16 = {
    "vocab_size": 163840,
    "max_seq_length": 8192,
    "norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "bos_token_id": 163584,
    **shape(27, 2048, 16, 11264),
    **latent_fields(None),
    **_experts(64, 6, 1408, num_shared_experts=2, num_dense_layers=1, scale=2.446),
}

FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    get_unquantized=GET_UNQUANTIZED,
    weights=(*WEIGHTS, _BIAS),
    words=WORDS,
    constants={
        **CONSTANTS,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    },
    parse_more=_parse,
    more_words=_words,
    models=table(
        "deepseek_v3",
        size("DeepSeek-V3-Base", "deepseek-ai/", _B671),
        size("DeepSeek-V3", "deepseek-ai/", _B671),
        size("DeepSeek-V3-0324", "deepseek-ai/", _B671),
        size("DeepSeek-R1-Zero", "deepseek-ai/", _B671),
        size("DeepSeek-R1", "deepseek-ai/", _B671),
        size("DeepSeek-R1-0528", "deepseek-ai/", _B671),
        size("Moonlight-16B-A3B", "moonshotai/", _B16, eos_token_id=163585),
        size("Moonlight-16B-A3B-Instruct", "moonshotai/", _B16, eos_token_id=163586),
    ),
    dropped=(r"^model\.layers\.{num_layers}\.",),
)
