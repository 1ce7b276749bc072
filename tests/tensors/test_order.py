"""Names in the order that people count in."""

from __future__ import annotations

from weightlab.tensors.order import layer_of, natural_key


def test_numbers_are_numbers() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "layers.b", "a", "10", "9", "layers.1", "\u0663"]
    ordered = ["9", "10", "a", "layers.1", "layers.2.a", "layers.2.b", "layers.10.a", "layers.b", "\u0663"]
    assert sorted(names, key=natural_key) == ordered  # digits of other scripts are letters here
    assert sorted(["b10", "b9", "b010", "b1"], key=natural_key) == ["b1", "b9", "b10", "b010"]
    assert natural_key("layers.02") == natural_key("layers.2")


def test_numbers_without_end() -> None:
    """Python makes no int of more than 4,300 digits."""
    long, longer = "9" * 5000, "1" + "0" * 5000
    assert sorted([longer, "x", long, "10"], key=natural_key) == ["10", long, longer, "x"]
    assert layer_of(f"a.{long}.b") == f"a.{long}"
