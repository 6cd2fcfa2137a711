"""The Ray guide *Steps to Pretrain*: FineWeb to a model that talks, on a Ray cluster."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import tutorial_world as world
from small import metrics
from test_ray_training import Nodes
from torch.distributed.checkpoint import FileSystemWriter, save
from transformers import AutoModelForCausalLM, AutoTokenizer
from tutorial_world import SHORT, run, run_apart

from gristmill.data.store.dataset import Dataset
from gristmill.formats.model_dir import open_model_dir

pytestmark = pytest.mark.slow

EFS = "/".join(("", "home", "ray", "efs"))
"""The guide's folder that all nodes share."""
CLUSTER = f"{EFS}/cluster"
RUN = f"{CLUSTER}/pretrained-checkpoints/H100/sample-10B"
FINAL = f"{RUN}/final"

PREPARE = (
    f'python optimize_dataset.py --input_dir="{EFS}/team/datasets/fineweb/sample_fine_web_10BT" '
    f'--tokenizer_dir="{CLUSTER}/checkpoints/meta-llama/Meta-Llama-3-8B" '
    f'--output_dir="{CLUSTER}/optimized-dataset"'
)
MERGE = (
    f'python merge_files.py --source_dir="{CLUSTER}/optimized-dataset/train" '
    f'--target_dir="{CLUSTER}/data/optimized-fine-web-sample10BT/train"'
)
TRAIN = (
    "python distributed_pretrain.py --model_name Meta-Llama-3-8B  "
    f"--dataset_path={CLUSTER}/data/optimized-fine-web-sample10BT --num_nodes=4 --out_dir={RUN}"
)
CONSOLIDATE = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {FINAL}/lit_model.pth/"
CONVERT = f"python convert_pretrained_checkpoint.py {FINAL} {FINAL}-exported-checkpoint"
CHAT = f"litgpt chat {FINAL}-exported-checkpoint"
EVALUATE = (
    f'litgpt evaluate {FINAL}-exported-checkpoint --batch_size 4 --tasks "hellaswag" '
    f"--out_dir {FINAL}-HF-checkpoint"
)
HARNESS = (
    f" lm_eval --model hf --model_args pretrained={FINAL}-HF-checkpoint/ "
    '--tasks "hellaswag" --device "cuda:0" --batch_size 4'
)

# The run as it stands, on nodes without GPUs and of a length for a test.
STEPS = (
    *("--train.max_steps", "4", "--train.max_seq_length", "64"),
    *("--train.global_batch_size", "4", "--train.micro_batch_size", "1"),
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    pytest.importorskip("ray.train")
    nodes = Nodes(tmp_path_factory.mktemp("cluster"))
    for _ in range(3):
        nodes.add()
    yield nodes
    nodes.stop()


@pytest.fixture
def efs(place: Path) -> Path:
    """The folder that all nodes of the guide share, with tokenizer and corpus."""
    efs = place / "efs"
    world.fineweb(efs / "team/datasets/fineweb/sample_fine_web_10BT")
    tokenizer = efs / "cluster/checkpoints/meta-llama/Meta-Llama-3-8B"
    line = "litgpt download meta-llama/Meta-Llama-3-8B --tokenizer_only true"
    assert run(line, "--access_token", "your_hf_token", "--out_dir", str(tokenizer)) == 0
    return efs


def here(line: str, efs: Path) -> str:
    return line.replace(EFS, str(efs))


def test_the_way_of_the_guide(efs, place, nodes, monkeypatch, capsys):
    ray = {"RAY_ADDRESS": nodes.address}
    said = run_apart(here(PREPARE, efs), **ray)
    assert "gristmill prepare fineweb --val_fraction 0.005 --executor ray" in said
    source = efs / "cluster/optimized-dataset"
    assert Dataset.open(source / "train").manifest.source is not None
    # Both sides; the originals stay where they are, and nothing is there twice.
    for side in ("train", "val"):
        assert run(here(MERGE.replace("/train", f"/{side}"), efs)) == 0
        assert "nothing to merge" in capsys.readouterr().out
    merged = efs / "cluster/data/optimized-fine-web-sample10BT"
    assert (merged / "train").resolve() == source / "train"
    assert run(here(MERGE, efs)) == 0  # LitGPT's has moved the files by then
    monkeypatch.setenv("WANDB_API_KEY", "<YOUR_KEY_HERE>")  # no wandb here: the run goes without

    said = run_apart(here(TRAIN, efs), *SHORT, *STEPS, **ray)
    assert "--launcher ray" in said
    assert "<YOUR_KEY_HERE>" not in said
    out = efs / "cluster/pretrained-checkpoints/H100/sample-10B"
    assert [r["step"] for r in metrics(out) if "loss" in r] == [1, 2, 3, 4]
    final = out / "final"
    assert json.loads((final / "config.json").read_text())["model_type"] == "llama"

    capsys.readouterr()
    assert run(here(CONSOLIDATE, efs)) == 0
    assert "nothing to consolidate" in capsys.readouterr().out
    assert run(here(CONVERT, efs)) == 0
    one = open_model_dir(here(f"{FINAL}-exported-checkpoint", efs)).parameters()
    two = open_model_dir(final).parameters()
    assert all(torch.equal(one[name], two[name]) for name in two)

    monkeypatch.setattr("sys.stdin", io.StringIO("A list of colors: red, blue\n\n"))
    assert run(here(CHAT, efs), "--max_new_tokens", "4", "--precision", "32-true") == 0
    assert "Now chatting with" in capsys.readouterr().out
    said = run_apart(here(EVALUATE, efs), "--limit", "8", "--device", "cpu", **online(place))
    assert "hellaswag" in said
    exported = Path(here(f"{FINAL}-HF-checkpoint", efs))
    measured = json.loads((exported / "results.json").read_text())["results"]["hellaswag"]
    assert (final.parent / "final-exported-checkpoint" / "lit_model.pth").is_file()
    theirs = measured_by_the_harness(here(HARNESS, efs), place)
    assert {name: theirs[name] for name in ACCURACIES} == {n: measured[n] for n in ACCURACIES}

    model = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(["A list of colors: red, blue"], return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=50)
    assert tokenizer.batch_decode(written, skip_special_tokens=True)[0]


ACCURACIES = ("acc,none", "acc_norm,none")


def measured_by_the_harness(line: str, place: Path) -> dict[str, float]:
    """What the harness's own command finds for the task, here without a GPU."""
    command = Path(sys.executable).with_name("lm_eval")
    more = ["--device", "cpu", "--limit", "8", "--output_path", str(place / "theirs")]
    done = subprocess.run(
        [command, *shlex.split(line)[1:], *more],
        env={**os.environ, **online(place)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (place / "theirs").rglob("results_*.json")
    return json.loads(file.read_text())["results"]["hellaswag"]


def online(place: Path) -> dict[str, str]:
    """For a process that asks the hub on this machine for a task's data."""
    return {
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(place / "hf"),
        "HF_ENDPOINT": os.environ["HF_ENDPOINT"],
    }


def test_the_guide_on_one_machine(efs, monkeypatch):
    """Without a cluster the text is prepared by this machine; the bytes are the same."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("gristmill.config.scripts.on_ray", lambda: False)
    assert run(here(PREPARE, efs)) == 0
    train = Dataset.open(efs / "cluster/optimized-dataset/train")
    val = Dataset.open(efs / "cluster/optimized-dataset/val")
    assert train.num_documents > 100 * val.num_documents / 2  # not three files of ten


def test_the_settings_of_a_file(efs, tutorials, capsys, monkeypatch):
    """`--config config_hub/llama3-8b.yaml`: a file of the user's, or the recipe of that name."""
    asked = []
    monkeypatch.setattr("gristmill.launch.ray.train_on_ray", asked.append)
    line = "python distributed_pretrain.py --config config_hub/llama3-8b.yaml"
    assert run(line) == 0
    Path("config_hub").mkdir()
    Path("config_hub/llama3-8b.yaml").write_text(
        "model_name: Meta-Llama-3-8B\ndataset_path: data/mine\nnum_nodes: 4\n"
        "out_dir: out/mine\ntrain:\n  max_tokens: 100_000_000\n"
    )
    assert run(line) == 0
    assert run(TRAIN) == 0
    first, second, third = asked
    assert first.launcher == second.launcher == third.launcher == "ray"
    assert first.model_name == "Llama-3-8B"
    assert (second.data.data_path, second.num_nodes, second.out_dir) == ("data/mine", 4, "out/mine")
    assert second.train.max_tokens == 100_000_000
    assert third.data.data_path.endswith("optimized-fine-web-sample10BT")
    assert third.num_nodes == 4


def test_checkpoints_of_the_guide_s_own_runs(place, capsys, monkeypatch):
    """Pieces that its trainer wrote: consolidated, renamed, converted as it says, or just used."""
    name = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert run(f"litgpt download {name}") == 0
    assert run(f"litgpt convert_pretrained_checkpoint {name} final") == 0
    final = place / "final"
    whole = torch.load(final / "lit_model.pth", weights_only=True)
    (final / "lit_model.pth").unlink()
    save({"model": whole}, storage_writer=FileSystemWriter(final / "lit_model.pth"), no_dist=True)
    torch.save({"iter_num": 3}, final / "lit_model.pth" / "meta.pt")
    expected = {n: t.clone() for n, t in open_model_dir(final).parameters().items()}

    line = "python -m lightning.pytorch.utilities.consolidate_checkpoint final/lit_model.pth/"
    assert run(line) == 0
    assert run(line) == 2  # nothing is overwritten
    assert "is there already" in capsys.readouterr().err
    shutil.move("final/lit_model.pth", "final/distributed_checkpoint")
    shutil.move("final/lit_model.pth.consolidated", "final/lit_model.pth")
    state = torch.load("final/lit_model.pth", weights_only=True)
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[n], whole[n]) for n in whole)
    assert run("python convert_pretrained_checkpoint.py final exported") == 0
    for place_ in ("final", "final/distributed_checkpoint", "exported"):
        found = open_model_dir(place_).parameters()
        assert all(torch.equal(found[n], t) for n, t in expected.items())
