"""Files of others: what is read, and what is said of each way to be wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from weightlab.errors import InputError, MalformedFileError, MissingInputError
from weightlab.files.foreign import (
    is_file,
    is_plain_name,
    parse_json,
    plain_name,
    plain_names,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
    validated,
)


class Small(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    counts: list[int] = []


def saved(folder: Path, content: bytes | str) -> Path:
    path = folder / "x.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, schema: Any = None, **options: Any) -> MalformedFileError:
    with pytest.raises(MalformedFileError) as failed:
        read_json(path, schema, **options)
    assert failed.value.exit_code == 3 and str(path) in failed.value.message and failed.value.remedy
    return failed.value


def test_what_is_right_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"name": "é", "counts": [1, 2]}')
    assert read_json(path, Small) == Small(name="é", counts=[1, 2])
    assert read_json(path) == {"name": "é", "counts": [1, 2]}
    assert read_json(path, dict[str, Any])["counts"] == [1, 2]
    assert parse_json(b"3", "here", int) == 3
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]', "here") == ["\U0001f600", "\\ud800"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{} {}", "Extra data"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice"),
        (b'{"b": {"a": 1, "c": 0, "a": 2}}', "the key 'a' appears twice"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b"9" * 5000, "4300"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'{"\\uDC00\\uD83D": 1}', "surrogates not allowed"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'{"a":' * 100_000, "maximum recursion depth"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, what: str) -> None:
    assert what in refused(saved(tmp_path, content)).message


def test_as_deep_as_is_allowed(tmp_path: Path) -> None:
    assert read_json(saved(tmp_path, "[" * 64 + "]" * 64))
    assert read_json(saved(tmp_path, '{"a":' * 63 + "[1]" + "}" * 63))


def test_not_a_number_where_the_caller_takes_it(tmp_path: Path) -> None:
    assert read_json(saved(tmp_path, "[Infinity]"), constants=True) == [float("inf")]


def test_every_wrong_place_is_named(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, '{"name": 3, "counts": [1, "2", true], "more": null}'), Small)
    assert [line.partition(":")[0] for line in error.offenders] == ["name", "counts.1", "counts.2", "more"]
    assert error.offenders[0].endswith("Input should be a valid string, not 3")
    assert "the whole: Input should be" in refused(saved(tmp_path, "[]"), dict[str, int]).offenders[0]


def test_a_long_value_is_not_repeated_whole(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, '{"name": [' + "1," * 10_000 + "1]}"), Small)
    assert len(error.offenders[0]) < 200


@pytest.mark.parametrize("number", [2**63, 2**70, -(2**70)])
def test_numbers_beyond_any_machine_are_numbers_of_python(tmp_path: Path, number: int) -> None:
    """Their bounds are those of the schema."""
    assert read_json(saved(tmp_path, str(number)), int) == number


def test_another_class_of_error(tmp_path: Path) -> None:
    class Other(InputError):
        pass

    for content in ("{", "[]", "x" * 100):
        with pytest.raises(Other):
            read_json(saved(tmp_path, content), dict[str, int], error=Other, limit=50)


def test_size(tmp_path: Path) -> None:
    path = saved(tmp_path, "[1, 2]")
    assert read_json(path, limit=6) == [1, 2]
    assert "6 bytes, where at most 5 make sense" in refused(path, limit=5).message


def test_a_file_that_grows_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "[1]")
    real = os.read

    def growing(fd: int, size: int) -> bytes:
        with path.open("ab") as more:
            more.write(b" " * 4)
        return real(fd, size)

    monkeypatch.setattr(os, "read", growing)
    assert "more than 5 bytes" in refused(path, limit=5).message


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    """A FIFO is not waited for, a device not read."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "fifo", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(MissingInputError, match="no plain file"):
            read_bytes(path)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\0b", "x/" * 3000])
def test_what_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingInputError) as failed:
        read_json(tmp_path / name)
    assert failed.value.message.isprintable()
    assert not is_file(tmp_path / name)


def test_links(tmp_path: Path) -> None:
    path, link, loop = saved(tmp_path, "[1]"), tmp_path / "link", tmp_path / "loop"
    link.symlink_to(path)
    loop.symlink_to(loop)
    assert read_json(link) == [1] and is_file(link)
    with pytest.raises(MissingInputError, match="a symbolic link, which is not followed"):
        read_json(link, follow=False)
    with pytest.raises(MissingInputError):
        read_json(loop)


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: a\ncounts: [1, 2]\n")
    assert read_yaml(path, Small) == Small(name="a", counts=[1, 2])


@pytest.mark.parametrize(
    "content",
    [
        *("{", "a: 'open", "\ta: 1", "a: %x", "a: @x", "a: b: c", "--- 1\n--- 2"),
        *("&a a: *a", "name: &n x\ncounts: [*n]", "&r r: &s [*r, *s]", "name: &n [*n]"),
        *("t: 2001-13-45", "t: 2001-01-01T99:99:99Z", "t: !!timestamp x", "t: !!int ''", "t: !!float .", "t: !!int x"),
        *("t: !!python/object/apply:os.getcwd []", "t: !!python/name:os.getcwd", "t: !x 1"),
        *("? [a, b]\n: 1", "? {a: 1}\n: 1", "<<: 3", "a: " + "9" * 5000, "a: \0"),
        *("[" * 20_000, "a: " + "[" * 100 + "]" * 100, "a: " + "{a: " * 20_000),
    ],
)
def test_what_is_no_yaml(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(MalformedFileError, match=r"x\.yaml: not proper YAML") as failed:
        read_yaml(path, dict[str, Any])
    assert failed.value.exit_code == 3


def test_yaml_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(MalformedFileError, match="decode"):
        read_yaml(tmp_path / "x.yaml", Small)


def test_dates_of_yaml_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: 2001-01-01\n")
    with pytest.raises(MalformedFileError) as failed:
        read_yaml(tmp_path / "x.yaml", Small)
    assert failed.value.offenders[0].startswith("name: Input should be a valid string")


def test_json_lines(tmp_path: Path) -> None:
    path = saved(tmp_path, '{"a": "1"}\n\n {"a": "\u2028"}\n')
    assert read_json_lines(path, dict[str, str]) == [{"a": "1"}, {"a": "\u2028"}]
    with pytest.raises(MalformedFileError, match=r"x\.json, line 3: not proper JSON"):
        read_json_lines(saved(tmp_path, '{"a": "1"}\n\n{'), dict[str, str])


def test_text(tmp_path: Path) -> None:
    assert read_text(saved(tmp_path, "é\r\n")) == "é\r\n"
    with pytest.raises(MalformedFileError, match="no UTF-8"):
        read_text(saved(tmp_path, b"\xff"))


@pytest.mark.parametrize(
    "name", ["a", "a b", ".hidden", "x" * 255, "é" * 127, "model-00001-of-00002.safetensors", "-rf"]
)
def test_plain_names(name: str) -> None:
    assert plain_name(name, "here") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "/a",
        "a/b",
        "../a",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "x" * 256,
        "é" * 128,
        "\ud800",
        3,
        None,
        ["a"],
    ],
)
def test_names_that_are_not_plain(name: object) -> None:
    assert not is_plain_name(name)
    with pytest.raises(MalformedFileError) as failed:
        plain_names(["a", name], "the index")
    assert failed.value.message.startswith("the index: ") and failed.value.offenders == (repr(name)[:80],)


def test_a_tree_in_memory() -> None:
    assert validated(["a"], list[str], "here") == ["a"]
    with pytest.raises(MalformedFileError, match="here"):
        validated(["a", 1], list[str], "here")
