"""Tensors out of pickles: what is there, what is missing, and nothing that runs."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from gristmill.formats import pickles
from gristmill.util.errors import UserError


class Exploit:
    """Writes a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


SAVE = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + out + ".store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = {
    "model": {
        "odd": distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)]),
        "wide": distribute_tensor(torch.arange(8.0).view(2, 4).bfloat16(), mesh, [Shard(1)]),
        "whole": torch.arange(4, dtype=torch.float16),
        "scalar": torch.tensor(3.0),
    },
    "iter_num": 7,
    "optimizer": {"state": {"odd": torch.zeros(2)}, "param_groups": [{"lr": 0.1}]},
}
dcp.save(state, checkpoint_id=out)
"""


NAMES = ("odd", "wide", "whole", "scalar")


def write_sharded(out: Path, pieces: dict[str, list[tuple[torch.Tensor, tuple[int, ...]]]]) -> Path:
    """A directory as torch.distributed.checkpoint leaves it: each piece in the next rank's file."""
    out.mkdir()
    known, storage, ends = {}, {}, [0, 0]
    files = [(out / f"__{rank}_0.distcp").open("wb") for rank in range(2)]
    for name, parts in pieces.items():
        chunks = [
            dcp.ChunkStorageMetadata(torch.Size(offsets), part.shape) for part, offsets in parts
        ]
        size = [max(o[d] + p.shape[d] for p, o in parts) for d in range(parts[0][0].dim())]
        properties = dcp.TensorProperties(dtype=parts[0][0].dtype)
        known[name] = dcp.TensorStorageMetadata(properties, torch.Size(size), chunks)
        for rank, (part, offsets) in enumerate(parts):
            torch.save(part.clone(), files[rank])
            length = files[rank].tell() - ends[rank]
            index = dcp.MetadataIndex(name, torch.Size(offsets), rank)
            storage[index] = _StorageInfo(f"__{rank}_0.distcp", ends[rank], length)
            ends[rank] += length
    known["iter_num"] = dcp.BytesStorageMetadata()
    for file in files:
        file.close()
    meta = dcp.StorageMeta(checkpoint_id=out, save_id="1")
    metadata = dcp.Metadata(known, planner_data={"iter_num": ("iter_num",)}, storage_meta=meta)
    metadata.storage_data = storage
    (out / ".metadata").write_bytes(pickle.dumps(metadata))
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    odd, wide = torch.arange(15.0).view(5, 3), torch.arange(8.0).view(2, 4).bfloat16()
    pieces = {
        "model.odd": [(odd[:3], (0, 0)), (odd[3:], (3, 0))],
        "model.wide": [(wide[:, :2], (0, 0)), (wide[:, 2:], (0, 2))],
        "model.whole": [(torch.arange(4).half(), (0,))],
        "model.scalar": [(torch.tensor(3.0), ())],
        "optimizer.state.odd": [(torch.zeros(2), (0,))],
    }
    return write_sharded(tmp_path_factory.mktemp("sharded") / "lit_model.pth", pieces)


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "lit_model.pth"))


def test_pieces_of_two_ranks_are_whole_tensors(saved):
    check_sharded(saved)


@pytest.mark.slow
def test_pieces_that_two_processes_wrote(tmp_path):
    script, out = tmp_path / "save.py", tmp_path / "lit_model.pth"
    script.write_text(SAVE)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), out], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    check_sharded(out)


def check_sharded(saved: Path) -> None:
    found = pickles.open_sharded(saved)
    assert set(found) == {f"model.{name}" for name in NAMES} | {"optimizer.state.odd"}
    assert torch.equal(found["model.odd"].read(), torch.arange(15.0).view(5, 3))
    assert torch.equal(found["model.wide"].read(), torch.arange(8.0).view(2, 4).bfloat16())
    assert torch.equal(found["model.whole"].read(), torch.arange(4).half())
    assert found["model.scalar"].read().item() == 3
    assert found["model.odd"].peek().shape[0] < 5
    assert found["model.odd"].file.parent == saved


def test_code_in_metadata_is_not_run(sharded, tmp_path):
    trap = tmp_path / "trap"
    (sharded / ".metadata").write_bytes(pickle.dumps(Exploit(trap)))
    with pytest.raises(UserError, match=r"\.metadata holds more .*\(posix\.system\)") as told:
        pickles.open_sharded(sharded)
    assert "Nothing of it was run" in str(told.value)
    assert not trap.exists()
    pickle.loads((sharded / ".metadata").read_bytes())  # the trap is one
    assert trap.exists()


@pytest.mark.parametrize("name", ["getattr", "eval", "__import__"])
def test_names_off_the_list_are_refused(sharded, name):
    (sharded / ".metadata").write_bytes(b"cbuiltins\n" + name.encode() + b"\n.")
    with pytest.raises(UserError, match=f"builtins.{name}"):
        pickles.open_sharded(sharded)


def test_attributes_of_names_on_the_list_are_refused(sharded):
    """Protocol 4 takes names with dots, which lead on from what is on the list."""
    (sharded / ".metadata").write_bytes(
        b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93."  # torch.Size.__new__
    )
    with pytest.raises(UserError, match=r"torch\.Size\.__new__"):
        pickles.open_sharded(sharded)


def test_code_in_a_piece_is_not_run(tmp_path):
    trap = tmp_path / "trap"
    bad = tmp_path / "__0_0.distcp"
    torch.save(Exploit(trap), bad)
    piece = pickles._Piece((0,), bad.name, 0, bad.stat().st_size)
    with pytest.raises(UserError, match=r"__0_0\.distcp holds more than tensors.*posix\.system"):
        pickles._read_piece(tmp_path, "x", piece)
    assert not trap.exists()


def test_faults_of_a_sharded_directory_name_file_and_tensor(sharded):
    entry = pickles.open_sharded(sharded)["model.odd"]
    content = entry.file.read_bytes()
    entry.file.write_bytes(content[:100])
    with pytest.raises(UserError, match=rf"{entry.file.name} is cut off: tensor model.odd lacks"):
        entry.read()
    entry.file.unlink()
    with pytest.raises(UserError, match=rf"{entry.file.name} is missing; it holds tensor model"):
        entry.read()
    metadata = sharded / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-40])
    with pytest.raises(UserError, match="metadata cannot be read"):
        pickles.open_sharded(sharded)
    metadata.unlink()
    with pytest.raises(UserError, match=r"has no \.metadata"):
        pickles.open_sharded(sharded)


def test_a_path_out_of_the_directory_is_not_followed(saved):
    metadata = pickles._MetadataReader((saved / ".metadata").open("rb")).load()
    for info in metadata["storage_data"].values():
        info.state["relative_path"] = "../../elsewhere.distcp"
    pieces = [p for e in pickles._entries(metadata).values() for p in e.pieces]
    assert {piece.file for piece in pieces} == {"elsewhere.distcp"}


def table() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2).bfloat16()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_table_is_found_inside_a_training_checkpoint(tmp_path, zipped, key):
    state = table() if key is None else {key: OrderedDict(table()), "iter_num": 3, "lr": [0.1]}
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = pickles.open_file(path, ("model", "state_dict"))
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"].read(), table()["a"])
    assert torch.equal(found["a"].peek(), table()["a"][:1])
    assert found["b"].read().dtype == torch.bfloat16
    assert found["b"].file == path


def test_views_parameters_and_transposed_tensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"t": base.t(), "part": base[1:], "p": torch.nn.Parameter(base), "same": base}
    torch.save(state, tmp_path / "x.pth")
    found = pickles.open_file(tmp_path / "x.pth")
    for name, value in state.items():
        got = found[name].read()
        assert torch.equal(got, value.detach())
        assert got.is_contiguous()
        assert not got.requires_grad


def test_a_file_is_mapped_anew_after_many_bytes(tmp_path, monkeypatch):
    torch.save(table(), tmp_path / "x.pth")
    monkeypatch.setattr(pickles, "REMAP_BYTES", 50)
    loads = []
    load = pickles._load
    monkeypatch.setattr(
        pickles, "_load", lambda *args, **more: loads.append(args) or load(*args, **more)
    )
    found = pickles.open_file(tmp_path / "x.pth")
    values = [found["a"].read() for _ in range(6)]
    assert len(loads) == 3
    assert all(torch.equal(value, table()["a"]) for value in values)


def test_code_in_a_file_is_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"model": table(), "hparams": Exploit(trap)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth holds more than tensors.*posix\.system"):
        pickles.open_file(tmp_path / "x.pth")
    assert not trap.exists()


@pytest.mark.parametrize("cut", [0, 10, 400, -10])
def test_a_file_that_is_cut_off(tmp_path, cut):
    path = tmp_path / "x.pth"
    torch.save(table(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"x\.pth cannot be read .*Fetch or copy"):
        pickles.open_file(path)


def test_a_file_without_a_table(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds a list, no table of tensors"):
        pickles.open_file(tmp_path / "x.pth")
