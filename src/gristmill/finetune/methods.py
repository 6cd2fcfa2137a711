"""Which part of a model a command trains."""

from __future__ import annotations

from gristmill.config.finetune import Finetune, FinetuneAdapter, FinetuneLora
from gristmill.train.method import Method


def method_of(cfg: Finetune) -> Method:
    """What is trained, and what is left behind, as the command says."""
    if isinstance(cfg, FinetuneLora):
        from gristmill.finetune.lora import Lora

        return Lora(cfg)
    if isinstance(cfg, FinetuneAdapter):
        from gristmill.finetune.adapter import Adapter

        return Adapter(cfg)
    return Method()
