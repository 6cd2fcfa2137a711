"""What we write is the same model in transformers 4 as in 5, for every family.

transformers 4 lives in an environment of its own: GRISTMILL_TRANSFORMERS4_PYTHON names its
interpreter.
"""

from __future__ import annotations

import json
from pathlib import Path

import peers
import pytest
import torch
from families import CASES, TINY
from safetensors.torch import save_file

from gristmill.formats import hf
from gristmill.formats.model_dir import load_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Case -> why transformers 4 differs from 5, whatever the file says.
EXCEPTIONS = {
    "deepseek_v2-lite": "it leaves the growth of YaRN out of the scores",
    "olmo3-pattern": "it has one base for all blocks",
    "nanochat": "it does not know the architecture",
    "nanochat-bias": "it does not know the architecture",
}

READ = """
import json, sys
from pathlib import Path
import transformers
from safetensors.torch import load_file
transformers.logging.set_verbosity_error()
far = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(directory / "expected" / "logits.safetensors")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "ours", attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: list(names) for key, names in info.items() if names}
    assert not wrong, (directory.name, wrong)
    logits = model.eval()(expected["tokens"]).logits
    far[directory.name] = (logits - expected["logits"]).abs().max().item()
print(json.dumps(far))
"""


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float]:
    """Case -> largest difference of logits between transformers 4 and 5."""
    run = peers.peer(
        "GRISTMILL_TRANSFORMERS4_PYTHON",
        "import transformers; assert transformers.__version__[:2] == '4.'",
    )
    root: Path = tmp_path_factory.mktemp("models")
    tokens = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    for name, (kind, options) in CASES.items():
        if name in EXCEPTIONS:
            continue
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
        build = transformers.AutoModelForCausalLM.from_config
        theirs = build(config, attn_implementation="eager").eval()
        theirs.save_pretrained(root / name / "theirs")
        ours = load_model(root / name / "theirs")
        hf.write(root / name / "ours", ours.config, ours.state_dict(), tokenizer_dir=None)
        (root / name / "expected").mkdir()
        logits = theirs(tokens).logits.detach()
        expected = {"tokens": tokens, "logits": logits}
        save_file(expected, root / name / "expected" / "logits.safetensors")
    return json.loads(run(tmp_path_factory.mktemp("peer"), READ, root))


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXCEPTIONS])
def test_transformers_4_computes_the_same(differences, name):
    assert differences[name] < 1e-5


def test_exceptions_are_cases():
    assert set(EXCEPTIONS) <= set(CASES)
