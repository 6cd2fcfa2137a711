"""One typed dataclass per command: its options, defaults and help. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from gristmill.config.data import DataModule
from gristmill.config.model import ModelConfig
from gristmill.config.sections import (
    AdamW,
    Auto,
    EvalArgs,
    LogArgs,
    Optimizer,
    Parallel,
    Precision,
    StepArgs,
    TrainArgs,
)


@dataclass(kw_only=True)
class RayWorkers:
    """Where and how `--launcher ray` trains."""

    address: str = "auto"
    """`auto`: the cluster this machine is part of; `local`: one of its own; or HOST:PORT."""
    num_cpus: float | Auto = "auto"
    """CPUs that one worker takes; auto: those of a machine, shared by its workers."""
    min_nodes: int | None = None
    """Go on with as few machines as this when others leave; unset: always with num_nodes."""


@dataclass(kw_only=True)
class SlurmJob:
    """The batch job that `--launcher slurm` writes and submits."""

    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account that is charged; unset: your default."""
    time: str | None = None
    """Time limit of a job, as 24:00:00; shortly before it the run saves and is queued again."""
    lead_s: int = 300
    """Seconds before the time limit at which the run is told to save."""
    cpus_per_task: int | Auto = "auto"
    """CPUs of each process; auto: as the cluster gives them."""
    extra: list[str] | str = field(default_factory=list)
    """More options of sbatch: a list of them, or one text such as "--mem=0 --qos=long"."""
    prepare: Literal["before", "job"] = "before"
    """Prepare raw text on this machine before the job is submitted, or in it, on all machines."""
    submit: bool = True
    """Submit the script; false: only write it."""


@dataclass(kw_only=True)
class Training:
    """What every command that trains has: where, how, how long and how it is looked at."""

    command: ClassVar[str]
    """The words of the command, as workers are started with them."""

    out_dir: str | None = None
    """Directory of the run; unset: out/<model>-<data>-<n>."""
    remote_dir: str | None = None
    """URL, or folder, that gets a copy of each checkpoint, and that a new out_dir goes on from."""
    overwrite: bool = False
    """Delete another run's state in out_dir first."""
    resume: bool | str = "auto"
    """auto: continue this run if begun; true: it must be; false: must not; or a checkpoint."""
    precision: Precision | Auto = "auto"
    """auto: bf16-mixed where the processor has bf16 arithmetic, else 32-true."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto: cuda, then mps, then cpu."""
    devices: int | Auto = "auto"
    """Number of devices."""
    num_nodes: int = 1
    """Number of machines."""
    launcher: Literal["auto", "local", "slurm", "ray"] = "auto"
    """auto: processes of this machine, or the world that torchrun, srun or mpirun started; slurm:
    a batch job; ray: a Ray cluster."""
    ray: RayWorkers = field(default_factory=RayWorkers)
    """Settings of the Ray launcher."""
    slurm: SlurmJob = field(default_factory=SlurmJob)
    """Settings of the SLURM launcher."""
    parallel: Parallel = field(default_factory=Parallel)
    max_restarts: int = 3
    """How often workers that died are started again from the newest checkpoint."""
    stall_timeout: str = "10m"
    """Several devices that make no progress for this long are ended, and the one to blame named."""
    compile: Literal["auto", "off"] = "auto"
    """auto: compile each block where a C++ compiler is found."""
    recompute: Literal["none", "selective", "full"] | float | Auto = "auto"
    """Activations made again in the backward pass, for memory: none, all but products (selective),
    all (full), all but a share that is kept (0 to 1); auto: the least that fits."""
    deterministic: bool = False
    """Only bitwise repeatable algorithms (CUDA; the CPU always is)."""
    train: StepArgs = field(default_factory=StepArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: Optimizer = field(default_factory=AdamW)
    """Optimizer and its learning rate."""
    hook: str | None = None
    """Your function, as module:name, called after every step with (run, stats)."""
    logger_name: str | list[str] = "none"
    """Trackers beside metrics.jsonl, which is always written: csv, tensorboard, wandb, mlflow or
    trackio, several as csv,wandb; none: no other."""
    profile: bool | str = False
    """Trace of some steps and where their time went: FROM:TO, or true for a few early ones."""
    seed: int = 42
    """Seed of initialisation and randomness in training."""


@dataclass(kw_only=True)
class PretrainSubject:
    """What is trained, and on what."""

    model_name: str | None = None
    """Architecture (`gristmill pretrain list`), or module:name of a ModelConfig of your own."""
    model_config: ModelConfig | None = None
    """A custom architecture instead of a named one."""
    data: DataModule | None = None
    """What to train on: TextFiles, Jsonl, Parquet, a known corpus, LitData, or module:Class."""
    tokenizer_dir: str | None = None
    """Directory of the tokenizer; found in a prepared dataset when unset."""
    initial_checkpoint_dir: str | None = None
    """Start from the weights of this model directory."""
    allow_unexportable: bool = False
    """Train a model that no Hugging Face architecture describes; it stays a checkpoint."""


@dataclass(kw_only=True)
class Pretrain(Training, PretrainSubject):
    """Train a model on text, from scratch or from a checkpoint; interrupted runs continue."""

    command: ClassVar[str] = "pretrain"

    train: TrainArgs = field(default_factory=TrainArgs)


@dataclass(kw_only=True)
class RayCluster:
    """Which Ray cluster runs the units, and how many at once."""

    address: str = "auto"
    """`auto`: the cluster this machine is part of; `local`: one of its own; or HOST:PORT."""
    num_cpus: float = 1.0
    """CPUs that one unit takes."""
    max_in_flight: int | Auto = "auto"
    """Units given to the cluster at a time; auto: two for each of its CPUs."""


@dataclass(kw_only=True)
class Prepare:
    """Turn raw text into a dataset; interrupted work continues, finished work is left alone."""

    layout: str | None = None
    """What the input looks like: a layout's name (`gristmill prepare list`), or `status`."""
    input_dir: str | None = None
    """Folder, file or URL of raw text. `source_path` is accepted too."""
    output_dir: str | None = None
    """Directory or URL of the dataset; with a split, of its train and val datasets.
    `destination_path` is accepted too."""
    tokenizer_dir: str | None = None
    """Directory (or file) of the tokenizer. `tokenizer_path` is accepted too."""
    pattern: str | None = None
    """Which files are taken, as a glob; unset: the layout's. `match` is accepted too."""
    split: str | None = None
    """Folder of the input that is taken, for corpora that come in splits (train, validation)."""
    text_field: str | None = None
    """Field that holds the text, nested ones as a.b; unset: the layout's."""
    separator: str | None = None
    """Text that parts a file into documents (textfiles); unset: a file is one document."""
    filter: dict[str, Any] | None = None
    """Which records are kept, by field: {"meta.lang": "en"}, {"set": {"not_in": ["x"]}};
    operators: in, not_in, min, max. Adds to the layout's own."""
    map: str | None = None
    """Function `module:name` of your own: list of texts to list of texts, None to leave out.
    Its code is not compared: after a change, prepare anew with --overwrite."""
    sample: bool = False
    """The input is the sample of the corpus that its makers publish (redpajama)."""
    fast_dev_run: bool = False
    """Prepare a small slice only, to try the command."""
    val_fraction: float = 0.0
    """Share of the text that goes to OUT/val, chosen by content; 0: no split."""
    val_pattern: str | None = None
    """Files that go to OUT/val, as a glob, instead of a share."""
    bos: Literal["auto", "none"] | int = "auto"
    """Id put before each document: auto (the layout's custom), none, or an id."""
    eos: Literal["auto", "none"] | int = "auto"
    """Id put after each document: auto (the layout's custom), none, or an id."""
    chunk_tokens: int | Auto = "auto"
    """Tokens per chunk file; auto: 2^24, less for small inputs. `chunk_size` is accepted too."""
    engine: Literal["auto", "tokenizers", "fastokens"] = "auto"
    """Tokenizing engine; auto: the fastest that passes the parity check."""
    on_error: Literal["fail", "skip", "quarantine"] = "skip"
    """Bad documents: end the job, or leave them out and list them in rejects.jsonl;
    quarantine leaves out damaged files too."""
    max_reject_fraction: float = 0.001
    """Share of bad documents (quarantine: of text in bad files too) above which the job fails."""
    executor: Literal["local", "ray", "array"] = "local"
    """Who runs the units: processes of this machine, a Ray cluster, or rank of world machines."""
    rank: int | Auto = "auto"
    """Number of this process in an array; auto: from SLURM or Kubernetes."""
    world: int | Auto = "auto"
    """Processes in the array; auto: from SLURM or Kubernetes."""
    ray: RayCluster = field(default_factory=RayCluster)
    """Settings of the Ray executor."""
    num_workers: int | Auto = "auto"
    """Processes of this machine; auto: one per core. The bytes are the same for any number."""
    seed: int = 42
    """Seed of the shuffle of documents inside a unit and of the validation split."""
    overwrite: bool = False
    """Replace another job's dataset in output_dir."""


@dataclass(kw_only=True)
class Download:
    """Fetch a model, a tokenizer or a corpus; interrupted work continues, what is there is kept."""

    repo_id: str | None = None
    """Repository on the Hugging Face hub, as ORG/NAME, or a model of `gristmill pretrain list`; the
    first word after the command."""
    repo_type: Literal["model", "dataset"] = "model"
    """Kind of repository."""
    revision: str | None = None
    """Branch, tag or commit; unset: the main branch."""
    tokenizer_only: bool = False
    """Only the tokenizer and the model's settings, no weights."""
    pattern: list[str] | str | None = None
    """Which files are taken, one glob or a list of them; `*` also crosses folders. Unset: of a
    dataset all, of a model its settings, tokenizer and weights."""
    out_dir: str | None = None
    """Directory for the files; unset: checkpoints/ORG/NAME, for datasets data/ORG/NAME."""
    checkpoint_dir: str | None = None
    """Folder in which models get a directory ORG/NAME; unset: checkpoints."""
    access_token: str | None = field(default=None, repr=False)
    """Token for repositories that ask for one; unset: HF_TOKEN or the hub's own login."""
    urls: str | None = None
    """A list of addresses, one a line (file or URL), fetched instead of a repository."""
    base_url: str | None = None
    """Beginning of the addresses that is left out of the files' names; unset: what all share."""
    num_workers: int = 8
    """Files fetched at once."""


WeightType = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class Export:
    """Write a model of any kind for other tools, and compare what was written with the source."""

    checkpoint_dir: str | None = None
    """Model to export: a run or checkpoint of ours, a directory of Hugging Face's or LitGPT's
    layout, or a GGUF file; the first word after the command."""
    output_dir: str | None = None
    """Directory to write, which must not exist or be empty; of gguf also a file name ending in
    .gguf. The second word after the command."""
    format: Literal["hf", "litgpt", "gguf"] = "hf"
    """Who reads it: transformers and its like (hf), LitGPT, or llama.cpp and its like (gguf)."""
    dtype: WeightType | Literal["q8_0"] | Auto = "auto"
    """Type of the weights; auto: as they are. q8_0 is 8 bits, for gguf only."""
    max_shard_size: str = "5GB"
    """Largest weight file of the format hf, such as 500MB or 2GiB."""
    tokenizer_dir: str | None = None
    """Tokenizer that goes along; unset: the model's own."""
    model_name: str | None = None
    """Architecture of weights without a configuration; unset: what lies beside them says it."""
    overwrite: bool = False
    """Replace what output_dir holds, once the new is complete."""


@dataclass(kw_only=True)
class ConvertToLitgpt:
    """Add LitGPT's files to a model directory, so that LitGPT reads it; `export` writes others."""

    checkpoint_dir: str | None = None
    """Model directory; the first word after the command."""
    model_name: str | None = None
    """The model's name in LitGPT; unset: its own."""
    dtype: WeightType | Auto = "auto"
    """Type of the weights; auto: as they are."""
    overwrite: bool = False
    """Replace LitGPT's files that are there."""


@dataclass(kw_only=True)
class Convert:
    """Another tool's name for `gristmill export`."""

    checkpoint_dir: str | None = None
    """Model to convert, of any kind; the first word after the command."""
    output_dir: str | None = None
    """Directory to write, which must not exist or be empty; the second word after the command."""
    dtype: WeightType | Auto = "auto"
    """Type of the weights; auto: as they are."""
    tokenizer_dir: str | None = None
    """Tokenizer that goes along; unset: the model's own."""
    model_name: str | None = None
    """Architecture of weights without a configuration. `config_name` is accepted too."""
    overwrite: bool = False
    """Replace what output_dir holds, once the new is complete."""


@dataclass(kw_only=True)
class Inspect:
    """Say what a model directory or file is, whether it is whole, and what can be done with it."""

    path: str | None = None
    """Model, checkpoint, run, tokenizer or dataset, a directory or a file; the first word after
    the command."""
    json: bool = False
    """Write one JSON object instead of a page, for scripts."""


@dataclass(kw_only=True)
class TokenizerTrain:
    """Train a byte-level BPE tokenizer on raw text; the same input gives the same tokenizer."""

    input_dir: str | None = None
    """Folder or file of raw text."""
    out_dir: str | None = None
    """Directory for tokenizer.json and tokenizer_config.json."""
    vocab_size: int = 32000
    """Number of tokens, special tokens and 256 bytes included."""
    layout: str = "textfiles"
    """What the input looks like: a layout's name (`gristmill prepare list`)."""
    pattern: str | None = None
    """Which files are taken, as a glob; unset: the layout's."""
    text_field: str | None = None
    """Field that holds the text, nested ones as a.b; unset: the layout's."""
    bos_token: str | None = None
    """Beginning-of-sequence token; unset: none."""
    eos_token: str = "<|endoftext|>"
    """End-of-text token."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens."""
    max_bytes: int = 1_000_000_000
    """Text used at most; a larger input is sampled evenly."""
    overwrite: bool = False
    """Replace an existing tokenizer."""


@dataclass(kw_only=True)
class Quickstart:
    """Real text that is on every machine to a small model, in minutes, one stage after another."""

    out_dir: str = "out/quickstart"
    """Directory for tokenizer, dataset, run and model."""
