"""What a command's settings come to before anything is trained, and what cannot be."""

from __future__ import annotations

import json
import shutil

import pytest

from gristmill.config.finetune import FinetuneFull, TuneArgs
from gristmill.config.tuning_data import JSON
from gristmill.finetune import settle as settling
from gristmill.finetune.settle import settle
from gristmill.util.errors import UserError

CONTEXT = 512


@pytest.fixture
def settled(base, tmp_path):
    """Settle a run on records whose prompts have this many tokens."""

    def make(prompt_tokens: int, **train):
        records = [{"instruction": "q" * prompt_tokens, "output": f"a{n}"} for n in range(20)]
        (tmp_path / "records.json").write_text(json.dumps(records))
        data = JSON(json_path=str(tmp_path / "records.json"), prompt_style="default")
        return settle(
            FinetuneFull(
                checkpoint_dir=str(base),
                data=data,
                out_dir=str(tmp_path / "run"),
                device="cpu",
                train=TuneArgs(**train),
            )
        )

    return make


def test_longer_rows_are_proposed_where_the_model_has_them(settled):
    with pytest.raises(UserError, match="within its first 101 tokens. Use longer rows") as error:
        settled(200, max_seq_length=100)
    assert error.value.fix == {"--train.max_seq_length": 204}
    with pytest.raises(UserError, match="Use longer rows") as error:
        settled(510, max_seq_length=500)
    assert error.value.fix == {"--train.max_seq_length": CONTEXT}
    for more in ({}, {"max_seq_length": CONTEXT}):
        with pytest.raises(UserError, match="context is no longer: shorten the prompts") as error:
            settled(2 * CONTEXT, **more)
        assert not error.value.fix


def test_a_style_beside_the_checkpoint_keeps_inputs_in_their_place(base, tmp_path, monkeypatch):
    model = shutil.copytree(base, tmp_path / "model")
    (model / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    record = {"instruction": "add", "input": "1 2", "output": "3"}
    (tmp_path / "records.json").write_text(json.dumps([record] * 20))
    monkeypatch.setattr(settling, "encode", lambda talks, *_, **__: pytest.fail(str(talks[0])))
    cfg = FinetuneFull(
        checkpoint_dir=str(model),
        data=JSON(json_path=str(tmp_path / "records.json")),
        out_dir=str(tmp_path / "run"),
        device="cpu",
    )
    with pytest.raises(pytest.fail.Exception, match=r"'input': '1 2'"):
        settle(cfg)


def test_a_run_is_known_by_what_a_person_can_compare(settled):
    job = settled(20)
    assert job.identity["data.records"] == "19, 1 held out"
    assert job.identity["data.prompt_style"] == "default"
    assert job.length.seq_len == 64
