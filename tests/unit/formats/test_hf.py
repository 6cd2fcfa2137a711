import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gristmill.formats import hf, safetensors_io
from gristmill.formats.model_dir import load_model
from gristmill.models import zoo
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.errors import RunError, UserError

CONFIG = replace(
    zoo.get("gristmill-nano"),
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    intermediate_size=48,
    bos_token_id=1,
    eos_token_id=2,
)


def state(config=CONFIG, seed=0) -> dict[str, torch.Tensor]:
    model = Decoder(config)
    init_weights(model, seed)
    return model.state_dict()


def write(out: Path, config=CONFIG, seed=0, **options) -> None:
    hf.write(out, config, state(config, seed), tokenizer_dir=None, **options)


def read(out: Path, name: str) -> dict:
    return json.loads((out / name).read_text())


def test_directory_has_what_it_should(tmp_path):
    write(tmp_path / "final", extra_files={"note.txt": "grüezi"})
    assert sorted(os.listdir(tmp_path)) == ["final"]
    files = ["config.json", "generation_config.json", "model.safetensors", "note.txt"]
    assert sorted(os.listdir(tmp_path / "final")) == files
    assert (tmp_path / "final" / "note.txt").read_text(encoding="utf-8") == "grüezi"
    assert read(tmp_path / "final", "config.json")["torch_dtype"] == "float32"
    assert read(tmp_path / "final", "generation_config.json") == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_all_ids_that_end_a_text_are_written(tmp_path):
    write(tmp_path / "final", replace(CONFIG, eos_token_id=(2, 5)))
    for name in ("config.json", "generation_config.json"):
        assert read(tmp_path / "final", name)["eos_token_id"] == [2, 5]


def test_rows_without_a_token_are_never_generated(tmp_path):
    write(tmp_path / "final", replace(CONFIG, num_token_ids=61))
    assert read(tmp_path / "final", "generation_config.json")["suppress_tokens"] == [61, 62, 63]
    assert read(tmp_path / "final", "config.json")["vocab_size"] == 64


@pytest.mark.parametrize("limit", [1, 5000, 12000])
def test_shards_and_their_index(tmp_path, limit):
    write(tmp_path / "final", max_shard_bytes=limit)
    index = read(tmp_path / "final", "model.safetensors.index.json")
    tensors = state()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(index["weight_map"]) == len(tensors)
    for file in (tmp_path / "final").glob("model-*.safetensors"):
        header = safetensors_io.read_header(file)
        names = [name for name in header if name != "__metadata__"]
        assert {index["weight_map"][name] for name in names} == {file.name}
        assert (
            len(names) == 1
            or sum(
                h["data_offsets"][1] - h["data_offsets"][0] for n, h in header.items() if n in names
            )
            <= limit
        )
    model = load_model(tmp_path / "final")
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


def test_tensors_are_asked_for_one_at_a_time(tmp_path):
    tensors = state()

    class Lazy(dict):
        held = 0

        def __getitem__(self, name):
            Lazy.held += 1
            return tensors[name].clone()

    hf.write(tmp_path / "final", CONFIG, Lazy(), tokenizer_dir=None, dtype=torch.bfloat16)
    assert Lazy.held == len(tensors)


def test_existing_directory_is_replaced_whole(tmp_path):
    write(tmp_path / "final", extra_files={"old.txt": "x"})
    write(tmp_path / "final", seed=1)
    assert not (tmp_path / "final" / "old.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["final"]
    assert torch.equal(load_model(tmp_path / "final").embed.weight, state(seed=1)["embed.weight"])


def test_failure_leaves_the_existing_directory(tmp_path, monkeypatch):
    write(tmp_path / "final")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_file", full)
    with pytest.raises(RunError, match=r"final could not be written \(.*No space left.*Free space"):
        write(tmp_path / "final", seed=1)
    assert sorted(os.listdir(tmp_path)) == ["final"]
    assert torch.equal(load_model(tmp_path / "final").embed.weight, state()["embed.weight"])


def test_writer_takes_up_what_a_killed_one_left(tmp_path):
    # Killed while building.
    (tmp_path / ".final.partial").mkdir()
    (tmp_path / ".final.partial" / "junk").write_text("x")
    write(tmp_path / "final")
    assert sorted(os.listdir(tmp_path)) == ["final"]
    assert not (tmp_path / "final" / "junk").exists()
    # Killed between the two renames: the old one is still there if the next attempt fails too.
    aside = tmp_path / ".final.partial" / "old"
    aside.mkdir(parents=True)
    (tmp_path / "final").rename(aside / "final")
    bad = replace(CONFIG, num_layers=2)
    with pytest.raises(KeyError, match="layers.1"):
        hf.write(tmp_path / "final", bad, state(), tokenizer_dir=None)
    assert torch.equal(load_model(tmp_path / "final").embed.weight, state()["embed.weight"])


def test_model_that_no_architecture_holds_is_refused_before_writing(tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM cannot express norm=layernorm"):
        write(tmp_path / "final", replace(CONFIG, norm="layernorm"))
    assert os.listdir(tmp_path) == []
