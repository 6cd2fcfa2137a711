"""Adapters train alike on one process and on several that share weights, rows or positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from training import TINY, Case, alone, train

from gristmill.config.finetune import FinetuneAdapter, FinetuneLora
from gristmill.finetune.adapter import Adapter
from gristmill.finetune.lora import Lora
from gristmill.formats.hf import write
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights

pytest.importorskip("peft")
EVERYTHING = {
    "lora_key": True,
    "lora_projection": True,
    "lora_mlp": True,
    "lora_head": True,
    "lora_dropout": 0.0,
}
METHODS = {
    "lora": Lora(FinetuneLora(**EVERYTHING)),
    "dora": Lora(FinetuneLora(lora_dora=True, **EVERYTHING)),
    "prompts": Adapter(FinetuneAdapter(adapter_start_layer=0, adapter_prompt_length=3)),
}
MESHES = {
    "shard 2": (2, {}),
    "replicate 2": (2, {"replicate": 2}),
    "context 2": (2, {"context": 2}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    model = Decoder(TINY)
    init_weights(model, 1)
    write(folder, TINY, model.state_dict(), tokenizer_dir=None)
    return folder


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_trains_on_a_mesh_as_on_one_process(ranks, base, method, mesh):
    world, sizes = MESHES[mesh]
    case = Case(steps=3, weights=base, method=METHODS[method], documents=True)
    wanted = alone(case)
    trained = {name.partition("/")[2] for name in wanted.gradients}
    for result in ranks(world, train, dataclasses.replace(case, sizes=sizes)):
        assert result.losses == pytest.approx(wanted.losses, rel=2e-6)
        assert result.norms == pytest.approx(wanted.norms, rel=1e-4)
        for name, weight in result.weights.items():
            assert torch.equal(result.initial[name], wanted.initial[name]), name
            far = (weight - wanted.weights[name]).abs().max()
            assert far < 1e-4, f"{name}: {far:.1e}"
            moved = (weight - result.initial[name]).abs().max() > 0
            assert moved == (name in trained), name
