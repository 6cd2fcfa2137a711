"""What was compiled is kept for the next run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gristmill.parallel.compile import CACHE_VARIABLE, keep_what_is_compiled

CODE = """
import torch
import gristmill.train.fit
from torch._dynamo.utils import counters
from gristmill.config.model import ModelConfig
from gristmill.models.decoder import Decoder
from gristmill.parallel.compile import compile_blocks

torch.manual_seed(0)
sizes = dict(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32)
model = Decoder(ModelConfig(vocab_size=32, max_seq_length=8, **sizes))
for p in model.parameters():
    torch.nn.init.ones_(p)
compile_blocks(model)
model.hidden(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
found = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("found" if found else "made")
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    run = [
        subprocess.run(
            [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert run == ["made", "found"]
    assert any((tmp_path / "gristmill" / "compiled").iterdir())


def test_the_folder_that_is_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "/elsewhere")
    keep_what_is_compiled()
    assert os.environ[CACHE_VARIABLE] == "/elsewhere"
    assert not (tmp_path / "gristmill").exists()


def test_without_a_place_to_write_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gristmill").write_text("a file in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    keep_what_is_compiled()
    assert str(tmp_path) not in os.environ.get(CACHE_VARIABLE, "")
