"""Every command of the documentation under a line `<!-- cpu -->` runs, in the order of its page.

The mark is for the lines up to the next empty one. What the commands name is there as a small
stand-in; commands that train get options that make them short, and `chat` a line to answer.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import tutorial_world

from gristmill.cli import main
from gristmill.config.scripts import translate

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
MARK = "<!-- cpu -->"
TUNING = (
    *tutorial_world.SHORT,
    *("--train.max_steps", "2", "--train.global_batch_size", "4", "--train.micro_batch_size", "4"),
)
TRAINING = (*TUNING, "--train.max_seq_length", "32")
SAMPLING = ("--max_new_tokens", "4", "--precision", "32-true")
EXTRA = {
    "pretrain": TRAINING,
    "finetune": TUNING,
    "generate": SAMPLING,
    "chat": SAMPLING,
    "evaluate": ("--device", "cpu"),
}
SHARED = "/shared/"
MODELS = {
    "microsoft/phi-2": "microsoft/phi-2",
    "finetune/phi-2/lora": "microsoft/phi-2",
    "finetune/qwen2.5-0.5b/full": "Qwen/Qwen2.5-0.5B-Instruct",
    "finetune/llama-3.1-8b/lora": "meta-llama/Llama-3.1-8B",
}
"""Words that need a downloaded model, and which; of stand-ins the architecture does not matter."""
OUTPUTS = ("--output_dir", "--out_dir", "--destination_path", "--target_dir")


def marked(page: Path) -> list[list[str]]:
    """The words of each command under a mark."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found: list[list[str]] = []
    for start in (n for n, line in enumerate(lines) if line.strip() == MARK):
        block = iter(lines[start + 1 :])
        line = next(line for line in block if line.strip())
        while line.strip() and line.strip() != "```":
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words and not line.startswith("```"):
                found.append(words)
            line = next(block, "")
    return found


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if marked(page)]


def piped(words: list[str]) -> tuple[list[str], str]:
    """The words of a command after `gristmill`, and what it is given to read."""
    given = "Once upon a time\n\n"
    if "|" in words:
        first, words = words[: words.index("|")], words[words.index("|") + 1 :]
        assert first[0] == "echo", first
        given = " ".join(first[1:]) + "\n"
    assert words[0] == "gristmill", words
    return words[1 : words.index(">") if ">" in words else None], given


class StandIns:
    """What the pages name, each in the layout of the real one, made when a command needs it."""

    def __init__(self, place: Path, finished: Path, tutorials: tutorial_world.Tutorials) -> None:
        self.place, self.finished, self.tutorials = place, finished, tutorials
        self.makers: dict[str, Callable[[Path], object]] = {
            "books": small.write_novels,
            "text": lambda path: [small.write_novels(path / name) for name in ("web", "books")],
            "raw": self.records,
            "out/quickstart/text": self.functions,
            "tok": self.tokenizer,
            "tokenizers/books": self.tokenizer,
            "data/books": self.dataset,
            "OUT": self.dataset,
            "out/run": lambda path: shutil.copytree(finished / "run", path),
            "out/quickstart/run": self.model,
            "out/my-chat-model": self.chat_model,
            "my-records.json": self.instructions,
            "my_tasks": self.tasks,
            "prompts.txt": lambda path: path.write_text("Once upon a time\nThe mill\n"),
            "prompts.jsonl": lambda path: path.write_text('{"prompt": "The mill"}\n'),
            "custom_pretraining_data": tutorial_world.folder_of_texts,
            "custom_pretraining_data_2": lambda path: tutorial_world.folder_of_texts(path, 1),
            "data/slimpajama-raw": tutorial_world.slimpajama,
            "data/starcoderdata-raw": tutorial_world.starcoder,
            "data/RedPajama-Data-1T-Sample": tutorial_world.redpajama_sample,
            "checkpoints/lit-llama/tokenizer.model": self.tokenizer_model,
            f"{place}/shared/team": lambda path: tutorial_world.fineweb(
                path / "datasets/fineweb/sample_fine_web_10BT"
            ),
            f"{place}/shared/cluster/checkpoints": self.tokenizer_of_llama3,
        }

    def for_command(self, words: list[str]) -> None:
        """Make what the command reads and is not there."""
        read = [word for n, word in enumerate(words) if n and words[n - 1] not in OUTPUTS]
        read = [word.partition("=")[2] or word for word in read if not word.startswith(OUTPUTS)]
        for name, make in self.makers.items():
            path = self.place / name
            if not path.exists() and any(f"{word}/".startswith(f"{name}/") for word in read):
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path)
        for name in (name for name in MODELS if name in read):
            self.chat_model(self.place / "checkpoints" / MODELS[name])

    def model(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self.tutorials.models["microsoft/phi-2"].items():
            (path / name).write_bytes(content)

    def task(self, path: Path) -> None:
        path.mkdir()
        tutorial_world.put_task(path, "my_pairs")

    def chat_model(self, path: Path) -> None:
        self.model(path)
        template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
        (path / "chat_template.jinja").write_text(template)

    def instructions(self, path: Path) -> None:
        texts = tutorial_world.texts(210, 40, 5)
        path.write_text(json.dumps([{"instruction": text, "output": text} for text in texts]))

    def tasks(self, path: Path) -> None:
        path.mkdir()
        lines = [
            json.dumps({"good": f"{t} x", "bad": f"x {t}"}) for t in tutorial_world.texts(9, 6)
        ]
        (path / "pairs.jsonl").write_text("\n".join(lines))
        (path / "my_pairs.yaml").write_text(
            "task: my_pairs\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {path / 'pairs.jsonl'}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: ''\ndoc_to_target: 0\n"
            "doc_to_choice: '{{[good, bad]}}'\nmetric_list: [{metric: acc}]\n"
        )

    def records(self, path: Path) -> None:
        rows = [{"text": t, "body": t, "lang": "en"} for t in tutorial_world.texts(200, 60)]
        tutorial_world.put_lines(path / "a.jsonl", rows)

    def functions(self, path: Path) -> None:
        path.mkdir()
        functions = (f"def f{n}(x):\n    return x + {n}\n" for n in range(3000))
        (path / "mill.py").write_text("\n".join(functions))

    def tokenizer(self, path: Path) -> None:
        shutil.copytree(self.finished / "tokenizer", path)

    def tokenizer_model(self, path: Path) -> None:
        path.write_bytes(self.tutorials.sentencepiece)

    def tokenizer_of_llama3(self, path: Path) -> None:
        self.tokenizer(path / "meta-llama/Meta-Llama-3-8B")

    def dataset(self, path: Path) -> None:
        source = str(self.finished / "novels")
        words = ["prepare", "textfiles", "--input_dir", source, "--val_fraction", "0.1"]
        words += ["--output_dir", str(path), "--tokenizer_dir", str(self.finished / "tokenizer")]
        assert main(words) == 0


def test_pages_have_marks():
    names = {page.name for page in PAGES}
    assert {"litgpt.md", "tinyllama.md", "lit-llama.md", "ray.md", "quickstart.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_marked_cpu_run(page, place, world, tutorials, monkeypatch, capsys):
    monkeypatch.setattr("gristmill.config.scripts.on_ray", lambda: False)
    stand_ins = StandIns(place, world, tutorials)
    for words in marked(page):
        words, given = piped(words)
        words = [word.replace(SHARED, f"{place}{SHARED}") for word in words]
        stand_ins.for_command(words)
        meant = translate(words)
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        extra = () if {"list", "--data.help"} & set(meant) else EXTRA.get(meant[0], ())
        try:
            code = main([*words, *extra])
        except SystemExit as left:  # --help
            code = left.code
        assert code == 0, (shlex.join(words), capsys.readouterr().err[-2000:])
