"""Settings to a job: every `auto` resolved, every check passed, before anything is written.

    settings ─ model ─ tokenizer ─ data ─ run directory ─ length ─▶ Job

Cheap checks come first, so that a mistake is found before a corpus is prepared.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from gristmill.config.commands import Pretrain, Training
from gristmill.config.data import DataModule, LitData, Mixture, RawText, RedPajama
from gristmill.config.model import ModelConfig
from gristmill.config.parse import to_dict
from gristmill.data.modules import open_datasets
from gristmill.data.preparation.job import Executor
from gristmill.data.reading.corpus import Corpus
from gristmill.data.reading.stream import TokenStream
from gristmill.data.reading.training import document_mask, training_stream
from gristmill.data.storage import is_url
from gristmill.formats.download import own_tokenizer
from gristmill.formats.hf import with_bos_policy
from gristmill.formats.model_dir import open_model_dir, read_config
from gristmill.formats.tokenizer_files import load_tokenizer
from gristmill.models import counts, zoo
from gristmill.models.check import check_config
from gristmill.models.device import choose_device, resolve_precision
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.track.tracker import check_settings as check_trackers
from gristmill.train import directory
from gristmill.train.job import Job, check_disk, check_seq_len, learning_rates, micro_batch
from gristmill.train.length import Length, plan_length, seconds
from gristmill.train.memory import check_recompute
from gristmill.train.ranges import check_ranges
from gristmill.train.watching import check_watching
from gristmill.util.errors import UserError
from gristmill.util.named import load_named
from gristmill.util.paths import resolve_model_dir

BIAS_UPDATE_SPEED = 0.001
"""Of DeepSeek-V3 for most of its training (arXiv:2412.19437, section 4.2)."""


def settle(cfg: Pretrain, prepare_with: Executor | None = None) -> Job:
    """The job that these settings mean; `prepare_with` prepares raw text, unset: this machine.

    Raises UserError for settings that cannot work.
    """
    cfg = _weights_of_others(cfg)
    data = _refuse_what_is_not_there(cfg)
    cfg = _as_begun(cfg)
    check_settings(cfg)
    model = _model(cfg)
    _check_start(cfg, model)
    device = choose_device(cfg.device)
    precision = resolve_precision(cfg.precision, device)
    lr, min_lr = learning_rates(cfg)
    tokenizer_dir = _tokenizer_dir(cfg)
    _check_vocabulary(model, tokenizer_dir)
    datasets = open_datasets(data, tokenizer_dir, prepare_with)
    train_set, val_set = datasets.train_corpus(), datasets.val_corpus()
    tokenizer_dir = tokenizer_dir or train_set.tokenizer_dir
    model = _with_vocabulary(model, train_set, tokenizer_dir)
    exportable = is_exportable(model, refuse=not cfg.allow_unexportable)
    wanted = _identity(cfg, model, train_set, precision)
    out_dir, record = directory.find(cfg, wanted, _run_name(model, data, train_set))
    earlier = record.length if record else None
    seq_len = _seq_len(cfg, model, train_set, earlier)
    train = training_stream(cfg.train, train_set, seq_len=seq_len, seed=datasets.seed)
    val = None if val_set is None else val_set.held_out(seq_len)
    length = plan_length(
        cfg.train, cfg.eval, seq_len=seq_len, num_samples=_epoch(train_set, train), earlier=earlier
    )
    train_set.check_epochs(train, length.total_steps * length.global_batch_size)
    micro, recompute = micro_batch(cfg, model, precision, length, record)
    job = Job(
        cfg=cfg,
        model=model,
        device=device,
        precision=precision,
        tokenizer_dir=tokenizer_dir,
        train=train,
        source_names=train_set.names,
        val=val if val is not None and val.num_samples else None,
        val_bytes_per_token=val_set.bytes_per_token if val_set else None,
        val_sources=val_set.sources if val_set else (),
        length=length,
        micro_batch_size=micro,
        recompute=recompute,
        document_mask=document_mask(cfg.train, train_set),
        lr=lr,
        min_lr=min_lr,
        out_dir=out_dir,
        identity=wanted,
        going_on=record is not None,
        exportable=exportable,
        start_dir=_start_dir(cfg),
        tokenizer_files=_tokenizer_files(cfg, train_set, tokenizer_dir),
        most_samples=train_set.most_samples(train),
        bias_update_speed=_bias_update_speed(cfg, model),
    )
    check_disk(job)
    return job


def check_settings(cfg: Training) -> None:
    """Raise UserError for settings of any training that cannot work, whatever it trains."""
    if seconds(cfg.stall_timeout, "--stall_timeout") <= 0:
        raise UserError(
            f"--stall_timeout {cfg.stall_timeout} ends every run. Give a time, such as 10m.",
            {"--stall_timeout": "10m"},
        )
    if cfg.out_dir is not None and is_url(cfg.out_dir):
        raise UserError(
            f"--out_dir {cfg.out_dir} is an object store, and runs are written to a disk. Give a "
            "directory, and the store as --remote_dir: it gets a copy of every checkpoint, and "
            "another machine goes on from there.",
            {"--out_dir": Path("out") / Path(cfg.out_dir).name, "--remote_dir": cfg.out_dir},
        )
    check_trackers(cfg.logger_name, cfg.log)
    if cfg.train.keep_last < 2:
        raise UserError(
            f"--train.keep_last {cfg.train.keep_last} leaves nothing to fall back to. Use 2.",
            {"--train.keep_last": 2},
        )
    check_ranges(cfg)
    check_watching(cfg)
    check_recompute(cfg.recompute, cfg.compile)


def _refuse_what_is_not_there(cfg: Pretrain) -> DataModule:
    """The data module; UserError where it is missing, or settings contradict each other."""
    if cfg.data is None:
        raise UserError(
            "no data to train on. Name a data module, for example "
            "--data TextFiles --data.train_data_path FOLDER.",
        )
    if cfg.initial_checkpoint_dir and cfg.resume not in ("auto", False):
        raise UserError(
            f"both --initial_checkpoint_dir {cfg.initial_checkpoint_dir} and --resume {cfg.resume} "
            "are given. Use --resume to go on with a run, --initial_checkpoint_dir for a new one.",
            {"--resume": None},
        )
    if cfg.train.packing == "best_fit" and cfg.train.document_mask is False:
        raise UserError(
            "--train.packing best_fit puts unrelated documents into a row, and "
            "--train.document_mask false lets them look at each other. Leave out one of the two.",
            {"--train.document_mask": None},
        )
    return cfg.data


def _weights_of_others(cfg: Pretrain) -> Pretrain:
    """The settings, with `--resume` of another tool's checkpoint as weights that a run starts from.

    Its optimizer and its place in the data mean nothing here; said to the user.
    """
    if not isinstance(cfg.resume, str) or cfg.resume == "auto":
        return cfg
    place = resolve_model_dir(cfg.resume)
    if place.is_dir() and not Path(cfg.resume).exists():
        cfg = dataclasses.replace(cfg, resume=str(place))
    if any((place / name).exists() for name in ("checkpoint.json", directory.RUN_FILE)):
        return cfg
    try:
        source = open_model_dir(place)
    except UserError:
        return cfg  # said where checkpoints are looked for
    if source.kind != "litgpt":
        return cfg
    print(
        f"{source.path} is a checkpoint of another tool: this run begins at step 0 with its "
        "weights, and with an optimizer and an order of the data of its own.",
        file=sys.stderr,
    )
    return dataclasses.replace(cfg, resume="auto", initial_checkpoint_dir=str(source.path))


def _as_begun(cfg: Pretrain) -> Pretrain:
    """The settings, with the weights that the run in `out_dir` began with where none are named.

    Leaving them out is no other run: other tools' commands that resume leave them out.
    """
    if cfg.out_dir is None or cfg.initial_checkpoint_dir or cfg.overwrite or cfg.resume is False:
        return cfg
    record = directory.read(Path(cfg.out_dir))
    start = record.identity.get("initial_checkpoint_dir") if record else None
    if start is None or isinstance(cfg.resume, str) and cfg.resume != "auto":
        return cfg
    print(f"{cfg.out_dir} began with the weights of {start}: going on with that run")
    return dataclasses.replace(cfg, initial_checkpoint_dir=start)


def _check_start(cfg: Pretrain, model: ModelConfig) -> None:
    """Refuse weights to start from that are missing or another model's, before data is prepared."""
    if cfg.initial_checkpoint_dir is None:
        return
    source = open_model_dir(cfg.initial_checkpoint_dir)
    source.tensors()
    theirs = counts.parameter_shapes(source.config)
    ours = counts.parameter_shapes(model)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"the weights in {source.path} are of another model than {model.name} ({name} is "
                f"{_shape(theirs.get(name))} there and {_shape(ours.get(name))} in the model). "
                "Leave the model's name out to train the one that the weights are of, or give "
                "weights of this one.",
            )


def _identity(
    cfg: Pretrain, model: ModelConfig, train_set: Corpus, precision: str
) -> dict[str, Any]:
    start = cfg.initial_checkpoint_dir
    return directory.identity(cfg, to_dict(model), train_set.dataset_id, precision, start=start)


def _start_dir(cfg: Pretrain) -> Path | None:
    start = cfg.initial_checkpoint_dir
    return None if start is None else Path(resolve_model_dir(start))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _model(cfg: Pretrain) -> ModelConfig:
    """The architecture: custom, named, or that of the weights to start from."""
    if cfg.model_config is not None:
        model = cfg.model_config
        if cfg.model_name is not None and model.name == ModelConfig().name:
            raise UserError(
                f"--model_config describes a whole model and does not change {cfg.model_name}: "
                "what it leaves out has its default (`gristmill pretrain --model_config.help`). "
                f"Leave out {cfg.model_name}, or --model_config."
            )
    elif cfg.model_name is not None and ":" in cfg.model_name:
        model = load_named("--model_name", cfg.model_name)
        if not isinstance(model, ModelConfig):
            raise UserError(f"--model_name {cfg.model_name} is not a ModelConfig. Name one.")
    elif cfg.model_name is not None:
        model = zoo.get(cfg.model_name)
    elif cfg.initial_checkpoint_dir is not None:
        model = read_config(resolve_model_dir(cfg.initial_checkpoint_dir))
    else:
        raise UserError("no model. Name one of `gristmill pretrain list`, or give --model_config.")
    if cfg.train.tie_embeddings is not None:
        model = dataclasses.replace(model, tie_embeddings=cfg.train.tie_embeddings)
    if cfg.model_config is not None and model.family == ModelConfig().family:
        model = zoo.with_family(model)
    check_config(model)
    return model


def _bias_update_speed(cfg: Pretrain, model: ModelConfig) -> float:
    """How far selection biases move at a step. UserError where they are asked for and not there."""
    typed = cfg.train.bias_update_speed
    if model.moe is None or not model.moe.selection_bias:
        if typed is not None:
            raise UserError(
                f"--train.bias_update_speed {typed:g}: {model.name} has no bias in the choice of "
                "its experts. Leave it out.",
                {"--train.bias_update_speed": None},
            )
        return 0.0
    return BIAS_UPDATE_SPEED if typed is None else typed


def _tokenizer_dir(cfg: Pretrain) -> Path | None:
    """The folder with the tokenizer's own files, wherever what was named keeps them."""
    if cfg.tokenizer_dir is not None:
        return Tokenizer.load(cfg.tokenizer_dir).path.parent
    if isinstance(cfg.data, LitData | Mixture | RedPajama):
        return None
    if cfg.initial_checkpoint_dir is not None:
        return load_tokenizer(cfg.initial_checkpoint_dir).path.parent
    if not isinstance(cfg.data, RawText):  # a module of the user's own, which may do without
        return None
    if cfg.model_name is not None and cfg.model_config is None and ":" not in cfg.model_name:
        return own_tokenizer(cfg.model_name)
    raise UserError(
        "no tokenizer for the raw text. Give --tokenizer_dir DIR; "
        "`gristmill tokenizer train FOLDER --out_dir DIR` makes one."
    )


def _check_vocabulary(model: ModelConfig, tokenizer_dir: Path | None) -> None:
    if tokenizer_dir is None:
        return
    tokens = Tokenizer.load(tokenizer_dir).num_token_ids
    if tokens > model.vocab_size:
        raise UserError(
            f"the tokenizer in {tokenizer_dir} has token ids up to {tokens - 1:,}, but "
            f"{model.name} has {model.vocab_size:,} rows. Choose the model's own tokenizer, a "
            f"model with at least {tokens:,} rows, or train a tokenizer of that size: "
            f"gristmill tokenizer train FOLDER --vocab_size {model.vocab_size} --out_dir DIR"
        )


def _with_vocabulary(
    model: ModelConfig, dataset: Corpus, tokenizer_dir: Path | None
) -> ModelConfig:
    """The model, knowing which of its rows stand for tokens, and its BOS and EOS."""
    if dataset.num_token_ids > model.vocab_size:
        raise UserError(
            f"the dataset holds token ids up to {dataset.num_token_ids - 1:,}, but "
            f"{model.name} has {model.vocab_size:,} rows. Choose a model with at least "
            f"{dataset.num_token_ids:,} rows, or prepare the text with the model's tokenizer."
        )
    if tokenizer_dir is None:
        return model
    tokenizer = Tokenizer.load(tokenizer_dir)
    _check_vocabulary(model, tokenizer_dir)
    return dataclasses.replace(
        model,
        num_token_ids=max(tokenizer.num_token_ids, dataset.num_token_ids),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def is_exportable(model: ModelConfig, *, refuse: bool) -> bool:
    """Whether a Hugging Face architecture describes the model; refused before training if not."""
    try:
        zoo.family(model.family).to_hf_config(model)
    except UserError as error:
        if refuse:
            raise UserError(
                f"{error} The run would end with a model that nothing else loads. Change the "
                "model, or accept that with --allow_unexportable true.",
                {"--allow_unexportable": "true"},
            ) from None
        return False
    return True


def _tokenizer_files(cfg: Pretrain, dataset: Corpus, tokenizer_dir: Path | None) -> dict[str, str]:
    """What makes the model's tokenizer say that prompts begin as the documents did, if need be.

    A model that was trained before keeps what its files say: few of its tokens were the dataset's.
    """
    if tokenizer_dir is None or cfg.initial_checkpoint_dir is not None:
        return {}
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.bos_id is not None:
        for first, adds_bos in ((tokenizer.bos_id, True), (None, False)):
            if dataset.begins_with(first):
                return with_bos_policy(tokenizer, adds_bos=adds_bos)
    return {}


def _run_name(model: ModelConfig, data: DataModule, corpus: Corpus) -> str:
    """The run directory's name, without its number: the model's, and a short word for the data."""
    source = getattr(data, "train_data_path", None) or getattr(data, "data_path", None)
    word = "+".join(corpus.names[:3])
    if source is not None and not is_url(source):
        word = Path(source).expanduser().resolve().stem
    return f"{model.name}-{word}".lower()


def _seq_len(cfg: Pretrain, model: ModelConfig, data: Corpus, earlier: Length | None) -> int:
    """Tokens per sample: typed and checked, or as long as model and data allow."""
    longest = data.longest_chunk - 1
    typed = cfg.train.max_seq_length
    if typed == "auto":
        return earlier.seq_len if earlier else max(1, min(model.max_seq_length, longest))
    check_seq_len(typed, model)
    if typed > longest:
        raise UserError(
            f"max_seq_length={typed} is longer than the text allows: its longest stretch has "
            f"{longest + 1:,} tokens ({data.num_tokens:,} in all), and a sample takes one more "
            "than its length. Use a shorter sequence or more text.",
            {"--train.max_seq_length": max(1, longest)},
        )
    return typed


def _epoch(corpus: Corpus, stream: TokenStream) -> int:
    """Samples of a run that says nothing of its length: as many as there are, or may be read."""
    most = corpus.most_samples(stream)
    return stream.num_samples if most is None else max(1, min(most, stream.num_samples))
