"""The header: what breaks its rules is refused with everything that does; what identity depends on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patches.tools import Tree, changed, make, read, write
from weightlab.errors import IntegrityError, MalformedFileError, WeightlabError
from weightlab.patches.header import parse_header
from weightlab.patches.patch import open_patch

BIAS, EMBED = "layers.0.bias", "embed.weight"
DENSE = {"encode": "dense"}


def refusal(path: Path) -> WeightlabError:
    with pytest.raises(WeightlabError) as caught:
        open_patch(path)
    return caught.value


def record(header: Tree, name: str = BIAS) -> Tree:
    found: Tree = header["tensors"][name]
    return found


def test_a_good_one_passes(tmp_path: Path) -> None:
    patch = make(tmp_path / "p.safetensors")
    assert open_patch(changed(tmp_path / "p.safetensors", lambda c, h: None)).id == patch.id


@pytest.mark.parametrize("version", [2, 0, "1", 1.0, True, None])
def test_an_unknown_schema(tmp_path: Path, version: object) -> None:
    make(tmp_path / "p.safetensors")
    error = refusal(changed(tmp_path / "p.safetensors", lambda c, h: h.update(schema=version)))
    assert error.exit_code == 3 and error.remedy == "update weightlab"
    assert f"patch schema {version!r}; this version of weightlab reads 1" in error.message


def test_an_unknown_feature(tmp_path: Path) -> None:
    make(tmp_path / "p.safetensors")
    error = refusal(changed(tmp_path / "p.safetensors", lambda c, h: h.update(requires=["rows", "zip", "alpha"])))
    assert error.exit_code == 3 and error.offenders == ("alpha", "zip") and error.remedy == "update weightlab"


def test_unknown_encodings_are_all_listed(tmp_path: Path) -> None:
    make(tmp_path / "p.safetensors")

    def change(container: Tree, header: Tree) -> None:
        record(header)["encoding"] = "dence"
        record(header, EMBED)["encoding"] = "fractal"

    error = refusal(changed(tmp_path / "p.safetensors", change))
    assert error.exit_code == 3
    assert [line.split(" (")[0] for line in sorted(error.offenders)] == [
        f"{EMBED}: unknown encoding 'fractal'",
        f"{BIAS}: unknown encoding 'dence'",
    ]


def part_renamed(container: Tree, header: Tree) -> None:
    parts = record(header)["parts"]
    parts["difference"] = parts.pop("delta")


def part_missing(container: Tree, header: Tree) -> None:
    record(header)["parts"] = {}


def entry_renamed(container: Tree, header: Tree) -> None:
    container["x"] = container.pop(f"{BIAS}::delta")


def listed_twice(container: Tree, header: Tree) -> None:
    record(header)["parts"]["delta"] = record(header, "temperature")["parts"]["delta"]


def other_dtype(container: Tree, header: Tree) -> None:
    container[f"{BIAS}::delta"]["dtype"] = "I32"


def other_shape(container: Tree, header: Tree) -> None:
    container[f"{EMBED}::delta"]["shape"] = [16, 24]


def other_size(container: Tree, header: Tree) -> None:
    record(header)["shape"] = [17]


@pytest.mark.parametrize(
    ("change", "offenders"),
    [
        (part_renamed, [f"{BIAS}: part 'delta' is missing", f"{BIAS}: part 'difference' is unknown"]),
        (part_missing, [f"{BIAS}::delta: there and not listed", f"{BIAS}: part 'delta' is missing"]),
        (entry_renamed, [f"{BIAS}::delta: listed and not there", "x: there and not listed"]),
        (
            listed_twice,
            [
                "temperature::delta: listed twice",
                f"{BIAS}::delta: there and not listed",
                f"{BIAS}: part 'delta' is F32[], should be F64 or F32 or BF16 or F16[16]",
            ],
        ),
        (other_dtype, [f"{BIAS}: part 'delta' is I32[16], should be F64 or F32 or BF16 or F16[16]"]),
        (other_shape, [f"{EMBED}: part 'delta' is F32[16, 24], should be F64 or F32 or BF16 or F16[24, 16]"]),
        (other_size, [f"{BIAS}: part 'delta' is F32[16], should be F64 or F32 or BF16 or F16[17]"]),
    ],
)
def test_parts_that_are_not_the_headers(
    tmp_path: Path, change: Callable[[Tree, Tree], None], offenders: list[str]
) -> None:
    make(tmp_path / "p.safetensors", **DENSE)
    error = refusal(changed(tmp_path / "p.safetensors", change))
    assert isinstance(error, MalformedFileError) and error.exit_code == 3
    assert list(error.offenders) == offenders


@pytest.mark.parametrize(
    ("update", "problem"),
    [
        ({"dtype": "F31"}, "unknown dtype 'F31'"),
        ({"base_dtype": "Q8"}, "unknown dtype 'Q8'"),
        ({"added": True}, "is added and has a base"),
        ({"base_dtype": "I32"}, "cannot become F32 from I32"),
        ({"base_shape": [17]}, "cannot become [16] from [17]"),
        ({"encoding": "removed"}, "is removed and has a result"),
        ({"added": True, "base_digest": None}, "dense holds differences, and it is added"),
        ({"dtype": "I32"}, "dense holds differences, and I32 has none"),
    ],
)
def test_records_that_make_no_sense(tmp_path: Path, update: Tree, problem: str) -> None:
    make(tmp_path / "p.safetensors", **DENSE)

    def change(container: Tree, header: Tree) -> None:
        header["requires"] = ["added", "dtype", "removed", "rows"]
        record(header).update(update)

    error = refusal(changed(tmp_path / "p.safetensors", change))
    assert error.exit_code == 3 and f"{BIAS}: {problem}" in error.offenders


@pytest.mark.parametrize("digest", ["base_digest", "result_digest"])
def test_exact_without_its_digests(tmp_path: Path, digest: str) -> None:
    make(tmp_path / "p.safetensors")
    error = refusal(changed(tmp_path / "p.safetensors", lambda c, h: record(h).pop(digest)))
    assert error.exit_code == 3 and error.offenders == (f"{BIAS}: exact, and its digests are missing",)


def test_what_it_does_must_be_listed_in_requires(tmp_path: Path) -> None:
    make(tmp_path / "p.safetensors", **DENSE)

    def change(container: Tree, header: Tree) -> None:
        record(header, EMBED)["base_shape"] = [20, 16]
        record(header)["base_dtype"] = "BF16"

    error = refusal(changed(tmp_path / "p.safetensors", change))
    assert error.offenders == (
        "uses 'dtype' and does not list it in requires",
        "uses 'rows' and does not list it in requires",
    )


@pytest.mark.parametrize(
    ("place", "value", "where"),
    [
        (("colour",), "blue", "colour"),
        (("tensors", BIAS, "colour"), "blue", f"tensors.{BIAS}.colour"),
        (("tensors", BIAS, "parts", "delta", "offset"), 3, f"tensors.{BIAS}.parts.delta.offset"),
        (("kind",), "improvement", "kind"),
        (("scale",), 1e39, "scale"),
        (("scale",), "1", "scale"),
        (("tensors", BIAS, "shape"), [16.0], f"tensors.{BIAS}.shape.0"),
        (("tensors", BIAS, "shape"), [-16], f"tensors.{BIAS}.shape.0"),
        (("tensors", BIAS, "base_digest"), "ab12", f"tensors.{BIAS}.base_digest"),
        (("tensors", BIAS, "base_digest"), "A" * 64, f"tensors.{BIAS}.base_digest"),
        (("tensors",), [], "tensors"),
        (("base",), None, "base"),
        (("schema_version",), 1, "schema_version"),
    ],
)
def test_keys_and_values_are_checked(tmp_path: Path, place: tuple[str, ...], value: object, where: str) -> None:
    make(tmp_path / "p.safetensors", **DENSE)

    def change(container: Tree, header: Tree) -> None:
        for key in place[:-1]:
            header = header[key]
        header[place[-1]] = value

    error = refusal(changed(tmp_path / "p.safetensors", change))
    assert error.exit_code == 3 and any(line.startswith(f"{where}: ") for line in error.offenders)


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    make(tmp_path / "p.safetensors", **DENSE)

    def change(container: Tree, header: Tree) -> None:
        header["kind"] = 5
        record(header)["error"] = {"max_abs": "small"}
        record(header, EMBED)["parts"] = 7

    assert len(refusal(changed(tmp_path / "p.safetensors", change)).offenders) == 4


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"schema": 1', '"schema": 1, "schema": 1', "the key 'schema' appears twice"),
        ('"max_abs": 0.0', '"max_abs": NaN', "NaN is not a number of JSON"),
        ('"max_abs": 0.0', '"max_abs": -Infinity', "-Infinity is not a number of JSON"),
        ('"schema": 1', '"schema": 1,', "not proper JSON"),
        ('"schema": 1', '"schema": ' + "[" * 100_000, "not proper JSON"),
        ('"schema": 1', '"schema": ' + "9" * 5000, "not proper JSON"),
    ],
)
def test_text_that_is_no_json_of_ours(tmp_path: Path, old: str, new: str, what: str) -> None:
    path = tmp_path / "p.safetensors"
    make(path, **DENSE)
    container, header, data = read(path)
    text = json.dumps(header)
    assert old in text
    write(path, container, text.replace(old, new, 1), data)
    error = refusal(path)
    assert error.exit_code == 3 and what in error.message


@pytest.mark.parametrize(
    ("text", "what"),
    [("[]", "patch schema None"), ("null", "patch schema None"), ("", "not proper JSON"), ("3", "patch schema None")],
)
def test_a_header_that_is_no_object(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "p.safetensors"
    make(path)
    container, _, data = read(path)
    write(path, container, text, data)
    assert what in refusal(path).message


@pytest.mark.parametrize("value", ["1e400", "-1e400", '"\\ud800"', "[" * 400 + "]" * 400])
def test_values_that_have_no_canonical_form(tmp_path: Path, value: str) -> None:
    """Infinite numbers in free parameters, half characters and nesting are refused before."""
    path = tmp_path / "p.safetensors"
    make(path, **DENSE)
    container, header, data = read(path)
    record(header)["parameters"] = {"free": "VALUE"}
    write(path, container, json.dumps(header).replace('"VALUE"', value), data)
    error = refusal(path)
    whats = {"[": "nested more than 64 deep", '"': "surrogates not allowed"}
    what = whats.get(value[0], "no canonical form")
    assert error.exit_code == 3 and what in error.message


def test_a_number_beyond_fp64_where_one_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    make(path, **DENSE)
    container, header, data = read(path)
    write(path, container, json.dumps(header).replace('"max_abs": 0.0', '"max_abs": 1e400', 1), data)
    assert "max_abs" in refusal(path).offenders[0]


@pytest.mark.parametrize(
    ("encode", "parameters"),
    [
        ("low_rank:2", {"rank": 0}),
        ("low_rank:2", {"rank": 2.0}),
        ("low_rank:2", {}),
        ("quantized:4", {"bits": 4}),
        ("quantized:4", {"bits": 5, "levels": "linear", "scope": "everything"}),
        ("quantized:4", {"bits": "4", "levels": "linear", "scope": "tensor"}),
    ],
)
def test_parameters_that_make_no_sense(tmp_path: Path, encode: str, parameters: Tree) -> None:
    make(tmp_path / "p.safetensors", encode)
    error = refusal(changed(tmp_path / "p.safetensors", lambda c, h: record(h, EMBED).update(parameters=parameters)))
    assert error.exit_code == 3 and error.offenders[0].startswith(f"{EMBED}: parameters {json.dumps(parameters)}")


def test_other_files_are_no_patch(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="is no patch"):
        parse_header({"format": "pt"}, "model.safetensors")
    length = struct.pack("<Q", 16)
    (tmp_path / "m.safetensors").write_bytes(length + b"{}".ljust(16))
    with pytest.raises(MalformedFileError, match="is no patch"):
        open_patch(tmp_path / "m.safetensors")


def test_a_shard_alone_or_with_others_of_another_patch(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    make(path)
    changed(path, lambda c, h: h.update(shard={"index": 0, "count": 2, "id": "a" * 64}))
    error = refusal(path)
    assert isinstance(error, IntegrityError) and "is one of 2 shards" in error.message
