"""What is said when a server is ready."""

import pytest

from gristmill.config.serve import Serve
from gristmill.infer.load import load
from gristmill.infer.serve import command

from .conftest import KEY


@pytest.mark.parametrize(
    ("option", "says"), [(KEY, "Bearer YOUR_KEY"), (None, "Bearer $GRISTMILL_API_KEY")]
)
def test_the_example_names_the_key_that_there_is(base_model, monkeypatch, option, says):
    monkeypatch.setenv("GRISTMILL_API_KEY", KEY)
    cfg = Serve(checkpoint_dir=str(base_model), api_key=option)
    service = command.build_service(cfg, load(base_model, "cpu", "32-true"), command.api_key(cfg))
    said = command._described(cfg, service, "http://here")
    assert says in said
    assert KEY not in said
