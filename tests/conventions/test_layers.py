"""A module imports only from rows below its own, or from its own folder."""

from __future__ import annotations

ROWS = [
    {"util"},
    {"config"},
    {"tokenizer"},
    {"models", "data"},
    {"parallel", "checkpoint", "optim", "formats", "track"},
    {"train", "infer", "plan"},
    {"finetune", "measure"},
    {"launch"},
    {"quickstart", "api", "cli", "__main__"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}
TOP = len(ROWS) - 1


def _allowed(importer: str, imported: str) -> bool:
    if importer == imported or ROW[imported] < ROW[importer]:
        return True
    # The modules at the top lie in one folder, the package's own.
    return ROW[importer] == ROW[imported] == TOP


def test_every_folder_has_a_row(package):
    parts = {source.module.split(".")[1] for source in package if "." in source.module}
    assert parts <= set(ROW), f"no row for {sorted(parts - set(ROW))}: put them into ROWS"


def test_imports_point_down(package):
    wrong = []
    for source in package:
        # The package's own face hands out names of `api`, lazily, and so stands at the top.
        importer = source.module.split(".")[1] if "." in source.module else "api"
        for line, name in source.imports():
            parts = name.split(".")
            if parts[0] != "gristmill" or len(parts) < 2 or parts[1] not in ROW:
                continue  # the package's own names, such as __version__, belong to everybody
            if not _allowed(importer, parts[1]):
                wrong.append(f"{source.name}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_rows_are_told_apart():
    assert _allowed("train", "data")
    assert _allowed("cli", "api")
    assert not _allowed("train", "infer")
    assert not _allowed("data", "models")
    assert not _allowed("util", "config")
    assert not _allowed("launch", "cli")
