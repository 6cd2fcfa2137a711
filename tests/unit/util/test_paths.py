from pathlib import Path

import pytest

from gristmill.util.paths import how_to_get, resolve_model_dir, user_cache_dir


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/org/name").mkdir(parents=True)
    return tmp_path


def test_a_downloaded_model_goes_by_its_short_name():
    assert resolve_model_dir("org/name") == Path("checkpoints/org/name")
    assert resolve_model_dir(Path("checkpoints/org/name")) == Path("checkpoints/org/name")


def test_what_exists_here_comes_first(here):
    (here / "org/name").mkdir(parents=True)
    assert resolve_model_dir("org/name") == Path("org/name")


def test_other_paths_stay_as_they_are(here):
    assert resolve_model_dir("absent") == Path("absent")
    assert resolve_model_dir(here / "org") == here / "org"
    assert resolve_model_dir("checkpoints/absent") == Path("checkpoints/absent")


def test_the_organisation_may_be_left_out(here):
    assert resolve_model_dir("name") == Path("checkpoints/org/name")
    assert resolve_model_dir("checkpoints/name") == Path("checkpoints/org/name")
    assert resolve_model_dir("*") == Path("*")
    (here / "checkpoints/other/name").mkdir(parents=True)
    assert resolve_model_dir("name") == Path("name")
    assert resolve_model_dir("") == Path()


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("EleutherAI/pythia-160m", "gristmill download EleutherAI/pythia-160m`"),
        ("checkpoints/EleutherAI/pythia-160m", "gristmill download EleutherAI/pythia-160m`"),
        ("pythia-160m", "gristmill download pythia-160m`"),
        ("pythia-1.4b", "gristmill download pythia-1.4b`"),
        ("lit-llama.pth", "Name a model directory"),
        ("org/model.gguf", "Name a model directory"),
        ("out/run", "Name a model directory"),
        ("out/run/final", "Name a model directory"),
        ("/x/y", "Name a model directory"),
        ("../y", "Name a model directory"),
    ],
)
def test_what_is_not_there_comes_with_the_command_that_gets_it(here, path, command):
    (here / "out").mkdir()
    said = how_to_get(path)
    assert command in said
    assert ("download" in said) == ("download" in command)


def test_home_is_expanded(monkeypatch, here):
    monkeypatch.setenv("HOME", str(here))
    assert resolve_model_dir("~/x") == here / "x"


def test_user_cache_dir(monkeypatch, here):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "c"))
    assert user_cache_dir() == here / "c/gristmill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr("sys.platform", "linux")
    assert user_cache_dir() == here / ".cache/gristmill"
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_cache_dir() == here / "Library/Caches/gristmill"
