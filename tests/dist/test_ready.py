"""Before and beside the steps of several ranks: what fits is found together, text is written."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from test_resume import train
from training import CPU

from gristmill.config.sections import Parallel
from gristmill.formats.safetensors_io import open_tensors, weight_files
from gristmill.models.decoder import Block
from gristmill.parallel.mesh import close_mesh, open_mesh
from gristmill.parallel.outcome import compare
from gristmill.train import dry_run, fit

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
import small


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Text, a tokenizer, and a run of two ranks in `two/`."""
    root = tmp_path_factory.mktemp("world")
    small.write_novels(root / "novels")
    with redirect_stdout(io.StringIO()):
        small.train_tokenizer(root / "novels", root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def two(world, ranks) -> str:
    """The name of a finished run of two ranks, of two samples at a time."""
    assert ranks(2, train, world, "two")[0][0] == 0
    return "two"


def say(late: bool, more: bool) -> tuple[dict[int, str], bool]:
    """What ranks hear from each other, of which the second says nothing, or has come less far."""
    mesh = open_mesh(Parallel(), CPU)
    heard, waiting = ({}, False), None
    if more and mesh.rank == 0:
        group = mesh.device_mesh["shard"].get_group()
        waiting = dist.all_reduce(torch.ones(1), group=group, async_op=True)
    if not late or mesh.rank == 0:
        heard = compare(mesh, CPU, "a step", f"rank {mesh.rank}", 1.0)
    if more and mesh.rank == 1:
        waiting = dist.all_reduce(torch.ones(1), group=mesh.device_mesh["shard"].get_group())
    if waiting is not None:
        waiting.wait()
    close_mesh(mesh)
    return heard


def test_ranks_hear_how_it_went_and_whether_they_are_together(ranks):
    both = {0: "rank 0", 1: "rank 1"}
    assert ranks(2, say, False, False) == [(both, True)] * 2
    assert ranks(2, say, False, True) == [(both, False)] * 2
    assert ranks(2, say, True, False)[0] == ({0: "rank 0"}, False)


def scarce(root: Path, name: str, ranks: tuple[int, ...], *more: str) -> tuple[int, str]:
    """Train where the second block has no room for more than one sample, on these ranks."""
    real, layers, wait_s = Block.forward, [], dry_run.OTHERS_WAIT_S
    build = fit.build

    def built(job, mesh):
        model, how = build(job, mesh)
        layers[:] = [model.layers[1]] if mesh.rank in ranks else []
        return model, how

    def forward(self, x, *others):
        if self in layers and len(x) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, x, *others)

    Block.forward, fit.build, dry_run.OTHERS_WAIT_S = forward, built, 1.0
    try:
        return train(root, name, *more)
    finally:
        Block.forward, fit.build, dry_run.OTHERS_WAIT_S = real, build, wait_s


AUTO = ("--train.micro_batch_size", "auto")


@pytest.mark.parametrize("mesh", [(), ("--parallel.tensor=2",)], ids=["shard", "tensor"])
def test_a_micro_batch_that_fits_nowhere_is_halved_by_all(world, ranks, two, mesh):
    name = f"scarce{len(mesh)}"
    ends = ranks(2, scarce, world, name, (0, 1), *AUTO, *mesh)
    assert [code for code, _ in ends] == [0, 0], ends
    written = yaml.safe_load((world / name / "run.yaml").read_text())
    assert written["micro_batch_size"] == 1
    mine, theirs = (small.metrics(world / n) for n in (name, two))
    assert [row["loss"] for row in mine[1:]] == pytest.approx(
        [row["loss"] for row in theirs[1:]], rel=2e-5
    )


def test_a_micro_batch_that_was_typed_is_refused(world, ranks):
    ends = ranks(2, scarce, world, "typed", (0, 1), "--train.micro_batch_size", "2")
    assert [code for code, _ in ends] == [2, 2]
    assert "--train.micro_batch_size 1" in ends[0][1]


def failing(root: Path, name: str) -> tuple[int, str]:
    """Train where the compiler fails."""
    real, tried = dry_run.micro_step, []

    def step(*args):
        tried.append(1)
        if len(tried) == 1:
            raise torch._dynamo.exc.TorchDynamoException("it does not like this")
        return real(*args)

    dry_run.micro_step = step
    try:
        return train(root, name)
    finally:
        dry_run.micro_step = real


def test_a_compiler_that_fails_is_left_out_by_all(world, ranks, two):
    assert [code for code, _ in ranks(2, failing, world, "failing")] == [0, 0]
    assert small.final_weights(world / "failing") == small.final_weights(world / two)


BIASED = {
    "moe": {
        "num_experts": 4,
        "intermediate_size": 32,
        "score": "sigmoid",
        "selection_bias": True,
    }
}
EXPERTS = (
    *(f"--model_config.moe={json.dumps(BIASED['moe'])}", "--allow_unexportable=true"),
    *("--train.bias_update_speed=0.02", "--optimizer.lr=1e-4"),
)


def biases(out: Path) -> torch.Tensor:
    """Those of a run's last checkpoint, [layers, E]."""
    tensors = open_tensors(weight_files(out / "step-00000012/weights"))
    return torch.stack([tensors[f"layers.{i}.mlp.selection_bias"] for i in range(2)])


def test_biases_of_experts_are_those_of_one_rank_on_every_mesh(world, ranks):
    assert ranks(1, train, world, "experts-1", *EXPERTS)[0][0] == 0
    found = biases(world / "experts-1")
    assert found.abs().max() > 0.03
    torch.testing.assert_close(found / 0.02, (found / 0.02).round())  # whole steps
    losses = [row["loss"] for row in small.metrics(world / "experts-1")[1:]]
    for count, *more in (
        (2, "--train.micro_batch_size=1"),
        (2, "--parallel.context=2"),
        (3,),  # one row is padding
        (4, "--parallel.replicate=2"),
    ):
        name = f"experts-{count}{more}"
        assert ranks(count, train, world, name, *EXPERTS, *more)[0][0] == 0
        assert torch.equal(biases(world / name), found), name
        mine = [row["loss"] for row in small.metrics(world / name)[1:]]
        assert mine == pytest.approx(losses, rel=2e-5)


def test_biases_are_gone_on_from(world, ranks):
    half = ("--train.max_steps=6", "--train.lr_warmup_steps=1")
    assert ranks(2, train, world, "cut", *EXPERTS, *half)[0][0] == 0
    assert ranks(2, train, world, "cut", *EXPERTS, *half[1:])[0][0] == 0
    assert ranks(1, train, world, "uncut", *EXPERTS, *half[1:])[0][0] == 0
    assert torch.equal(biases(world / "cut"), biases(world / "uncut"))


MESHES = {
    "shard": (2, ()),
    "tensor": (2, ("--parallel.tensor=2",)),
    "context": (2, ("--parallel.context=2",)),
    "hybrid, bf16": (4, ("--parallel.replicate=2", "--precision=bf16-mixed")),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_sampled_text_is_written_by_all_and_changes_nothing(world, ranks, mesh):
    count, options = MESHES[mesh]
    prompts = json.dumps(["The mill", "Anna"])
    looked = ("--eval.sample_prompt", prompts, "--eval.sample_interval", "4")
    for name, more in (
        (f"plain-{mesh}", ()),
        (f"seen-{mesh}", (*looked, "--eval.sample_tokens=9")),
    ):
        ends = ranks(count, train, world, name, *options, *more)
        assert [code for code, _ in ends] == [0] * count, ends
    mine, theirs = (
        load_file(world / f"{name}-{mesh}/final/model.safetensors") for name in ("plain", "seen")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    lines = (world / f"seen-{mesh}/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 4, 8, 8, 12, 12]
