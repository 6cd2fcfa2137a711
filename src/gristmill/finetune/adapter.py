"""LLaMA-Adapter (arXiv:2303.16199): the last blocks look at trained vectors besides the text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gristmill.config.finetune import FinetuneAdapter
from gristmill.config.model import AdaptionPrompt, ModelConfig
from gristmill.finetune.lora import base_path, refuse_tensor_parallel, write_adapter
from gristmill.formats import tuned
from gristmill.formats.adapted import is_prompt
from gristmill.formats.beside import building
from gristmill.formats.model_dir import load_weights
from gristmill.formats.peft_prompts import peft_lacks_prompts, prompt_files
from gristmill.models import zoo
from gristmill.models.init import initial_value
from gristmill.models.prompt import Prompt
from gristmill.parallel.weights import put
from gristmill.train.method import Method
from gristmill.util.errors import UserError

if TYPE_CHECKING:
    from gristmill.train.job import Job


class Adapter(Method):
    """Trains the vectors and their gates; ends with an adapter that names its base."""

    trained_only = True

    def __init__(self, cfg: FinetuneAdapter) -> None:
        """Raises UserError for settings that cannot work on any model."""
        self.cfg = cfg
        if cfg.adapter_prompt_length < 1:
            raise UserError(
                f"--adapter_prompt_length {cfg.adapter_prompt_length}: there is nothing to train. "
                "Use 10.",
                {"--adapter_prompt_length": 10},
            )
        if cfg.adapter_start_layer < 0:
            raise UserError(
                f"--adapter_start_layer {cfg.adapter_start_layer}: blocks are counted from 0.",
                {"--adapter_start_layer": 0},
            )
        refuse_tensor_parallel(cfg, "adaption prompts")
        self.name = (
            f"{cfg.adapter_prompt_length} vectors in the attention of each block from "
            f"{cfg.adapter_start_layer} on"
        )

    def check(self, model: ModelConfig) -> None:
        """Refuse a model without such blocks."""
        super().check(model)
        if self.cfg.adapter_start_layer >= model.num_layers:
            raise UserError(
                f"--adapter_start_layer {self.cfg.adapter_start_layer}: {model.name} has "
                f"{model.num_layers} blocks, counted from 0. Use a smaller number.",
                {"--adapter_start_layer": max(0, model.num_layers - 2)},
            )
        if model.latent_attention is not None:
            raise UserError(
                f"{model.name} has latent attention, which has no adaption prompts. Use "
                "`gristmill finetune lora`."
            )

    def adapt(self, model: nn.Module) -> None:
        """Give the last blocks their vectors, in fp32; everything else is frozen."""
        model.requires_grad_(False)
        config = self._with_prompt(model.config)  # type: ignore[arg-type]
        for layer, has_prompt in enumerate(config.prompt_layers):
            if has_prompt:
                attention = model.get_submodule(f"layers.{layer}.attn")
                attention.prompt = Prompt(config).float()

    def fill(self, model: nn.Module, job: Job) -> None:
        """The base's weights, vectors drawn from N(0, 1), gates 0."""
        assert job.start_dir is not None, "finetuning starts from a model"
        named = dict(model.named_parameters())
        own = {name: p for name, p in named.items() if not is_prompt(name)}
        load_weights(own, job.start_dir, put=put)
        for name, parameter in named.items():
            if name not in own:
                put(parameter, initial_value(job.model, name, parameter.shape, job.cfg.seed))

    def num_saved(self, model: ModelConfig) -> int:
        """Numbers in vectors and gates."""
        layers = model.num_layers - self.cfg.adapter_start_layer
        return layers * (self.cfg.adapter_prompt_length * model.hidden_size + 1)

    def files(self, job: Job) -> dict[str, str]:
        """What a checkpoint's tensors mean, and where the base is."""
        assert job.start_dir is not None, "finetuning starts from a model"
        prompt = self._with_prompt(job.model).adaption_prompt
        assert prompt is not None
        return {tuned.FILE: tuned.describe(base_path(job), asdict(prompt))}

    def write(
        self, job: Job, weights: Mapping[str, Tensor], final: Path, files: dict[str, str]
    ) -> None:
        """`final/`: the adapter, in PEFT's layout where PEFT knows the architecture."""
        assert job.start_dir is not None, "finetuning starts from a model"
        config, base = self._with_prompt(job.model), str(base_path(job))
        prompts = {name: value for name, value in weights.items() if is_prompt(name)}
        with building(final) as directory:
            write_adapter(job, directory, prompt_files(config, prompts, base=base))
            for name, text in files.items():
                (directory / name).write_text(text, encoding="utf-8")
        why = peft_lacks_prompts(config)
        for_whom = "PEFT loads it too" if why is None else f"gristmill alone loads it: {why}"
        print(f"{final} is an adapter of {base}; {for_whom.rstrip('.')}.", file=sys.stderr)

    def _with_prompt(self, config: ModelConfig) -> ModelConfig:
        """The model's configuration with the vectors in it."""
        known = zoo.family(config.family).adaption
        prompt = AdaptionPrompt(
            length=self.cfg.adapter_prompt_length,
            num_layers=config.num_layers - self.cfg.adapter_start_layer,
            projected=known is None or known.projected,
        )
        return replace(config, adaption_prompt=prompt)
