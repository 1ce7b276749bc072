"""A few thousand mutated inputs: whatever is wrong with a file is said by an error of weightlab's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.kinds import kinds, of_seed
from tests.fuzz.trial import Fuzzer, quiet

CHUNKS, INPUTS = 20, 100

pytest.importorskip("transformers", reason="transformers is in the extra lm")
pytest.importorskip("gguf", reason="gguf is an extra")
pytest.importorskip("peft", reason="peft is an extra")


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    quiet()
    made = Fuzzer()
    yield made
    made.close()


@pytest.mark.parametrize("name", kinds())
def test_the_valid_input_is_read(fuzzer: Fuzzer, name: str) -> None:
    """A reader that refuses the valid one already would find nothing."""
    results = fuzzer.accepts_valid(kinds()[name])
    assert "accepted" in results.values()
    assert [reader for reader, result in results.items() if not result] == []


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_nothing_but_our_own_errors(fuzzer: Fuzzer, chunk: int) -> None:
    outcomes = [fuzzer.trial(of_seed(seed), seed) for seed in range(chunk * INPUTS, (chunk + 1) * INPUTS)]
    assert [f"--kind {o.kind!r} --seed {o.seed}: {o.reader}: {o.finding}" for o in outcomes if o.finding] == []
    assert {o.result for o in outcomes} >= {"accepted", "MalformedFileError"}
