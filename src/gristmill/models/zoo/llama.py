"""Models of the Llama architecture: RMSNorm, SwiGLU, grouped queries, rotary over whole heads.

Other families have its tensors under the same names and take `WEIGHTS` from here.
"""

from __future__ import annotations

from gristmill.config.model import RopeScaling
from gristmill.models.zoo.family import Adaption, Family
from gristmill.models.zoo.sizes import shape, size, table
from gristmill.models.zoo.weights import Weight, layer_weights
from gristmill.models.zoo.words import ATTENTION_BIAS, STANDARD, Word

WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed.weight",)),
    *layer_weights(
        "model.layers.{i}.",
        "layers.{i}.",
        {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.o_proj": "attn.o",
            "self_attn.q_norm": "attn.q_norm",
            "self_attn.k_norm": "attn.k_norm",
            "post_attention_layernorm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate",
            "mlp.up_proj": "mlp.up",
            "mlp.down_proj": "mlp.down",
        },
    ),
    Weight("model.norm.weight", ("norm.weight",)),
    Weight("lm_head.weight", ("head.weight",)),
)

WORDS = (
    *STANDARD,
    ATTENTION_BIAS,
    Word("mlp_bias", "mlp_bias", False),
)

# Shapes that several generations share.
B7 = shape(32, 4096, 32, 32, 11008)
B8 = shape(32, 4096, 32, 8, 14336)
B13 = shape(40, 5120, 40, 40, 13824)
B30 = shape(60, 6656, 52, 52, 17920)
B34 = shape(48, 8192, 64, 8, 22016)
B65 = shape(80, 8192, 64, 64, 22016)
B70 = shape(80, 8192, 64, 8, 28672)
B405 = shape(126, 16384, 128, 8, 53248)

# Llama (arXiv:2302.13971), Llama 2 (arXiv:2307.09288) and models tuned from them.
LLAMA = {"vocab_size": 32000, "norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_2 = {**LLAMA, "max_seq_length": 4096, "norm_eps": 1e-5}
# Their config.json name the context before scaling, 4096 tokens.
VICUNA_16K = {
    "max_seq_length": 16384,
    "rope_scaling": RopeScaling(kind="linear", factor=4.0),
}
TOGETHER_32K = {
    "max_seq_length": 32768,
    "rope_scaling": RopeScaling(kind="linear", factor=8.0),
}

META, PLATYPUS, VICUNA = "meta-llama/", "garage-bAInd/", "lmsys/"
NOUS, TRELIS = "NousResearch/", "Trelis/"

# Code Llama (arXiv:2308.12950). Those that fill in the middle have 16 more rows.
CODE = {**LLAMA_2, "max_seq_length": 16384, "rope_theta": 1e6}
INFILL = {**CODE, "vocab_size": 32016}
CODE_LLAMA = "codellama/"

# Llama 3, 3.1, 3.2, 3.3 (arXiv:2407.21783).
LLAMA_3 = {
    "vocab_size": 128256,
    "max_seq_length": 8192,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
CHAT_3 = {**LLAMA_3, "eos_token_id": 128009}
LONG = {"max_seq_length": 131072, "rope_scaling": RopeScaling(factor=8.0)}
LONGER = {"max_seq_length": 131072, "rope_scaling": RopeScaling(factor=32.0)}
B1_32 = {**shape(16, 2048, 32, 8, 8192), "tie_embeddings": True}
B3_32 = {**shape(28, 3072, 24, 8, 8192), "tie_embeddings": True}
R1 = "deepseek-ai/DeepSeek-"

# TinyLlama (arXiv:2401.02385) and MicroLlama.
TINY = {**LLAMA_2, "max_seq_length": 2048}
B1_TINY = shape(22, 2048, 32, 4, 5632)
TINY_REPO = "TinyLlama/TinyLlama-1.1B-"

# OpenLLaMA, https://github.com/openlm-research/open_llama
OPEN, OPEN_REPO = {**LLAMA, "max_seq_length": 2048}, "openlm-research/"

# SmolLM2 (arXiv:2502.02737). The Instruct models talk between <|im_start|> and <|im_end|>.
SMOL = {
    "vocab_size": 49152,
    "max_seq_length": 8192,
    "norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMOL_CHAT = {**SMOL, "bos_token_id": 1, "eos_token_id": 2}
SMOL_135M, SMOL_360M = shape(30, 576, 9, 3, 1536), shape(32, 960, 15, 5, 2560)
SMOL_1_7B = {**shape(24, 2048, 32, 32, 8192), "rope_theta": 1.3e5}
SMOL_REPO = "HuggingFaceTB/"

# Salamandra (arXiv:2502.08489).
SALAMANDRA = {"vocab_size": 256000, "max_seq_length": 8192, "bos_token_id": 1, "eos_token_id": 2}
SALAMANDRA_2B = {**SALAMANDRA, **shape(24, 2048, 16, 16, 5440), "norm_eps": 1e-5}
SALAMANDRA_7B = {**SALAMANDRA, **shape(32, 4096, 32, 8, 11008), "norm_eps": 1e-6}
BSC = "BSC-LT/"

# Falcon 3, https://huggingface.co/blog/falcon3
FALCON_3 = {
    "vocab_size": 131072,
    "max_seq_length": 32768,
    "norm_eps": 1e-6,
    "rope_theta": 1000042.0,
    "eos_token_id": 11,
}
FALCON_1B = {**FALCON_3, **shape(18, 2048, 8, 4, 8192), "max_seq_length": 4096}
FALCON_3B = {**FALCON_3, **shape(22, 3072, 12, 4, 9216)}
FALCON_7B = {**FALCON_3, **shape(28, 3072, 12, 4, 23040)}
FALCON_10B = {**FALCON_3, **shape(40, 3072, 12, 4, 23040)}
TII = "tiiuae/"

# Ours, for a processor without a GPU: a few minutes of training give readable text.
NANO = {
    **shape(4, 256, 4, 2, 768),
    "vocab_size": 2048,
    "max_seq_length": 256,
    "tie_embeddings": True,
}

MODELS = table(
    "llama",
    size("llama-7b", "huggyllama/", B7, LLAMA, max_seq_length=2048),
    size("llama-13b", "huggyllama/", B13, LLAMA, max_seq_length=2048),
    size("llama-30b", "huggyllama/", B30, LLAMA, max_seq_length=2048),
    size("llama-65b", "huggyllama/", B65, LLAMA, max_seq_length=2048, norm_eps=1e-5),
    size("vicuna-7b-v1.3", VICUNA, B7, LLAMA, max_seq_length=2048),
    size("vicuna-13b-v1.3", VICUNA, B13, LLAMA, max_seq_length=2048),
    size("vicuna-33b-v1.3", VICUNA, B30, LLAMA, max_seq_length=2048),
    size("vicuna-7b-v1.5", VICUNA, B7, LLAMA_2),
    size("vicuna-7b-v1.5-16k", VICUNA, B7, LLAMA_2, VICUNA_16K),
    size("vicuna-13b-v1.5", VICUNA, B13, LLAMA_2),
    size("vicuna-13b-v1.5-16k", VICUNA, B13, LLAMA_2, VICUNA_16K),
    size("Nous-Hermes-13b", NOUS, B13, LLAMA, max_seq_length=2048, vocab_size=32001),
    size("Nous-Hermes-llama-2-7b", NOUS, B7, LLAMA_2),
    size("Nous-Hermes-Llama2-13b", NOUS, B13, LLAMA_2, vocab_size=32032),
    size("Platypus-30B", PLATYPUS, B30, LLAMA, max_seq_length=2048),
    size("Platypus2-7B", PLATYPUS, B7, LLAMA_2),
    size("Platypus2-13B", PLATYPUS, B13, LLAMA_2),
    size("Platypus2-70B", PLATYPUS, B70, LLAMA_2),
    size("Platypus2-70B-instruct", PLATYPUS, B70, LLAMA_2),
    size("Camel-Platypus2-13B", PLATYPUS, B13, LLAMA_2),
    size("Camel-Platypus2-70B", PLATYPUS, B70, LLAMA_2),
    size("Stable-Platypus2-13B", PLATYPUS, B13, LLAMA_2),
    size("FreeWilly2", "stabilityai/", B70, LLAMA_2),
    size("LLaMA-2-7B-32K", "togethercomputer/", B7, LLAMA_2, TOGETHER_32K),
    size("Llama-2-7b-chat-hf-function-calling-v2", TRELIS, B7, LLAMA_2, norm_eps=1e-6),
    size("Llama-2-7b-hf", META, B7, LLAMA_2),
    size("Llama-2-7b-chat-hf", META, B7, LLAMA_2),
    size("Llama-2-13b-hf", META, B13, LLAMA_2),
    size("Llama-2-13b-chat-hf", META, B13, LLAMA_2),
    size("Llama-2-70b-hf", META, B70, LLAMA_2),
    size("Llama-2-70b-chat-hf", META, B70, LLAMA_2),
    size("CodeLlama-7b-hf", CODE_LLAMA, B7, INFILL),
    size("CodeLlama-7b-Instruct-hf", CODE_LLAMA, B7, INFILL),
    size("CodeLlama-7b-Python-hf", CODE_LLAMA, B7, CODE),
    size("CodeLlama-13b-hf", CODE_LLAMA, B13, INFILL),
    size("CodeLlama-13b-Instruct-hf", CODE_LLAMA, B13, INFILL),
    size("CodeLlama-13b-Python-hf", CODE_LLAMA, B13, CODE),
    size("CodeLlama-34b-hf", CODE_LLAMA, B34, CODE),
    size("CodeLlama-34b-Instruct-hf", CODE_LLAMA, B34, CODE),
    size("CodeLlama-34b-Python-hf", CODE_LLAMA, B34, CODE),
    size("CodeLlama-70b-hf", CODE_LLAMA, B70, INFILL),
    size("CodeLlama-70b-Instruct-hf", CODE_LLAMA, B70, INFILL),
    size("CodeLlama-70b-Python-hf", CODE_LLAMA, B70, INFILL),
    size("Llama-3-8B", "meta-llama/Meta-Llama-3-8B", B8, LLAMA_3),
    size("Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", B8, CHAT_3),
    size("Llama-3-70B", "meta-llama/Meta-Llama-3-70B", B70, LLAMA_3),
    size("Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct", B70, CHAT_3),
    size("Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", B8, LLAMA_3, LONG),
    size("Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct", B8, CHAT_3, LONG),
    size("Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B", B70, LLAMA_3, LONG),
    size("Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B-Instruct", B70, CHAT_3, LONG),
    size("Llama-3.1-405B", "meta-llama/Meta-Llama-3.1-405B", B405, LLAMA_3, LONG),
    size("Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B-Instruct", B405, CHAT_3, LONG),
    size("Llama-3.2-1B", META, B1_32, LLAMA_3, LONGER),
    size("Llama-3.2-1B-Instruct", META, B1_32, CHAT_3, LONGER),
    size("Llama-3.2-3B", META, B3_32, LLAMA_3, LONGER),
    size("Llama-3.2-3B-Instruct", META, B3_32, CHAT_3, LONGER),
    size("Llama-3.3-70B-Instruct", META, B70, CHAT_3, LONG),
    size("Llama-3.1-Nemotron-70B-Instruct-HF", "nvidia/", B70, CHAT_3, LONG),
    size("R1-Distill-Llama-8B", R1 + "R1-Distill-Llama-8B", B8, LLAMA_3, LONG),
    size("R1-Distill-Llama-70B", R1 + "R1-Distill-Llama-70B", B70, LLAMA_3, LONG),
    size("tiny-llama-1.1b", TINY_REPO + "intermediate-step-1431k-3T", B1_TINY, TINY),
    size("tiny-llama-1.1b-chat", TINY_REPO + "Chat-v1.0", B1_TINY, TINY),
    size("micro-llama-300M", "keeeeenw/MicroLlama", shape(12, 1024, 16, 4, 5632), TINY),
    size("open_llama_3b", OPEN_REPO, shape(26, 3200, 32, 32, 8640), OPEN),
    size("open_llama_7b", OPEN_REPO, B7, OPEN),
    size("open_llama_13b", OPEN_REPO, B13, OPEN),
    size("SmolLM2-135M", SMOL_REPO, SMOL, SMOL_135M),
    size("SmolLM2-135M-Instruct", SMOL_REPO, SMOL_CHAT, SMOL_135M),
    size("SmolLM2-360M", SMOL_REPO, SMOL, SMOL_360M),
    size("SmolLM2-360M-Instruct", SMOL_REPO, SMOL_CHAT, SMOL_360M),
    size("SmolLM2-1.7B", SMOL_REPO, SMOL, SMOL_1_7B),
    size("SmolLM2-1.7B-Instruct", SMOL_REPO, SMOL_CHAT, SMOL_1_7B),
    size("salamandra-2b", BSC, SALAMANDRA_2B),
    size("salamandra-2b-instruct", BSC, SALAMANDRA_2B),
    size("salamandra-7b", BSC, SALAMANDRA_7B),
    size("salamandra-7b-instruct", BSC, SALAMANDRA_7B),
    size("Falcon3-1B-Base", TII, FALCON_1B),
    size("Falcon3-1B-Instruct", TII, FALCON_1B),
    size("Falcon3-3B-Base", TII, FALCON_3B),
    size("Falcon3-3B-Instruct", TII, FALCON_3B),
    size("Falcon3-7B-Base", TII, FALCON_7B),
    size("Falcon3-7B-Instruct", TII, FALCON_7B),
    size("Falcon3-10B-Base", TII, FALCON_10B),
    size("Falcon3-10B-Instruct", TII, FALCON_10B),
    size("gristmill-nano", None, NANO),
)

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    weights=WEIGHTS,
    adaption=Adaption("model.layers.{i}.self_attn"),
    words=WORDS,
    models=MODELS,
)
