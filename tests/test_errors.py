"""What an error shows can be shown: names in files may hold control characters and halves of characters."""

from __future__ import annotations

from weightlab.errors import MalformedFileError


def test_nothing_moves_the_cursor() -> None:
    error = MalformedFileError("a\x1b[2Jb\0", "do\r this", ["one\x07", "é \ud800", "日本"])
    assert error.message == "a\\x1b[2Jb\\x00" and error.remedy == "do\\r this"
    assert error.offenders == ("one\\x07", "é \\ud800", "日本")
    assert str(error).encode().decode().count("\n") == 4


def test_lines_stay() -> None:
    assert MalformedFileError("one\n\ttwo").message == "one\n\ttwo"
