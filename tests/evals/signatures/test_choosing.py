"""The rules by which K and α are chosen, on numbers worked out by hand."""

from __future__ import annotations

from weightlab_evals.signatures.choosing import best_alpha, choose, choose_form
from weightlab_evals.signatures.patches import Form


def grid(*rows: tuple[float, float, float], **form: object) -> list[dict[str, object]]:
    """(alpha, clean, corrupted) each."""
    return [{"alpha": a, "clean": c, "corrupted": r, **form} for a, c, r in rows]


def test_the_smallest_alpha_that_is_good_enough() -> None:
    one = grid((0.5, 0.97, 0.90), (0.75, 0.97, 0.945), (1.0, 0.965, 0.95))
    assert best_alpha([one], [0.97]) == (0.75, 0.945)
    assert best_alpha([one, grid((0.5, 0.97, 0.5), (0.75, 0.97, 0.5), (1.0, 0.97, 0.9))], [0.97, 0.97])[0] == 1.0


def test_an_alpha_that_costs_too_much_is_not_taken() -> None:
    costly = grid((0.25, 0.955, 0.60), (0.5, 0.961, 0.70), (1.0, 0.90, 0.99))
    assert best_alpha([costly], [0.97]) == (0.5, 0.70)
    assert best_alpha([costly], [0.99]) == (0.25, 0.60)  # none is cheap enough: the smallest


def test_a_smaller_depth_is_taken_unless_a_larger_one_is_better_by_a_point() -> None:
    def of(*corrupted: float) -> list[dict[str, object]]:
        return [
            row
            for depth, value in zip((2, 4, 6), corrupted, strict=True)
            for row in grid((1.0, 0.9, value), depth=depth, norm="keep")
        ]

    form, alphas, means = choose_form({"fog": [of(0.5, 0.795, 0.8)]}, [0.9])
    assert form == Form(4) and alphas == {"fog": 1.0} and means[Form(6)] == 0.8
    form, _, _ = choose_form({"fog": [of(0.5, 0.795, 0.8)], "snow": [of(0.5, 0.5, 0.6)]}, [0.9])
    assert form == Form(6)


def test_of_equal_depths_the_better_norm_mode() -> None:
    rows = grid((1.0, 0.9, 0.8), depth=2, norm="keep") + grid((1.0, 0.9, 0.805), depth=2, norm="robust")
    form, _, _ = choose_form({"fog": [rows]}, [0.9])
    assert form == Form(2, "robust")


def test_rivals_have_an_alpha_of_their_own() -> None:
    every = {"unprojected": {"fog": [grid((0.5, 0.9, 0.9), (1.0, 0.5, 0.95))]}}
    choice = choose(Form(2), {"fog": 1.0}, every, [0.9])
    assert choice.alphas == {"signature": {"fog": 1.0}, "unprojected": {"fog": 0.5}}
