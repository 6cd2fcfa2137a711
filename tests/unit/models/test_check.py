from dataclasses import replace

import pytest
import torch

from gristmill.config.model import ModelConfig, RopeScaling
from gristmill.models import zoo
from gristmill.models.check import check_config
from gristmill.models.decoder import Decoder
from gristmill.util.errors import UserError


def test_every_named_model_is_sound():
    for name in zoo.names():
        check_config(zoo.get(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 770}, "hidden_size 770 is no multiple of num_heads 12"),
        ({"num_kv_heads": 5}, "num_heads 12 is no multiple of num_kv_heads 5"),
        ({"rope_fraction": 0.02}, r"rope_fraction 0.02 rotates 1 of a head's 64"),
        ({"rope_fraction": 1.5}, r"rope_fraction 1.5"),
        ({"rope_fraction": 0.0}, r"rope_fraction 0.0"),
        ({"num_token_ids": 40000}, "num_token_ids 40000 is more than vocab_size 32000"),
        ({"num_heads": 0, "head_dim": 64}, "num_heads is 0"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_kv_heads": -1}, "num_kv_heads -1"),
        (
            {"rope_scaling": RopeScaling(kind="longrope", short_factors=(1.0,) * 32)},
            "32 short_factors and 0 long_factors for the 32 frequencies",
        ),
        (
            {"num_heads": 384, "rope_scaling": RopeScaling(kind="dynamic")},
            "a head that rotates 2 values has one",
        ),
    ],
)
def test_what_makes_no_model_is_refused(change, message):
    config = replace(ModelConfig(), **change)
    with pytest.raises(UserError, match=message):
        check_config(config)
    with torch.device("meta"), pytest.raises(UserError, match=message):
        Decoder(config)
