"""What is told of a directory that is written to meanwhile."""

import os
import shutil
import sys

from gristmill.config.commands import Inspect
from gristmill.infer.identify import identify
from gristmill.infer.inspect import inspect


def test_files_that_vanish_stop_nothing(base_model, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    before = identify(model)
    assert before.num_files == len(list(model.iterdir()))
    passing = model / "passing.tmp"
    passing.write_text("x")
    stat, walk = os.stat, os.walk

    def looked_at_once(path, *more, **settings):
        found = stat(path, *more, **settings)
        if os.fspath(path) == str(passing):
            passing.unlink()
        return found

    def with_ghost(place):
        for folder, folders, names in walk(place):
            yield folder, folders, ["vanished.tmp", *names]

    monkeypatch.setattr(os, "stat", looked_at_once)
    monkeypatch.setattr(os, "walk", with_ghost)
    assert identify(model).num_files <= before.num_files + 1
    after = identify(model)
    assert (after.num_files, after.num_bytes) == (before.num_files, before.num_bytes)


def test_a_model_is_whole_whose_tokenizer_needs_a_package(
    base_model, tmp_path, monkeypatch, capsys
):
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"no SentencePiece model")
    assert "is not a SentencePiece model" in " ".join(identify(model).problems)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    found = identify(model)
    assert not found.problems
    assert f"gristmill chat {model}" in found.commands
    inspect(Inspect(path=str(model)))
    page = " ".join(capsys.readouterr().out.split())
    assert f"tokenizer {model}/tokenizer.model needs the package sentencepiece" in page
    assert "whole yes" in page
