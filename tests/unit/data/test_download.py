from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gristmill.cli import main
from gristmill.config.commands import Download
from gristmill.config.parse import parse
from gristmill.data.raw import download as command
from gristmill.data.raw import fetch
from gristmill.data.raw.download import download
from gristmill.util.errors import RunError, UserError

from .fake_hub import Hub, Repository

TOKEN = "hf_secretsecretsecret"


def noise(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "_WAIT_SECONDS", 0.01)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # The library reads it when it is first imported, perhaps by another test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": noise(3000, 2),
        "tokenizer_config.json": b"{}",
        "model-00001-of-00002.safetensors": noise(300_000, 3),
        "model-00002-of-00002.safetensors": noise(200_000, 4),
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "pytorch_model.bin": noise(500_000, 5),
        "consolidated.safetensors": noise(500_000, 6),
        "onnx/model.safetensors": noise(2000, 7),
        ".gitattributes": b"*.bin filter=lfs",
        "README.md": b"# a model",
    }
    corpus = {
        ".gitattributes": b"x",
        "README.md": b"# a corpus",
        "sample/10BT/000 a.parquet": noise(120_000, 8),
        "sample/10BT/001.parquet": noise(60_000, 9),
        "data/big/002.parquet": noise(50_000, 10),
    }
    with Hub(
        models={"org/name": Repository(files), "org/gated": Repository(files, gated=True)},
        datasets={"org/corpus": Repository(corpus)},
        tokens={TOKEN},
    ) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and fetch.STATE not in path.parts
    }


def test_a_model_comes_with_its_settings_and_one_form_of_its_weights(hub, tmp_path, capsys):
    download(Download(repo_id="org/name"))
    found = tree(tmp_path / "checkpoints/org/name")
    assert set(found) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert all(data == hub.models["org/name"].files[name] for name, data in found.items())
    assert "6 files are complete (6 fetched" in capsys.readouterr().out
    asked = len(hub.asked)
    download(Download(repo_id="org/name"))
    assert "0 fetched" in capsys.readouterr().out
    # Asked again is only what the repository holds, no file.
    assert all("/api/" in path for _, path, _ in hub.asked[asked:])


@pytest.mark.parametrize(
    "words",
    [
        ["org/name", "--tokenizer_only", "true"],
        ["--repo_id", "org/name", "--tokenizer_only=True"],
        ["--repo_id=org/name", "--tokenizer_only"],
    ],
)
def test_only_the_tokenizer(hub, tmp_path, words):
    download(parse(Download, words, prog="gristmill download", positionals=("repo_id",)))
    found = tree(tmp_path / "checkpoints/org/name")
    assert set(found) == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_model_without_safetensors_comes_as_it_is(hub, tmp_path):
    files = hub.models["org/name"].files
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    download(Download(repo_id="org/name"))
    assert "pytorch_model.bin" in tree(tmp_path / "checkpoints/org/name")
    del files["pytorch_model.bin"]
    with pytest.raises(UserError, match="holds no weights"):
        download(Download(repo_id="org/name"))


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        # The whole model beside its shards.
        (
            ["model.safetensors", "model-00001-of-00001.safetensors"]
            + ["model.safetensors.index.json"],
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
        # An index without its shards.
        (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
        (["weights.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
        (["consolidated.safetensors", "pytorch_model.bin"], ["consolidated.safetensors"]),
        (["pytorch_model.bin", "pytorch_model.fp32.bin"], ["pytorch_model.bin"]),
        (["weights.bin", "training_args.bin", "optimizer.bin"], ["weights.bin"]),
        (["lit_model.pth", "model_config.yaml", "q8.gguf"], ["lit_model.pth", "model_config.yaml"]),
        (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["pytorch_model.bin"]),
    ],
)
def test_weights_come_in_one_form_once(hub, tmp_path, there, taken):
    more = ["original/consolidated.00.pth", "onnx/model.onnx", "model-q4.gguf", "events.log"]
    hub.models["org/forms"] = Repository({name: b"x" for name in ["config.json", *there, *more]})
    download(Download(repo_id="org/forms"))
    assert set(tree(tmp_path / "checkpoints/org/forms")) == {"config.json", *taken}


@pytest.mark.parametrize("name", ["pythia-14m", "Pythia-14M", "EleutherAI/pythia-14m"])
def test_a_known_model_goes_without_its_organisation(hub, tmp_path, capsys, name):
    hub.models["EleutherAI/pythia-14m"] = hub.models["org/name"]
    assert main(["download", name, "--tokenizer_only", "true"]) == 0
    assert "tokenizer.json" in tree(tmp_path / "checkpoints/EleutherAI/pythia-14m")
    assert "--tokenizer_dir checkpoints/EleutherAI/pythia-14m" in capsys.readouterr().out
    assert main(["download", name, "--checkpoint_dir", "models"]) == 0
    assert "model.safetensors.index.json" in tree(tmp_path / "models/EleutherAI/pythia-14m")
    assert "gristmill chat models/EleutherAI/pythia-14m" in capsys.readouterr().out


def test_a_wrong_name_brings_the_nearest(hub, capsys):
    assert main(["download", "EleutherAI/pythia-14mm"]) == 2
    assert "Did you mean EleutherAI/pythia-14m" in capsys.readouterr().err
    assert main(["download", "org/nothing-like-it"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["org/corpus", "datasets/org/corpus", "https://huggingface.co/datasets/org/corpus/tree/main"],
)
def test_a_corpus_comes_whole_or_by_pattern(hub, tmp_path, name):
    kind = "dataset" if name == "org/corpus" else "model"
    download(Download(repo_id=name, repo_type=kind, pattern="sample/10BT/*"))
    found = tree(tmp_path / "data/org/corpus")
    assert set(found) == {"sample/10BT/000 a.parquet", "sample/10BT/001.parquet"}
    download(Download(repo_id=name, repo_type=kind))
    corpus = hub.datasets["org/corpus"].files
    assert tree(tmp_path / "data/org/corpus") == {
        name: data for name, data in corpus.items() if name != ".gitattributes"
    }
    with pytest.raises(UserError, match=r"no file of org/corpus matches '\*.txt' \(there: "):
        download(Download(repo_id=name, repo_type=kind, pattern="*.txt"))


def test_a_broken_connection_goes_on_where_it_was(hub, tmp_path):
    hub.cuts["model-00001-of-00002.safetensors"] = [100_000, 50_000, 0, 120_000]
    download(Download(repo_id="org/name", out_dir="m"))
    data = hub.models["org/name"].files["model-00001-of-00002.safetensors"]
    assert (tmp_path / "m/model-00001-of-00002.safetensors").read_bytes() == data
    ranges = [
        headers.get("range")
        for headers in hub.gets("model-00001-of-00002.safetensors")
        if headers["host"] in hub.store
    ]
    assert ranges == [None, *(f"bytes={n}-" for n in (100_000, 150_000, 150_000, 270_000))]
    assert not list((tmp_path / "m" / fetch.STATE).rglob("*.part"))


def test_a_server_that_only_cuts_is_given_up_and_the_next_run_goes_on(hub, tmp_path):
    name = "model-00001-of-00002.safetensors"
    hub.cuts[name] = [70_000] + [0] * fetch._TRIES
    with pytest.raises(RunError, match=r"1 of 6 files .*connection broke after 70,000 of 300,000"):
        download(Download(repo_id="org/name", out_dir="m"))
    assert not (tmp_path / "m" / name).exists()
    assert (tmp_path / "m/model-00002-of-00002.safetensors").exists()
    seen = len(hub.gets(name))
    download(Download(repo_id="org/name", out_dir="m"))
    assert [headers.get("range") for headers in hub.gets(name)[seen:]] == ["bytes=70000-"] * 2
    assert (tmp_path / "m" / name).read_bytes() == hub.models["org/name"].files[name]


def test_a_server_without_ranges_starts_over(hub, tmp_path):
    hub.ranges = False
    hub.cuts["tokenizer.json"] = [1000]
    download(Download(repo_id="org/name", tokenizer_only=True, out_dir="m"))
    data = hub.models["org/name"].files["tokenizer.json"]
    assert (tmp_path / "m/tokenizer.json").read_bytes() == data


def test_bytes_that_are_not_the_repositorys_are_not_kept(hub, tmp_path):
    data = hub.models["org/name"].files["tokenizer.json"]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    begun = fetch.Fetcher(tmp_path / "m")._part(fetch.Remote("", "tokenizer.json", 3000, digest))
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"x" * 500)
    download(Download(repo_id="org/name", tokenizer_only=True, out_dir="m"))
    assert (tmp_path / "m/tokenizer.json").read_bytes() == data
    ranges = [headers.get("range") for headers in hub.gets("tokenizer.json")]
    assert ranges == ["bytes=500-", "bytes=500-", None, None]


def test_a_file_that_is_there_is_taken_when_it_is_the_same(hub, tmp_path):
    files = hub.models["org/name"].files
    (tmp_path / "m").mkdir()
    (tmp_path / "m/tokenizer.json").write_bytes(files["tokenizer.json"])
    (tmp_path / "m/config.json").write_bytes(b"x" * len(files["config.json"]))
    download(Download(repo_id="org/name", tokenizer_only=True, out_dir="m"))
    assert not hub.gets("/tokenizer.json")
    assert (tmp_path / "m/config.json").read_bytes() == files["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 128 + signal.SIGINT)]
)
def test_a_killed_download_goes_on(hub, tmp_path, sent, code):
    name = "model-00001-of-00002.safetensors"
    hub.models["org/name"].files[name] = data = noise(40_000_000, 11)
    hub.cuts[name] = [10_000_000] + [0] * 50
    command = [sys.executable, "-m", "gristmill", "download", "org/name", "--out_dir", "m"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(hub.gets(name)) < 4 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(sent)
    _, said = running.communicate()
    assert running.returncode == code
    assert ("the same command goes on" in said) == (sent == signal.SIGINT)
    assert not (tmp_path / "m" / name).exists()
    hub.cuts.clear()
    seen = len(hub.gets(name))
    assert main(command[3:]) == 0
    assert hub.gets(name)[seen]["range"] == "bytes=10000000-"
    assert (tmp_path / "m" / name).read_bytes() == data


def test_progress_is_shown_in_lines_where_there_is_no_terminal(hub, monkeypatch, capsys):
    monkeypatch.setattr(command, "_LINE_SECONDS", 0.0)
    download(Download(repo_id="org/name", out_dir="m"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "MB/s of 0.50 MB" in line]
    assert lines
    assert "\r" not in "".join(lines)


def test_a_bare_download_lists_repositories(capsys):
    assert main(["download"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "EleutherAI/pythia-14m" in listed
    assert listed == sorted(listed, key=str.lower)


def test_a_wrong_name_and_a_wrong_revision(hub):
    with pytest.raises(UserError, match=r"no model org/nmae at http://127.* or it is private.*"):
        download(Download(repo_id="org/nmae"))
    with pytest.raises(UserError, match="for a dataset add --repo_type dataset"):
        download(Download(repo_id="org/corpus"))
    with pytest.raises(UserError, match=r"org/name has no revision 'step3'"):
        download(Download(repo_id="org/name", revision="step3"))
    with pytest.raises(UserError, match="is no repository"):
        download(Download(repo_id="../../etc"))


def test_a_revision_is_fetched_from_its_commit(hub, tmp_path):
    hub.models["org/name"].revisions = ("main", "step3")
    hub.models["org/name"].commit = "c" * 40
    download(Download(repo_id="org/name", revision="step3", tokenizer_only=True, out_dir="m"))
    assert any(path.endswith("/revision/step3") for _, path, _ in hub.asked)
    resolved = {path.split("/resolve/")[1][:40] for _, path, _ in hub.asked if "/resolve/" in path}
    assert resolved == {"c" * 40}


def test_a_gated_repository_asks_for_a_token_and_never_shows_it(hub, tmp_path, capsys):
    with pytest.raises(UserError, match=r"no token says who asks.*HF_TOKEN") as without:
        download(Download(repo_id="org/gated", tokenizer_only=True))
    assert f"{hub.url}/org/gated" in str(without.value)
    wrong = Download(repo_id="org/gated", tokenizer_only=True, access_token="hf_wrongwrongwrong")
    with pytest.raises(UserError, match="the token's owner has not") as refused:
        download(wrong)
    download(Download(repo_id="org/gated", tokenizer_only=True, access_token=TOKEN))
    said = capsys.readouterr()
    shown = said.out + said.err + str(refused.value) + repr(wrong) + str(without.value)
    assert "hf_" not in shown
    assert "tokenizer.json" in tree(tmp_path / "checkpoints/org/gated")


def test_a_token_that_is_not_known(hub, capsys):
    with pytest.raises(UserError, match="does not know the token") as refused:
        download(Download(repo_id="org/name", access_token="hf_expired"))
    assert "hf_expired" not in str(refused.value) + capsys.readouterr().err


def test_the_token_of_the_environment_goes_to_the_hub_only(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download(Download(repo_id="org/gated", tokenizer_only=True))
    assert "tokenizer.json" in tree(tmp_path / "checkpoints/org/gated")
    for _, _, headers in hub.asked:
        if headers["host"] in hub.store:
            assert "authorization" not in headers
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.asked)


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"cannot reach http://127.0.0.1:9 .*HF_ENDPOINT"):
        download(Download(repo_id="org/name"))


def test_no_space_is_said_before_the_start(hub, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match="no space left for m: 0.00 GB are needed"):
        download(Download(repo_id="org/name", out_dir="m"))
    assert not hub.gets("safetensors")


def test_a_file_in_the_place_of_the_directory(hub, tmp_path):
    (tmp_path / "m").write_text("")
    with pytest.raises(UserError, match="m is a file"):
        download(Download(repo_id="org/name", out_dir="m"))


def test_weights_as_gguf_alone_are_named(hub):
    hub.models["org/quantised"] = Repository({"m-Q8_0.gguf": b"x", "README.md": b"x"})
    with pytest.raises(UserError, match=r"as GGUF \(m-Q8_0.gguf\).*--pattern"):
        download(Download(repo_id="org/quantised"))


def redpajama(hub):
    base = "/redpajama-data-1T/v1.0.0/"
    hub.plain = {
        f"{base}arxiv/arxiv_1.jsonl": noise(90_000, 1),
        f"{base}common_crawl/2019-30/en 0.jsonl.zst": noise(80_000, 2),
        f"{base}wikipedia/wiki.jsonl": noise(70_000, 3),
    }
    for path in hub.plain:
        hub.tags[path] = f'"{len(hub.plain[path])}"'
    return "\n".join(f"{hub.url}{path}".replace(" ", "%20") for path in hub.plain) + "\n\n"


def test_a_list_of_addresses(hub, tmp_path):
    (tmp_path / "urls.txt").write_text(redpajama(hub))
    hub.cuts["wiki.jsonl"] = [30_000, 0, 10]
    download(Download(urls="urls.txt", out_dir="data/r"))
    base = "/redpajama-data-1T/v1.0.0/"
    expected = {path.removeprefix(base): data for path, data in hub.plain.items()}
    assert tree(tmp_path / "data/r") == expected
    sent = [headers.get("range") for headers in hub.gets("wiki.jsonl")]
    assert sent == [None, "bytes=30000-", "bytes=30000-", "bytes=30010-"]
    # Sizes are compared on the next run; what was cut by another tool comes anew.
    (tmp_path / "data/r/arxiv/arxiv_1.jsonl").write_bytes(b"cut")
    asked = len(hub.asked)
    download(Download(urls="urls.txt", out_dir="data/r"))
    assert tree(tmp_path / "data/r") == expected
    assert [path for method, path, _ in hub.asked[asked:] if method == "GET"] == [
        f"{base}arxiv/arxiv_1.jsonl"
    ]


def test_part_of_a_list_keeps_its_folders(hub, tmp_path):
    text = redpajama(hub)
    (tmp_path / "urls.txt").write_text(text.splitlines()[1])
    base = f"{hub.url}/redpajama-data-1T/v1.0.0"
    download(Download(urls="urls.txt", out_dir="r", base_url=base))
    assert set(tree(tmp_path / "r")) == {"common_crawl/2019-30/en 0.jsonl.zst"}
    (tmp_path / "all.txt").write_text(text)
    download(Download(urls="all.txt", out_dir="s", pattern="arxiv/*"))
    assert set(tree(tmp_path / "s")) == {"arxiv/arxiv_1.jsonl"}


def test_content_that_changed_between_two_pieces_is_not_glued(hub, tmp_path):
    (tmp_path / "urls.txt").write_text(f"{hub.url}/a/b.bin\n")
    hub.plain = {"/a/b.bin": noise(50_000, 1)}
    hub.tags["/a/b.bin"] = '"one"'
    hub.cuts["b.bin"] = [20_000] + [0] * fetch._TRIES
    with pytest.raises(RunError, match="1 of 1 files are missing"):
        download(Download(urls="urls.txt", out_dir="o"))
    hub.plain["/a/b.bin"] = noise(50_000, 2)
    hub.tags["/a/b.bin"] = '"two"'
    download(Download(urls="urls.txt", out_dir="o"))
    assert (tmp_path / "o/b.bin").read_bytes() == noise(50_000, 2)


def test_an_address_that_is_gone_does_not_stop_the_others(hub, tmp_path):
    (tmp_path / "urls.txt").write_text(redpajama(hub) + f"{hub.url}/redpajama-data-1T/gone.jsonl")
    with pytest.raises(RunError, match=r"1 of 4 files .*gone.jsonl: the server answers 404"):
        download(Download(urls="urls.txt", out_dir="r"))
    assert len(tree(tmp_path / "r")) == 3


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({"out_dir": None}, "http://h/a/b", "--urls needs a directory"),
        ({"repo_id": "a/b"}, "http://h/a/b", "two sources"),
        ({"urls": "none.txt"}, "", r"cannot read the list none.txt \(No such file"),
        ({}, "", "holds no address"),
        ({}, "http://h/a/b\nftp://h/c", "line 2 of urls.txt is no address"),
        ({"base_url": "http://h/x/"}, "http://h/a/b", "does not begin with --base_url"),
        ({}, "http://h/a/b?x=1\nhttp://h/a/b?x=2", "would both be b"),
        ({}, "http://h/a/..%2Fb", "leads elsewhere"),
        ({"revision": "r"}, "http://h/a/b", "--revision is for repositories"),
    ],
)
def test_mistakes_about_lists(hub, tmp_path, options, text, expected):
    (tmp_path / "urls.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        download(Download(**{"urls": "urls.txt", "out_dir": "o"} | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "nothing to download is named"),
        ({"repo_id": "org/name", "num_workers": 0}, "--num_workers 0"),
        ({"repo_id": "org/name", "checkpoint_dir": "m", "out_dir": "n"}, "leave one of them out"),
        ({"repo_id": "org/name", "tokenizer_only": True, "pattern": "*"}, "both choose files"),
    ],
)
def test_mistakes_about_repositories(hub, options, expected):
    with pytest.raises(UserError, match=expected):
        download(Download(**options))


def test_two_downloads_into_one_directory(hub, tmp_path):
    out = tmp_path / "m"
    with fetch.Fetcher(out)._exclusive(), pytest.raises(UserError, match="another download into m"):
        download(Download(repo_id="org/name", out_dir="m"))


def test_a_dataset_of_the_hub_is_read_where_it_is(hub, tmp_path):
    lines = [f'{{"text": "story {number} {"x" * 400}"}}' for number in range(20)]
    hub.datasets["org/stories"] = Repository(
        {
            "README.md": b"# stories",
            "data/a.jsonl": "\n".join(lines[:10]).encode(),
            "data/b.jsonl": "\n".join(lines[10:]).encode(),
        }
    )
    code = (
        "from gristmill.data.raw import sources\n"
        "for text in sources.iter_documents('hf://datasets/org/stories', 'jsonl'):\n"
        "    print(text.split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(number) for number in range(20)], done.stderr
