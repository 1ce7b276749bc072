"""Every command explains itself: a summary, the options that all have, and examples that are right."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import subprocess
import sys

import click
import pytest
from weightlab_cli.commands.eval import EVALUATIONS
from weightlab_cli.main import COMMANDS, commands, run
from weightlab_cli.options import ENCODINGS

from tests.test_import import HEAVY, loaded
from weightlab.errors import WeightlabError
from weightlab.extract.rules import parse_choice

NAMES = COMMANDS.names()
GROUPS = [name for name in NAMES if isinstance(COMMANDS.get(name), click.Group)]
LEAVES: dict[str, click.Command] = {name: COMMANDS.get(name) for name in NAMES if name not in ("demo", *GROUPS)}
LEAVES |= {f"eval {name}": EVALUATIONS.get(name) for name in EVALUATIONS.names()}
LEAVES |= {f"{g} {name}": leaf for g in GROUPS for name, leaf in getattr(COMMANDS.get(g), "commands", {}).items()}
EVERYWHERE = ("--json", "--quiet", "--debug", "--dry-run", "--threads", "--memory", "--device", "--help")


def examples(command: click.Command) -> list[str]:
    """The example lines of a help text, with only blank lines and examples after the word."""
    help_text = inspect.cleandoc(command.help or "")
    _, _, after = help_text.partition("\nExample:\n")
    return [line.strip() for line in after.split("\n\n")[0].splitlines()]


def problems(line: str) -> str | None:
    """What is wrong with an example, if anything."""
    if line.startswith("pip "):
        return None
    program, *words = shlex.split(line)
    if program != "weightlab" or not words or words[0] not in NAMES:
        return f"not a command of ours: {line}"
    try:
        context = COMMANDS.get(words[0]).make_context(words[0], words[1:])
        if isinstance(context.command, click.Group):
            _, leaf, rest = context.command.resolve_command(context, words[1:])
            assert leaf is not None
            leaf.make_context(words[1], rest)
    except (click.ClickException, WeightlabError) as error:
        return f"{line}: {error}"
    return None


@pytest.mark.parametrize("name", [*NAMES, *LEAVES])
def test_examples_are_right(name: str) -> None:
    lines = examples(LEAVES.get(name) or COMMANDS.get(name))
    assert any(line.startswith(f"weightlab {name} ") or line == f"weightlab {name}" for line in lines)
    assert [p for line in lines if (p := problems(line))] == []


def test_examples_of_the_whole_are_right() -> None:
    assert len(examples(commands)) >= 3
    assert [p for line in examples(commands) if (p := problems(line))] == []


def test_the_test_of_examples_can_fail() -> None:
    assert "No such option" in str(problems("weightlab apply model/ p.safetensors --inplace"))
    assert "not a command" in str(problems("weightlab aply model/ p.safetensors --in-place"))
    assert "Missing parameter" in str(problems("weightlab diff base/"))
    assert "--map takes OLD=NEW" in str(problems("weightlab diff base/ tuned/ --map x"))
    assert examples(click.Command("x", help="Does it.")) == []


@pytest.mark.parametrize("name", [*NAMES, *LEAVES])
def test_every_command_has_a_help_that_works(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*name.split(), "--help"]) == 0
    printed = capsys.readouterr()
    assert "Example:" in printed.out and printed.err == ""


@pytest.mark.parametrize("name", LEAVES)
def test_options_that_every_command_has(name: str) -> None:
    command = LEAVES[name]
    known = {o for p in command.get_params(click.Context(command)) for o in p.opts}
    assert known >= set(EVERYWHERE)


@pytest.mark.parametrize("name", [*LEAVES, "demo"])
def test_every_option_says_what_it_does(name: str) -> None:
    options = [p for p in (LEAVES.get(name) or COMMANDS.get(name)).params if isinstance(p, click.Option)]
    assert [p.name for p in options if not p.help] == []


def test_every_command_is_listed_with_its_whole_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        summary = inspect.cleandoc(COMMANDS.get(name).help or "").partition("\n\n")[0]
        assert f" {name} {' '.join(summary.split())}" in text
        assert len(summary) <= 90
    places = [text.index(f" {title}: ") for title in ("Make a patch", "Put it on a model", "Look", "More")]
    assert places == sorted(places)


def test_encodings_in_the_help_are_those_that_there_are() -> None:
    """Each way of writing one is understood, with numbers for the words in capitals."""
    from weightlab.encodings import ENCODINGS as registered

    assert {text.partition(":")[0].partition("[")[0] for text in ENCODINGS} == set(registered.names())
    tried = 0
    for written in ENCODINGS:
        text = written.replace("BITS", "4").replace("SHARE", "0.5").replace("RANK", "16")
        fixed, *choices = re.split(r"\[:|\]\[:|\]", text)
        for chosen in itertools.product(*(["", *c.split("|")] for c in choices if c)):
            parse_choice(":".join([fixed, *(c for c in chosen if c)]))
            tried += 1
    assert tried >= 20
    assert ", ".join(ENCODINGS) in str(
        next(p.help for p in COMMANDS.get("diff").params if isinstance(p, click.Option) and p.name == "encode")
    )


def test_help_of_all_commands_imports_nothing_heavy() -> None:
    lines = [[*name.split(), "--help"] for name in (*NAMES, *LEAVES)]
    code = f"from weightlab_cli.main import run\nfor words in {lines!r}: assert run(words) == 0"
    assert loaded(code, HEAVY) == []


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-m", "weightlab_cli", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: weightlab ") and done.stderr == ""
