"""What is asked of a model is checked before it is computed."""

import json

import pytest

from gristmill.measure.subject import Subject
from gristmill.util.errors import UserError

from .models import write_model


def test_ids_that_the_model_has_no_row_for_are_told(tmp_path):
    model = write_model(tmp_path)
    file = model / "tokenizer.json"
    words = json.loads(file.read_text())
    words["added_tokens"].append({**words["added_tokens"][0], "id": 999, "content": "<far>"})
    words["model"]["vocab"]["<far>"] = 999
    file.write_text(json.dumps(words))
    subject = Subject(model, device="cpu", precision="32-true", batch_size=1, seed=0)
    with pytest.raises(UserError, match="does not belong to this model .token id 999"):
        subject.answers([("a", "<far>")])
    with pytest.raises(UserError, match="does not belong to this model .token id 999"):
        subject.likelihoods(["a" * 200 + "<far>"])
    assert subject.likelihoods(["a"])[0] < 0
