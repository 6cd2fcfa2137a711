"""`gristmill serve` as a process: wrong options, requests, and its end by signals."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
import small

from gristmill.cli import main
from gristmill.config.model import ModelConfig
from gristmill.formats import hf
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.util.extras import install_command

KEY = "a-key-of-the-tests"
LONG = {"prompt": "the mill", "max_tokens": 50, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model; what it writes does not matter here."""
    folder = tmp_path_factory.mktemp("served")
    text = small.write_novels(folder / "novels", files=2)
    tokenizer = small.train_tokenizer(text, folder / "tokenizer")
    model = Decoder(ModelConfig(**small.MODEL))
    init_weights(model, seed=1)
    hf.write(folder / "model", model.config, dict(model.state_dict()), tokenizer_dir=tokenizer)
    return folder / "model"


@contextmanager
def served(path, *options, **variables):
    """A server's process and the address that it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "gristmill", "serve", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("  curl "):
                break
        assert process.poll() is None, "".join(said)
        address = next(line for line in said if "Listening on" in line)
        yield process, address.split("http://")[1].split("/v1")[0], "".join(said)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def post(address, path, body, key=KEY):
    client = http.client.HTTPConnection(address, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    client.request("POST", path, json.dumps(body), headers)
    return client.getresponse()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "99999"], "--port 99999 is no port"),
        (["--host", "not a host"], "is no address of this machine"),
        (["--host", "0.0.0.0"], "export GRISTMILL_API_KEY="),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 cannot be listened on"),
        (["--api_key", "short"], "the API key has 5 characters"),
        (["--api_key", "with spaces in it"], "some that a header cannot hold"),
        (["--batch_size", "0"], "--batch_size 0 is too small"),
        (["--queue_size", "-1"], "--queue_size -1 is too small"),
        (["--max_request_bytes", "1"], "--max_request_bytes 1 is too small"),
        (["--grace_s", "-1"], "--grace_s -1"),
        (["--max_new_tokens", "0"], "nothing to generate"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--max_length", "65"], "--max_length 65 is not from 2 to the model's context (64"),
        (["--batch_size", "1_000_000_000"], "does not fit into a quarter of the memory"),
        (["--openai"], "--openai"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(model_dir, capsys, monkeypatch, options, says):
    monkeypatch.delenv("GRISTMILL_API_KEY", raising=False)
    assert main(["serve", str(model_dir), "--port", "0", *options]) == 2
    assert says in capsys.readouterr().err


def test_no_model(tmp_path, capsys):
    assert main(["serve"]) == 2
    assert "gristmill serve out/quickstart/run" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_missing_packages_are_named(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("gristmill.infer.serve.command.find_spec", lambda name: None)
    assert main(["serve", str(model_dir)]) == 2
    said = capsys.readouterr().err
    assert f"(fastapi, uvicorn). Install them: {install_command('serve')}" in said


def test_a_port_that_is_taken(model_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(model_dir), "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 cannot be listened on (address already in use)" in err
    assert f"--port {port + 1}" in err


def test_the_key_is_not_printed(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "out", "--api_key", KEY, "--print_config"])
    printed = capsys.readouterr().out
    assert "checkpoint_dir: out" in printed
    assert KEY not in printed


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_requests_and_a_graceful_end(model_dir):
    with served(model_dir, GRISTMILL_API_KEY=KEY) as (process, address, said):
        assert "replies at a time of up to 64 tokens" in said
        assert "clients need the key" in said
        assert KEY not in said
        assert post(address, "/v1/completions", LONG, key="another").status == 401
        whole = json.load(post(address, "/v1/completions", {"prompt": "the", "temperature": 0}))
        assert whole["usage"]["completion_tokens"] == 16
        stream = post(address, "/v1/completions", LONG)
        assert stream.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        rest = stream.read()
        assert process.wait(timeout=60) == 0
        # It either ended before the signal came or was let end.
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.stderr.read().endswith("Stopped.\n")
        with pytest.raises(ConnectionRefusedError):
            post(address, "/v1/completions", LONG)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(model_dir, number):
    options = ("--batch_size", "1", "--queue_size", "500")
    with served(model_dir, *options) as (process, address, _):
        streams = [post(address, "/v1/completions", {**LONG, "n": 200}) for _ in range(2)]
        assert streams[0].readline().startswith(b"data: ")
        process.send_signal(number)
        first = process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        err = first + process.stderr.read()
        assert "Traceback" not in err
        assert "Stopped at once" in err
