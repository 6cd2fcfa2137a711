"""A run goes on, on any number of processes: the same samples, the same losses, the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gristmill.checkpoint import writer
from gristmill.checkpoint.store import complete, read_record

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
import small

HOOKS = '''
import hashlib, json

def note(run, stats):
    """Write down which samples this rank read in a step, and the digest of each."""
    rows = run.rows
    read = {
        int(number): hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
        for number, tokens, valid in zip(rows.sample_ids, rows.tokens, rows.valid) if valid
    }
    if run.mesh.context_rank == run.mesh.place["tensor"] == 0:
        with open(f"{run.job.out_dir}.notes.{run.mesh.rank}", "a") as file:
            file.write(json.dumps([run.state.step, read]) + "\\n")

def stop_after_6(run, stats):
    note(run, stats)
    if run.state.step == 6:
        raise RuntimeError("enough")

def stop_after_10(run, stats):
    note(run, stats)
    if run.state.step == 10:
        raise RuntimeError("enough")
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Text, a tokenizer, a module of hooks, and a run of one process in `one/`."""
    root = tmp_path_factory.mktemp("world")
    small.write_novels(root / "novels")
    (root / "own_hooks.py").write_text(HOOKS)
    with redirect_stdout(io.StringIO()):
        small.train_tokenizer(root / "novels", root / "tokenizer")
    return root


def train(root: Path, name: str, *more: str) -> tuple[int, str]:
    """Run the pretrain command on this rank: 12 steps of 4 samples, saved every 4."""
    words = small.pretrain(
        root, root / name, "--train.max_steps", "12", "--eval.interval", "6", *more
    )
    sys.path.insert(0, str(root))
    said, stdout = io.StringIO(), sys.stdout
    try:
        with redirect_stderr(said):
            return small.main(words), said.getvalue()
    finally:
        sys.stdout = stdout
        sys.path.remove(str(root))


def hook(name: str) -> tuple[str, str]:
    return "--hook", f"own_hooks:{name}"


def stream(root: Path, name: str) -> dict[int, list[tuple[str, str]]]:
    """Samples and digests by step, as the last attempt at each step read them."""
    found: dict[int, dict[str, str]] = {}
    for file in sorted(root.glob(f"{name}.notes.*")):
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, {}).update(rows)
    return {step: sorted(rows.items()) for step, rows in found.items()}


def digest(root: Path, name: str) -> str:
    return hashlib.sha256((root / name / "final/model.safetensors").read_bytes()).hexdigest()


def close(root: Path, name: str, other: str) -> None:
    """Both have every step once, the same losses and the same weights, but for rounding."""
    rows, others = small.metrics(root / name), small.metrics(root / other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(13))
    for row, expected in zip(rows, others, strict=True):
        for key in ("loss", "val_loss", "grad_norm", "tokens", "samples", "lr"):
            assert row.get(key, 0) == pytest.approx(expected.get(key, 0), rel=2e-5)
    mine, theirs = (load_file(root / n / "final/model.safetensors") for n in (name, other))
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def one(world, ranks) -> str:
    """The name of a finished run of one process."""
    assert ranks(1, train, world, "one", *hook("note"))[0][0] == 0
    return "one"


def test_two_then_one_then_four(world, ranks, one):
    codes = ranks(2, train, world, "moved", *hook("stop_after_6"))
    assert [code for code, _ in codes] == [1, 1]
    assert complete(world / "moved")[0].name == "step-00000004"
    assert ranks(1, train, world, "moved", *hook("stop_after_10"))[0][0] == 1
    assert complete(world / "moved")[0].name == "step-00000008"
    assert all(code == 0 for code, _ in ranks(4, train, world, "moved", *hook("note")))
    assert stream(world, "moved") == stream(world, one)
    close(world, "moved", one)


def test_from_one_kind_of_mesh_to_another(world, ranks, one):
    tensor, context = ("--parallel.tensor=2",), ("--parallel.context=2",)
    assert ranks(2, train, world, "kinds", *tensor, *hook("stop_after_6"))[0][0] == 1
    assert ranks(4, train, world, "kinds", *context, *hook("stop_after_10"))[0][0] == 1
    assert read_record(complete(world / "kinds")[0])["world"] == 4
    assert ranks(4, train, world, "kinds", *tensor, *context, *hook("note"))[0][0] == 0
    assert stream(world, "kinds") == stream(world, one)
    close(world, "kinds", one)


@pytest.mark.parametrize(
    "sizes",
    [
        {"shard": 2},
        {"context": 2},
        pytest.param({"shard": 2, "replicate": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "shard": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bits_on_the_same_mesh(sizes, world, ranks, one):
    name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
    mesh = [f"--parallel.{axis}={size}" for axis, size in sizes.items()]
    count = torch.tensor(list(sizes.values())).prod().item()
    assert ranks(count, train, world, f"{name}-whole", *mesh, *hook("note"))[0][0] == 0
    assert ranks(count, train, world, name, *mesh, *hook("stop_after_10"))[0][0] == 1
    assert ranks(count, train, world, name, *mesh, *hook("note"))[0][0] == 0
    assert digest(world, name) == digest(world, f"{name}-whole")
    assert stream(world, name) == stream(world, one)
    close(world, name, one)


def test_three_ranks_share_a_batch_of_four(world, ranks, one):
    assert ranks(3, train, world, "three", *hook("note"))[0][0] == 0
    assert stream(world, "three") == stream(world, one)
    close(world, "three", one)


def test_a_damaged_checkpoint_is_passed_over_by_all(world, ranks, one):
    assert ranks(2, train, world, "damaged", *hook("stop_after_10"))[0][0] == 1
    newest, before = complete(world / "damaged")
    file = sorted((newest / "weights").iterdir())[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ends = ranks(2, train, world, "damaged", *hook("note"))
    assert [code for code, _ in ends] == [0, 0]
    assert f"{newest.name} is not used" in ends[0][1]
    assert ends[1][1] == ""
    assert stream(world, "damaged") == stream(world, one)
    close(world, "damaged", one)
    assert before.name == "step-00000004"


def full_disk(root: Path, name: str) -> tuple[int, str]:
    """Train; the second file that rank 1 writes finds no space."""
    real, calls = writer._write_file, []

    def write(*args):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return real(*args)

    writer._write_file = write
    try:
        return train(root, name)
    finally:
        writer._write_file = real


def test_a_save_that_fails_on_one_rank_fails_on_all(world, ranks, one):
    ends = ranks(2, full_disk, world, "full")
    assert [code for code, _ in ends] == [1, 1]
    assert "step-00000008 was not saved" in ends[0][1]
    assert "No space left on device" in ends[0][1]
    assert [path.name for path in complete(world / "full")] == ["step-00000012", "step-00000004"]
    assert not (world / "full/step-00000008").exists()
    close(world, "full", one)


def test_a_checkpoint_of_two_is_used_by_every_command(world, ranks, one):
    shutil.copytree(world / one, world / "of-two")
    assert ranks(2, train, world, "of-two", "--train.max_steps", "16")[0][0] == 0
    newest = complete(world / "of-two")[0]
    assert read_record(newest)["world"] == 2
    assert len(list((newest / "optimizer").iterdir())) == 2
    with redirect_stdout(io.StringIO()):
        assert small.main(["export", str(newest), str(world / "exported")]) == 0
    assert (world / "exported/model.safetensors").read_bytes() == (
        world / "of-two/final/model.safetensors"
    ).read_bytes()
