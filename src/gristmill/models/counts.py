"""Parameters, floating-point operations and memory of a model, counted from its configuration.

No torch: the planner asks these questions before anything is built.
"""

from __future__ import annotations

from math import prod

from gristmill.config.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]

BYTES_PER_WEIGHT = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
BYTES_PER_ACTIVATION = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2}


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of the decoder, in its order."""
    d, rows = config.hidden_size, config.vocab_size
    shapes: Shapes = {"embed.weight": (rows, d)}
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": s for name, s in _block_shapes(config).items()}
    shapes |= _norm_shapes(config, "norm")
    if not config.tie_embeddings:
        shapes["head.weight"] = (rows, d)
    return shapes


def _norm_shapes(config: ModelConfig, name: str) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (config.hidden_size,)}
    if config.norm == "layernorm":
        shapes[f"{name}.bias"] = (config.hidden_size,)
    return shapes


def _block_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of one block's parameters."""
    d, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    matrices = {
        "attn.q": (q, d, config.qkv_bias),
        "attn.k": (kv, d, config.qkv_bias),
        "attn.v": (kv, d, config.qkv_bias),
        "attn.o": (d, q, config.attention_out_bias),
        "mlp.gate": (inner, d, config.mlp_bias),
        "mlp.up": (inner, d, config.mlp_bias),
        "mlp.down": (d, inner, config.mlp_bias),
    }
    if config.mlp == "gelu":
        del matrices["mlp.gate"]
    shapes = _norm_shapes(config, "attn_norm")
    for name, (rows, columns, bias) in matrices.items():
        if name.startswith("mlp") and "mlp_norm.weight" not in shapes:
            shapes |= _norm_shapes(config, "mlp_norm")
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers; a tied embedding counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(
    config: ModelConfig, seq_len: int, training: bool = True, *, causal: bool = True
) -> float:
    """Floating-point operations of the matrix products for one token of a sequence, averaged.

    A product with a matrix of P numbers takes 2 P per token (a multiplication and an addition), so
    the blocks and the head take 2 (their matrix parameters); the embedding is a lookup, and the
    head counts the rows that stand for a token. Attention takes 2 heads head_size per key for the
    scores and as much for the values; a token sees (seq_len + 1) / 2 keys on average, or seq_len
    with `causal=False`, which is how torch's FlopCounterMode and most published MFU count.

    The backward pass forms two products for each one (gradients of input and of weight): training
    takes three times the forward pass. Nothing is added for recomputation (PaLM,
    arXiv:2204.02311, appendix B).
    """
    block = sum(prod(s) for s in _block_shapes(config).values() if len(s) == 2)
    head = config.token_ids * config.hidden_size
    keys = (seq_len + 1) / 2 if causal else seq_len
    attention = 4 * config.num_heads * config.head_size * keys
    forward = config.num_layers * (2 * block + attention) + 2 * head
    return (3 if training else 1) * float(forward)


def kv_cache_bytes(
    config: ModelConfig, batch_size: int, max_length: int, bytes_per_value: int = 2
) -> int:
    """Size of a key-value cache for `batch_size` sequences of `max_length` tokens."""
    per_token = 2 * config.num_layers * config.kv_heads * config.head_size
    return per_token * batch_size * max_length * bytes_per_value


def state_bytes(config: ModelConfig, precision: str) -> int:
    """Weights, gradients and the two moments of AdamW, all in the type of the weights.

    bf16-mixed adds the bf16 copies of the matrices that autocast keeps for one pass.
    """
    weight = BYTES_PER_WEIGHT[precision]
    copies = 2 if precision == "bf16-mixed" else 0
    return num_parameters(config) * (4 * weight + copies)


def activation_bytes(config: ModelConfig, micro_batch: int, seq_len: int, precision: str) -> int:
    """What an eager forward pass keeps for the backward pass, without recomputation.

    Per token and block, d the width, q and kv the widths of queries and keys: around each of the
    two norms its input and output (2 d; RMSNorm computes in fp32 and keeps that too), queries, keys
    and values (q + 2 kv), the attention output (q) and one log-normaliser per head; the
    feed-forward keeps its inner values: gate, up, the activated gate and their product (4 f), or
    up and its activation (2 f). Compiled blocks keep less.
    """
    q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    wide, narrow = BYTES_PER_WEIGHT[precision], BYTES_PER_ACTIVATION[precision]
    norm = narrow + (8 if config.norm == "rmsnorm" else wide)
    inner = {"swiglu": 4, "gelu": 2}[config.mlp] * config.intermediate_size
    block = 2 * norm * config.hidden_size + narrow * (2 * q + 2 * kv + inner) + 4 * config.num_heads
    return micro_batch * seq_len * (config.num_layers * block + norm * config.hidden_size)


def training_memory_bytes(
    config: ModelConfig, micro_batch: int, seq_len: int, precision: str
) -> int:
    """Estimate of a training step's peak on one device: state, activations, one piece of logits.

    An estimate for the planner and its messages; a dry run has the last word.
    """
    # The loss never holds more than about a thousand rows of logits, in compute type and fp32.
    rows = min(micro_batch * seq_len, 1024)
    logits = rows * config.token_ids * (4 + BYTES_PER_ACTIVATION[precision])
    state = state_bytes(config, precision)
    return state + activation_bytes(config, micro_batch, seq_len, precision) + logits
