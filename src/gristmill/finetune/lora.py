"""Low-rank adapters (LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353), as PEFT's modules compute.

    y = W x + b        becomes        y = W x + b + alpha / r * B A dropout(x)

W is frozen; A [r, in] and B [out, r] are trained, in fp32 whatever the type of W. DoRA scales each
row of W + alpha / r * B A to a length that is trained as well.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gristmill.config.finetune import FinetuneLora
from gristmill.config.model import ModelConfig
from gristmill.formats import peft as peft_files
from gristmill.formats import tuned
from gristmill.formats.adapted import AdapterFiles
from gristmill.formats.hf import write as write_model_dir
from gristmill.formats.model_dir import load_weights, open_model_dir
from gristmill.formats.peft_lora import lora_files
from gristmill.models.counts import parameter_shapes
from gristmill.models.device import weight_dtype
from gristmill.models.init import generator_of
from gristmill.parallel.weights import put
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.train.method import Method
from gristmill.util.errors import UserError
from gristmill.util.extras import install_command

if TYPE_CHECKING:
    from gristmill.train.job import Job

ADAPTER = "default"
"""PEFT's name of the one adapter."""
ADAPTER_DIR = "adapter"
"""Where in `final/` the adapter is."""
MATRICES = {
    "lora_query": ("attn.q", "attn.q_down", "attn.q_up"),
    "lora_key": ("attn.k", "attn.kv_down", "attn.kv_up"),
    "lora_value": ("attn.v", "attn.kv_down", "attn.kv_up"),
    "lora_projection": ("attn.o",),
    "lora_mlp": ("mlp.gate", "mlp.up", "mlp.down"),
}
"""The matrices of a block that each option means."""
HEAD = "head"


class Lora(Method):
    """Trains low-rank additions to chosen matrices; ends with a merged model and the adapter."""

    trained_only = True

    def __init__(self, cfg: FinetuneLora) -> None:
        """Raises UserError for settings that cannot work on any model."""
        self.cfg = cfg
        for name in ("lora_r", "lora_alpha"):
            if getattr(cfg, name) < 1:
                raise UserError(
                    f"--{name} {getattr(cfg, name)} is not a positive number. Use 8 and 16.",
                    {f"--{name}": {"lora_r": 8, "lora_alpha": 16}[name]},
                )
        if not 0.0 <= cfg.lora_dropout < 1.0:
            raise UserError(
                f"--lora_dropout {cfg.lora_dropout} is no share below 1. Use 0.05, or 0 for none.",
                {"--lora_dropout": 0.05},
            )
        if not any(getattr(cfg, name) for name in (*MATRICES, "lora_head")):
            raise UserError(
                f"none of {', '.join(f'--{n}' for n in (*MATRICES, 'lora_head'))} is true: there "
                "is nothing to train. Choose some.",
                {"--lora_query": "true", "--lora_value": "true"},
            )
        refuse_tensor_parallel(cfg, "low-rank adapters")
        if find_spec("peft") is None:
            raise _not_installed()
        kind = "DoRA" if cfg.lora_dora else "LoRA"
        self.name = f"{kind}, rank {cfg.lora_r}, alpha {cfg.lora_alpha}"

    def check(self, model: ModelConfig) -> None:
        """Refuse matrices that a model does not have as such."""
        super().check(model)
        if self.cfg.lora_head and model.tie_embeddings:
            raise UserError(
                f"--lora_head: the output head of {model.name} is its embedding, and would no "
                "longer be. Leave it out.",
                {"--lora_head": "false"},
            )
        if self.cfg.lora_mlp and model.moe is not None:
            raise UserError(
                f"--lora_mlp: the feed-forward layers of {model.name} are experts, which have no "
                "low-rank adapters yet. Leave it out and train attention.",
                {"--lora_mlp": "false", "--lora_projection": "true"},
            )

    def adapt(self, model: nn.Module) -> None:
        """Put PEFT's modules around the chosen matrices; everything else is frozen."""
        config: ModelConfig = model.config  # type: ignore[assignment]
        add_lora(model, self.cfg, targets(config, self.cfg))

    def fill(self, model: nn.Module, job: Job) -> None:
        """The base's weights; A as nn.Linear begins, B zero, magnitudes the lengths of rows."""
        assert job.start_dir is not None, "finetuning starts from a model"
        named = dict(model.named_parameters())
        plain = {tuned.plain_name(name): parameter for name, parameter in named.items()}
        own = {name: parameter for name, parameter in plain.items() if name is not None}
        parts = tuned.adapter_parts(named)
        lengths = {
            id(own[name]): named[part["magnitude"]]
            for name, part in parts.items()
            if "magnitude" in part
        }

        def place(parameter: Tensor, value: Tensor) -> None:
            put(parameter, value)
            if id(parameter) in lengths:
                exact = value.to(parameter.dtype).float()
                put(lengths[id(parameter)], torch.linalg.vector_norm(exact, dim=1))

        load_weights(own, job.start_dir, put=place)
        for part in parts.values():
            a, b = named[part["a"]], named[part["b"]]
            put(a, initial_a(a.shape, job.cfg.seed, part["a"]))
            put(b, torch.zeros(b.shape))

    def num_saved(self, model: ModelConfig) -> int:
        """Numbers in the adapter."""
        shapes = parameter_shapes(model)
        matrices = [shapes[f"{name}.weight"] for name in targets(model, self.cfg)]
        magnitude = 1 if self.cfg.lora_dora else 0
        return sum(
            self.cfg.lora_r * (rows + columns) + magnitude * rows for rows, columns in matrices
        )

    def files(self, job: Job) -> dict[str, str]:
        """What a checkpoint's tensors mean, and where the base is."""
        settings = {"scale": self.cfg.lora_alpha / self.cfg.lora_r, "r": self.cfg.lora_r}
        return {tuned.FILE: tuned.describe(base_path(job), settings)}

    def write(
        self, job: Job, weights: Mapping[str, Tensor], final: Path, files: dict[str, str]
    ) -> None:
        """`final/`: base and adapter as one model; `final/adapter/`: the adapter for PEFT."""
        assert job.start_dir is not None, "finetuning starts from a model"
        base, adapters = open_model_dir(job.start_dir), tuned.factors(weights)
        merged = tuned.with_factors(final, base, adapters, self.cfg.lora_alpha / self.cfg.lora_r)
        written = lora_files(
            job.model,
            adapters,
            alpha=self.cfg.lora_alpha,
            dropout=self.cfg.lora_dropout,
            base=str(base_path(job)),
            row_lengths=partial(_row_lengths, base.parameters()),
        )
        write_model_dir(
            final,
            job.model,
            merged.parameters(),
            tokenizer_dir=job.tokenizer_dir,
            dtype=weight_dtype(job.precision),
            extra_files=files,
            write_more=lambda directory: write_adapter(job, directory / ADAPTER_DIR, written),
        )
        print(
            f"{final} is the base with the adapter in it; {final / ADAPTER_DIR} is the adapter "
            "alone, for PEFT.",
            file=sys.stderr,
        )


def base_path(job: Job) -> Path:
    """Where the base's own files are: of a run, its model directory."""
    assert job.start_dir is not None, "finetuning starts from a model"
    return open_model_dir(job.start_dir).path.resolve()


def write_adapter(job: Job, directory: Path, files: AdapterFiles) -> None:
    """Write an adapter with the tokenizer and the prompts that it was trained with."""
    peft_files.write(directory, files)
    if job.tokenizer_dir is not None:
        Tokenizer.load(job.tokenizer_dir).save(directory)
    for name, text in job.tokenizer_files.items():
        (directory / name).write_text(text, encoding="utf-8")


def targets(model: ModelConfig, cfg: FinetuneLora) -> list[str]:
    """Names of the linear layers that get an adapter, in the order of the model."""
    chosen = {m for option, names in MATRICES.items() if getattr(cfg, option) for m in names}
    out = []
    for name in parameter_shapes(model):
        module = name.removesuffix(".weight")
        inner = ".".join(module.split(".")[2:])
        if module != name and (inner in chosen or (module == HEAD and cfg.lora_head)):
            out.append(module)
    return out


def add_lora(model: nn.Module, settings: FinetuneLora, names: list[str]) -> None:
    """Put an adapter around each linear layer of `names`, and train nothing but adapters.

    Parameters of `attn.q` become `attn.q.base_layer.weight`, `attn.q.lora_A.default.weight` and so
    on; those of adapters are fp32, without values where the model is on the meta device. Raises
    UserError where PEFT is not installed.
    """
    shown = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of other packages' kernels that this machine lacks
    try:
        _inject(model, settings, names)
    finally:
        logging.disable(shown)
    for name in names:
        layer = model.get_submodule(name)
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            layer.get_submodule(part).float()
    if HEAD in names:
        _adapt_head(model)


def _adapt_head(model: Any) -> None:
    """Have the decoder add the head's adapter: it does not call the head, and has its matrix.

    The adapter stays two factors, so that no gradient is as large as the head. DoRA scales rows of
    the sum, which is made whole; without dropout.
    """
    head = model.get_submodule(HEAD)
    if ADAPTER in head.lora_magnitude_vector:
        head.__class__ = type("AdaptedHead", (type(head),), {"weight": property(_sum)})
        return
    down, up, dropout = head.lora_A[ADAPTER], head.lora_B[ADAPTER], head.lora_dropout[ADAPTER]
    scale = head.scaling[ADAPTER]

    def factors(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return down(dropout(hidden).to(down.weight.dtype)) * scale, up.weight

    model.head_adapter = factors


def _not_installed() -> UserError:
    return UserError(
        "finetune lora needs PEFT, which is not installed. "
        f"Install it: {install_command('finetune')}"
    )


def _inject(model: nn.Module, settings: FinetuneLora, names: list[str]) -> None:
    """Put PEFT's modules around linear layers."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise _not_installed() from None
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_dora=settings.lora_dora,
        target_modules=list(names),
        bias="none",
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def _sum(head: Any) -> Tensor:
    """The matrix that the output head and its adapter come to."""
    base: Tensor = head.base_layer.weight
    total = base + head.get_delta_weight(ADAPTER).to(base.dtype)
    lengths = torch.linalg.vector_norm(total.detach().float(), dim=1)
    scale = head.lora_magnitude_vector[ADAPTER].weight / lengths
    return total * scale.unsqueeze(1).to(base.dtype)


def initial_a(shape: torch.Size, seed: int, name: str) -> Tensor:
    """The values that A [r, in] begins with, uniform up to 1 / sqrt(in), by seed and name."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(seed, name))


def refuse_tensor_parallel(cfg: Any, what: str) -> None:
    """Raise UserError where heads would be shared between devices."""
    if cfg.parallel.tensor > 1:
        raise UserError(
            f"--parallel.tensor {cfg.parallel.tensor}: {what} are not cut over devices yet. Use "
            "--parallel.shard, which takes any model.",
            {"--parallel.tensor": 1},
        )


def _row_lengths(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    return torch.linalg.vector_norm(parameters[name].float(), dim=1)
