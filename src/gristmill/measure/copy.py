"""The Hugging Face directory that `--out_dir` receives, where other tools read the same model."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

from gristmill.config.commands import Export
from gristmill.formats.compare import compare_config, compare_weights
from gristmill.formats.export import export
from gristmill.formats.model_dir import open_model_dir
from gristmill.formats.source import ModelDir
from gristmill.infer.load import note
from gristmill.tokenizer.tokenizer import Tokenizer
from gristmill.util.errors import RunError, UserError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.pth", "*.gguf")
PARTIAL = ".model.partial"


def copy_model(
    source: ModelDir, out_dir: str, *, replace_other: bool, tokenizer_dir: str | None = None
) -> None:
    """Write the model to `out_dir` as a Hugging Face directory, unless it is there already.

    What else is there stays. Raises UserError for a directory with another model, unless it may be
    replaced, or with a run in it, or with files that the model itself is read from.
    """
    out = Path(out_dir).expanduser()
    _refuse_own_files(source, out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out_dir {out} is a file. Name a directory.")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if any(name == "run.yaml" or name.startswith("step-") for name in held):
        raise UserError(
            f"--out_dir {out} holds a run, which a model is not written into. Name another "
            "directory, or keep only the results: --save_filepath FILE.",
        )
    if "config.json" in held or any(any(out.glob(pattern)) for pattern in WEIGHTS):
        if _is_same(source, out, tokenizer_dir):
            note(f"{out} is this model already.")
            return
        if not replace_other:
            raise UserError(
                f"--out_dir {out} holds another model. Name another directory, or replace it with "
                "--force_conversion true.",
                {"--force_conversion": "true"},
            )
    try:
        _write(source, out, tokenizer_dir)
    except UserError as error:
        raise UserError(
            f"{error} Or leave --out_dir out, which is for a copy that other tools read."
        ) from None


def _refuse_own_files(source: ModelDir, out: Path) -> None:
    """Raise UserError where making room for the copy would delete what is to be copied.

    A Hugging Face directory may name itself: it is left alone.
    """
    itself = out.resolve()
    if not out.is_dir() or (source.kind == "huggingface" and itself == source.path.resolve()):
        return
    model: ModelDir | None = source
    while model is not None:
        weights = {entry.file for entry in model.open_tensors().entries.values()}
        files = {file for file in (model.path, *weights) if file.is_file()}
        # A link is as needed as what it leads to.
        homes = {file.parent.resolve() for file in files} | {f.resolve().parent for f in files}
        if itself in {model.path.resolve(), *homes}:
            raise UserError(
                f"--out_dir {out} holds files of {model.path}, which the copy is made of. Name "
                "another directory, or keep only the results: --save_filepath FILE."
            )
        model = model.base


def _is_same(source: ModelDir, out: Path, tokenizer_dir: str | None) -> bool:
    """Whether a Hugging Face directory holds the same model, bit for bit, and that tokenizer."""
    if out.resolve() == source.path.resolve():
        return source.kind == "huggingface"
    try:
        held = open_model_dir(out)
        compare_config(source.config, held.config)
        parameters = source.parameters()
        compare_weights(parameters, held.parameters(), parameters["embed.weight"].dtype)
        if tokenizer_dir is not None:
            asked = Tokenizer.load(tokenizer_dir)
            if Tokenizer.load(out).digest != asked.digest:
                return False
    except (UserError, RunError):
        return False
    return held.kind == "huggingface"


def _write(source: ModelDir, out: Path, tokenizer_dir: str | None) -> None:
    """The files, built in a folder of their own and then moved, `config.json` last."""
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        note(f"Writing the model to {out} as a Hugging Face directory …")
        said = io.StringIO()  # names the folder that goes
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            export(
                Export(
                    checkpoint_dir=str(source.path),
                    output_dir=str(partial),
                    tokenizer_dir=tokenizer_dir,
                )
            )
        (out / "config.json").unlink(missing_ok=True)
        for pattern in WEIGHTS:
            for old in out.glob(pattern):
                old.unlink()
        new = sorted(partial.iterdir(), key=lambda path: path.name == "config.json")
        for path in new:
            path.replace(out / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
