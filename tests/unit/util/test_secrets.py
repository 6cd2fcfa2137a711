"""Keys of the environment, and what only sounds like one."""

import yaml

from gristmill.util.secrets import redact, redacted


def test_keys_of_the_environment_and_of_addresses_are_taken_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OPENAI_APIKEY", "sk-12345678")
    text = "hf_abcdefgh and sk-12345678 at s3://name:word@host/x"
    assert redact(text) == "*** and *** at s3://***@host/x"


def test_values_that_are_no_keys_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZER_DIR", "checkpoints/pythia-14m")
    monkeypatch.setenv("MAX_TOKENS", "300000000")
    assert redact("checkpoints/pythia-14m 300000000") == "checkpoints/pythia-14m 300000000"


def test_settings_without_keys_are_still_settings(monkeypatch):
    monkeypatch.setenv("RUN_KEY", "secret-name")
    settings = {
        "out_dir": "secret-name/x",
        "parts": [("secret-name", 3)],
        "steps": 10,
        "none": None,
    }
    clean = redacted(settings)
    assert clean == {"out_dir": "***/x", "parts": [["***", 3]], "steps": 10, "none": None}
    assert yaml.safe_load(yaml.safe_dump(clean)) == clean
