"""Every name of LitGPT's list stands for the same model here.

LitGPT lives in an environment of its own: GRISTMILL_LITGPT_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import peers
import pytest

from gristmill.config.model import ModelConfig
from gristmill.models import zoo
from gristmill.models.zoo import litgpt
from gristmill.models.zoo.family import RESOLVED, UNSAID

LIST = """
import json
from dataclasses import asdict
from litgpt.config import Config, configs
print(json.dumps([asdict(Config.from_name(config["name"])) for config in configs]))
"""

# Not about structure: contexts and rows are those of the Hugging Face files, of which LitGPT's
# table keeps shorter contexts and adds rows of its own; tied matrices it does not know.
# The pattern of windows is compared with their size, block by block.
ELSEWHERE = {*UNSAID, "max_seq_length", "vocab_size", "tie_embeddings", "sliding_pattern"}

# Pattern of names, fields: why they differ.
EXCEPTIONS = [
    ("Platypus2-70B", {"num_kv_heads"}, "it is a Llama 2 70B, which has 8; LitGPT left it out"),
    ("stable-code-3b", {"rope_theta"}, "the file says 1000000"),
    ("(Code)?Gemma.*", {"norm_eps"}, "the files say 1e-6; LitGPT has its default"),
    ("Phi-(3|4)-mini.*", {"sliding_window"}, "the files have one less than LitGPT"),
    ("Phi-3.5-mini-instruct", {"sliding_window"}, "the file has one longer than the context"),
    (
        "Phi-3-mini-128k-instruct|Phi-3.5-mini-instruct|Phi-4-mini.*",
        {"rope_scaling"},
        "the files have LongRoPE, which LitGPT lacks",
    ),
]


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> dict[str, dict]:
    """LitGPT's name -> its configuration."""
    run = peers.peer("GRISTMILL_LITGPT_PYTHON", "import litgpt")
    configs = json.loads(run(tmp_path_factory.mktemp("peer"), LIST))
    return {config["name"]: config for config in configs}


def structure(config: ModelConfig) -> dict[str, object]:
    """Field -> what it comes to, where it says something about the model."""
    out = {
        field.name: getattr(config, RESOLVED.get(field.name, field.name))
        for field in fields(ModelConfig)
        if field.name not in ELSEWHERE
    }
    has_bias = config.norm == "layernorm" and config.norm_weight and config.norm_bias
    moe = config.moe and replace(config.moe, balance_loss=0.0)  # of training only
    return out | {"norm_bias": has_bias, "moe": moe}


def expected_difference(name: str, field: str) -> bool:
    return any(re.fullmatch(pattern, name) and field in of for pattern, of, _ in EXCEPTIONS)


def test_every_name_is_known(listed):
    assert len(listed) == 210
    missing = sorted(set(listed) - set(zoo.names()))
    assert not missing, f"{len(missing)} missing: {missing}"


def test_names_come_from_the_same_repositories(listed):
    models = zoo.models()
    theirs = {n: "{org}/{name}".format(**c["hf_config"]).lower() for n, c in listed.items()}
    ours = {name: (models[name].repo or "").lower() for name in listed if name in models}
    assert ours.items() <= theirs.items(), ours.items() - theirs.items()


def test_every_name_has_the_same_structure(listed):
    wrong = []
    for name, raw in listed.items():
        if name not in zoo.models():
            continue
        ours, theirs = structure(zoo.get(name)), structure(litgpt.parse(raw))
        wrong += [
            f"{name}: {field} {ours[field]} there {theirs[field]}"
            for field in ours
            if ours[field] != theirs[field] and not expected_difference(name, field)
        ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_one(listed):
    """The list above has no line that a later LitGPT, or a later table, has made idle."""
    for pattern, of, _ in EXCEPTIONS:
        names = [name for name in listed if re.fullmatch(pattern, name) and name in zoo.models()]
        assert names, pattern
        for name in names:
            ours, theirs = structure(zoo.get(name)), structure(litgpt.parse(listed[name]))
            assert of == {field for field in of if ours[field] != theirs[field]}, name


def test_rows_hold_the_tokens(listed):
    for name, raw in listed.items():
        if name in zoo.models():
            assert zoo.get(name).vocab_size >= raw["vocab_size"], name
