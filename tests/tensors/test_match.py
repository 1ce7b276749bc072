"""Pairing tensors: every misfit in one error."""

from __future__ import annotations

import pytest

from weightlab.errors import NamesMismatchError
from weightlab.tensors.match import extends_rows, misfit, pair
from weightlab.tensors.spec import TensorSpec


def specs(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()}


BASE = specs(a10=("F32", (2, 3)), a2=("F32", (2, 3)), gone=("F32", (1,)), ints=("I64", (2,)), rows=("BF16", (4, 3)))
TUNED = specs(a10=("BF16", (2, 3)), a2=("F32", (3, 2)), new=("F32", (1,)), ints=("I32", (2,)), rows=("BF16", (5, 3)))


def test_all_misfits_at_once_in_natural_order() -> None:
    with pytest.raises(NamesMismatchError) as failed:
        pair(BASE, TUNED, base_label="BASE", tuned_label="TUNED")
    offenders = failed.value.offenders
    assert [o.split()[0].rstrip(":") for o in offenders] == ["a2", "gone", "ints", "new", "rows"]
    assert "only in BASE" in offenders[1] and "only in TUNED" in offenders[3] and "rows appended" in offenders[4]
    assert "5 of 6 tensors differ" in failed.value.message and failed.value.exit_code == 4


def test_what_is_allowed_by_name() -> None:
    base = {n: s for n, s in BASE.items() if n not in ("a2", "ints")}
    tuned = {n: s for n, s in TUNED.items() if n not in ("a2", "ints")}
    found = pair(base, tuned, base_label="", tuned_label="", allow=["added", "removed", "rows"])
    assert (found.both, found.added, found.removed) == (["a10", "rows"], ["new"], ["gone"])
    for allow in (["added", "removed"], ["added", "rows"], ["removed", "rows"]):
        with pytest.raises(NamesMismatchError) as failed:
            pair(base, tuned, base_label="", tuned_label="", allow=allow)
        (missing,) = {"added", "removed", "rows"} - set(allow)
        assert f"--allow {missing}" in failed.value.remedy and len(failed.value.offenders) == 1


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        (("F32", (2, 3)), ("F16", (2, 3)), True),
        (("F8_E4M3", (2,)), ("F64", (2,)), True),
        (("F32", (2, 3)), ("F32", (6,)), False),
        (("I64", (2,)), ("I64", (2,)), True),
        (("I64", (2,)), ("F32", (2,)), False),
        (("I64", (2,)), ("U64", (2,)), False),
        (("BOOL", ()), ("BOOL", (1,)), False),
        (("F8_E8M0", (2,)), ("F32", (2,)), False),
    ],
)
def test_dtypes_and_shapes(before: tuple[str, tuple[int, ...]], after: tuple[str, tuple[int, ...]], fits: bool) -> None:
    assert (misfit(TensorSpec("x", *before), TensorSpec("x", *after), rows=True) == "") == fits


@pytest.mark.parametrize(
    ("before", "after", "extends"),
    [
        ((4, 3), (5, 3), True),
        ((4, 3), (4, 3), False),
        ((5, 3), (4, 3), False),
        ((4,), (5,), True),
        ((5,), (4,), False),
        ((), (1,), False),
        ((4, 3), (5, 4), False),
        ((2, 3, 4), (9, 3, 4), True),
        ((0, 3), (1, 3), True),
    ],
)
def test_appended_rows(before: tuple[int, ...], after: tuple[int, ...], extends: bool) -> None:
    assert extends_rows(TensorSpec("x", "F32", before), TensorSpec("x", "F32", after)) == extends
