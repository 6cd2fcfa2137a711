"""A run with Muon learns, and a run that was interrupted ends with the same bits."""

from __future__ import annotations

from small import final_weights, metrics, pretrain

from gristmill.checkpoint.store import complete
from gristmill.cli import main

MUON = ("--optimizer", "Muon", "--optimizer.lr", "0.003")


def test_an_interrupted_run_ends_with_the_same_bits(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(pretrain(world, whole, *MUON)) == 0
    rows = metrics(whole)
    assert rows[-1]["loss"] < 0.9 * rows[1]["loss"]
    assert main(pretrain(world, parts, *MUON)) == 0
    for path in (parts / "step-00000020", parts / "step-00000016", parts / "final"):
        path.rename(tmp_path / path.name)
    assert complete(parts)[0].name == "step-00000012"
    assert main(pretrain(world, parts, *MUON)) == 0
    assert final_weights(parts) == final_weights(whole)


def test_another_optimizer_is_another_run(world, own_run, capsys):
    assert main(pretrain(world, own_run, *MUON)) == 2
    assert "optimizer" in capsys.readouterr().err
