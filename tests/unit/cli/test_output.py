import io

import pytest

from gristmill.cli import main


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\u2026"), ("cp1252", b"\x85")])
def test_an_output_without_a_character_gets_its_number(monkeypatch, encoding, shown):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit, match="^0$"):
        main(["generate", "--help"])
    stream.flush()
    assert shown in written.getvalue()
