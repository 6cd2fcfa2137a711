"""`gristmill evaluate` measures what lm-evaluation-harness does with its Hugging Face model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from gristmill.cli import main
from gristmill.config.model import ModelConfig
from gristmill.formats import hf
from gristmill.measure.encode import Encoder
from gristmill.measure.subject import Subject
from gristmill.models.decoder import Decoder
from gristmill.models.init import init_weights
from gristmill.tokenizer.tokenizer import Tokenizer

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NOUNS = ["dog", "cat", "girl", "boy", "teacher", "king", "queen", "painter", "waiter", "doctor"]
VERBS = ["sees", "hears", "helps", "likes", "fears", "follows", "admires", "knows"]


def pairs(count=60):
    """Sentences that agree and do not, as BLiMP has them."""
    rng = random.Random(5)
    rows = []
    for _ in range(count):
        first, second = rng.sample(NOUNS, 2)
        verb = rng.choice(VERBS)
        good = f"The {first} {verb} the {second}s that {verb[:-1]} it."
        bad = f"The {first} {verb[:-1]} the {second}s that {verb[:-1]} it."
        rows.append({"sentence_good": good, "sentence_bad": bad})
    return rows


TASKS = {
    "made_pairs": """
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "made_choices": """
output_type: multiple_choice
doc_to_text: "Which is right? {{sentence_good}} Answer:"
doc_to_target: 0
doc_to_choice: "{{['yes', 'no', 'it ' + sentence_bad]}}"
num_fewshot: 2
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "made_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{sentence_good + ' ' + sentence_bad + ' ' + sentence_good}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "made_words": """
output_type: generate_until
doc_to_text: "{{sentence_good}} And"
doc_to_target: " the"
generation_kwargs:
  until: ["e", "\\n\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}
HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
fewshot_split: test
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products wait for a second thread longer than they take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with tasks of each kind on generated sentences."""
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, file=file) + text)
    return folder


@pytest.fixture(scope="module", params=["<s> before texts", "no token before texts"])
def model(request, tmp_path_factory) -> Path:
    """A random model with a byte-level tokenizer, as a Hugging Face directory."""
    from tokenizers import Tokenizer as Definition
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("model")
    definition = Definition(models.BPE())
    definition.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition.decoder = decoders.ByteLevel()
    has_bos = "<s>" in request.param
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>" if has_bos else "<unused>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    definition.train_from_iterator([" ".join(row.values()) for row in pairs()], trainer)
    settings = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if has_bos:
        definition.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
        settings["bos_token"] = "<s>"
    words = folder / "tokenizer"
    words.mkdir()
    definition.save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(
        vocab_size=definition.get_vocab_size(),
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=64,
        max_seq_length=40,
    )
    decoder = Decoder(config)
    init_weights(decoder, seed=3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)  # no two answers tie
    out = folder / "model"
    hf.write(out, config, dict(decoder.state_dict()), tokenizer_dir=words)
    return out


def peer(path, made, tasks):
    """What the package's own model measures, item by item."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(path), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(made), include_defaults=False),
        bootstrap_iters=0,
    )


def ours(path, made, out, tasks, *options):
    """What our command measures, item by item."""
    file = out / "results.json"
    command = ["evaluate", str(path), "--tasks", ",".join(tasks), "--include_path", str(made)]
    command += ["--save_filepath", str(file), "--log_samples", "true", "--device", "cpu"]
    assert main([*command, *options]) == 0
    samples = {
        task: [json.loads(line) for line in (out / f"results.samples/{task}.jsonl").open()]
        for task in tasks
    }
    return json.loads(file.read_text()), samples


def test_every_kind_of_question_has_the_same_answers(model, made, tmp_path):
    tasks = list(TASKS)
    theirs = peer(model, made, tasks)
    found, samples = ours(model, made, tmp_path, tasks)
    for task in tasks:
        for us, them in zip(samples[task], theirs["samples"][task], strict=True):
            assert us["doc_hash"] == them["doc_hash"]
            assert us["prompt_hash"] == them["prompt_hash"]
            check_answers(us["filtered_resps"], them["filtered_resps"])
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-5), metric
    assert found["n-shot"] == theirs["n-shot"]


def check_answers(ours, theirs):
    for us, them in zip(ours, theirs, strict=True):
        if isinstance(them, str):
            assert us == them
        elif isinstance(them, float):
            assert us == pytest.approx(them, rel=1e-5)
        else:
            assert us[0] == pytest.approx(them[0], rel=1e-5, abs=1e-4)
            assert us[1] == them[1]


def test_a_trained_model_has_the_same_answers(shared, made, tmp_path):
    """With a SentencePiece tokenizer, which sees the beginning of a text."""
    path = shared / "data" / "models" / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip("no stories260K")
    # They cut text otherwise where the tokenizer lies without its settings, which an export has,
    # and a text that begins with a space, which none of these does.
    assert main(["export", str(path), str(tmp_path / "hf")]) == 0
    tasks = ["made_pairs", "made_texts", "made_words"]
    theirs = peer(tmp_path / "hf", made, tasks)
    _, samples = ours(path, made, tmp_path, tasks)
    for task in tasks:
        for us, them in zip(samples[task], theirs["samples"][task], strict=True):
            check_answers(us["filtered_resps"], them["filtered_resps"])


PIECES = [
    ("", "The end"),
    ("", " The end"),
    ("", "</s>x"),
    ("Once ", "upon"),
    ("Once", " upon a time"),
    ("Question?\n\n", "A"),
    ("<s>already there", " is BOS"),
    ("with </s> inside", " it goes on"),
    ("a\u00a0b ", "ç 語"),
]


def test_texts_are_cut_alike(model):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    theirs = HFLM(str(model), device="cpu", dtype="float32")
    encoder = Encoder(Tokenizer.load(model))
    asked = []
    theirs._loglikelihood_tokens = lambda requests, **_: asked.extend(requests) or []

    class Request:
        def __init__(self, *args):
            self.args = args

    theirs.loglikelihood([Request(*pair) for pair in PIECES], disable_tqdm=True)
    for pair, (_, context, continuation) in zip(PIECES, asked, strict=True):
        query = encoder.query(*pair)
        assert list(query.context) == context, pair
        assert list(query.continuation) == continuation, pair
    text = " ".join(row["sentence_good"] for row in pairs(9))
    for limit in (7, 16, 1000):
        windows = get_rolling_token_windows(
            theirs.tok_encode(text), theirs.prefix_token_id, limit, 1
        )
        expected = [tuple(map(list, make_disjoint_window(window))) for window in windows]
        assert [(list(q[0]), list(q[1])) for q in encoder.windows(text, limit)] == expected


def test_conversations_are_rendered_alike(model, tmp_path):
    from lm_eval.models.huggingface import HFLM

    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path = tmp_path / "chat"
    path.mkdir()
    for file in model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text(template)
    theirs = HFLM(str(path), device="cpu", dtype="float32")
    subject = Subject(path, device="cpu", precision="32-true", batch_size="auto", seed=1)
    asked = [{"role": "user", "content": "Why?"}]
    for messages, for_reply in (
        (asked, True),
        ([*asked, {"role": "assistant", "content": "Because "}], False),
    ):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=for_reply)
        assert subject.rendered(messages, for_reply=for_reply) == expected
