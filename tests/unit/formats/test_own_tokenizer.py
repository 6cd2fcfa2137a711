"""The tokenizer that a named model comes with."""

from __future__ import annotations

import pytest

from gristmill.cli import main
from gristmill.formats.download import own_tokenizer
from gristmill.util.errors import UserError
from gristmill.util.paths import resolve_model_dir


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_one_that_is_there_is_used(here):
    (here / "text").mkdir()
    (here / "text/a.txt").write_text("the mill turned and the water ran " * 50)
    place = here / "checkpoints/EleutherAI/pythia-14m"
    words = ["tokenizer", "train", "text", "--vocab_size", "270", "--out_dir", str(place)]
    assert main(words) == 0
    for name in ("pythia-14m", "EleutherAI/pythia-14m"):
        assert own_tokenizer(name).resolve() == place


def test_without_a_network_the_command_is_named(here):
    command = "gristmill download EleutherAI/pythia-14m --tokenizer_only true"
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set.*{command}"):
        own_tokenizer("pythia-14m")
    assert not list(here.iterdir())


def test_a_model_without_a_repository_comes_with_none(here):
    with pytest.raises(UserError, match="gristmill-nano comes with none.*tokenizer train"):
        own_tokenizer("gristmill-nano")


def test_other_tools_name_of_a_checkpoint(here):
    (here / "out/step-00000004").mkdir(parents=True)
    assert resolve_model_dir("out/step-00000004.pth").name == "step-00000004"
    assert resolve_model_dir(here / "out/step-00000004.pth").name == "step-00000004"
    assert resolve_model_dir("out/step-00000008.pth").name == "step-00000008.pth"
    (here / "out/step-00000004.pth").touch()
    assert resolve_model_dir("out/step-00000004.pth").name == "step-00000004.pth"
