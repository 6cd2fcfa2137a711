"""A training loop in the style of nanoGPT: one file, the whole model compiled, logits at once.

python plain_loop.py CONFIG_JSON TOKENS_NPY

A GPT-NeoX of the sizes in CONFIG_JSON (a Hugging Face config.json), bf16 autocast, fused AdamW with
decay on matrices, clipping, warm-up and cosine; the loss is read and printed in every step.
"""

import json
import math
import sys

import numpy as np
import stamps
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first values of each head [B, heads, T, D]."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)


class Block(nn.Module):
    """Attention and feed-forward beside each other."""

    def __init__(self, d: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The residual stream x [B, T, d] after this block."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return x + y + self.down(F.gelu(self.up(self.ln_2(x))))


class Model(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, config: dict, length: int) -> None:
        super().__init__()
        d, heads = config["hidden_size"], config["num_attention_heads"]
        self.embed = nn.Embedding(config["vocab_size"], d)
        self.blocks = nn.ModuleList(
            Block(d, heads, config["intermediate_size"]) for _ in range(config["num_hidden_layers"])
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config["vocab_size"], bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim == 2 else None
        turned = int(d // heads * 0.25)
        rates = 10000.0 ** (-torch.arange(0, turned, 2) / turned)
        angles = torch.outer(torch.arange(length).float(), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of tokens and targets [B, T]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def main() -> None:
    """Train over all batches once."""
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    data = np.load(sys.argv[2], mmap_mode="r")
    torch.manual_seed(42)
    plain = Model(config, data.shape[2] - 1)
    decay = [p for p in plain.parameters() if p.ndim >= 2]
    rest = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    model = torch.compile(plain)
    for step, batch in enumerate(data):
        rate = 1e-3 * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / len(data)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.from_numpy(batch.copy())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step} loss {loss.item():.4f}", flush=True)
        stamps.stamp()


if __name__ == "__main__":
    main()
