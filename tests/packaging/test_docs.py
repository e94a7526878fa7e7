"""The documents name only what exists: commands, options, make targets, files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from lungwatch.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "systemd" / "README.md"])
MODEL_CARDS = sorted(ROOT.glob("models/**/*.md"))
SHELL = re.compile(r"^(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?lungwatch (?P<rest>.*)$")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`lungwatch (?P<rest>[^`]+)`")
MAKE = re.compile(r"^(?:\$ )?make (?P<target>[\w-]+)|`make (?P<span>[\w-]+)", re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)[^)]*\)")


def mentions(text: str) -> Iterator[str]:
    """What follows `lungwatch` wherever a page shows it as a command."""
    for fence in FENCE.finditer(text):
        for line in fence["body"].replace("\\\n", " ").splitlines():
            if found := SHELL.match(line.strip()):
                yield found["rest"]
    for span in SPAN.finditer(FENCE.sub("", text).replace("\n", " ")):
        yield span["rest"]


def problem_with(rest: str) -> str | None:
    """Why a mentioned command line is none; None if it is one."""
    command: click.Command = main
    is_ended = False
    for word in shlex.split(rest, comments=True):
        if word in ("…", "...", "|", "&&", ";", "&", ">"):
            return None
        if word.startswith("-"):
            name = word.partition("=")[0]
            context = click.Context(command)
            if not any(name in parameter.opts for parameter in command.get_params(context)):
                return f"no option {name}"
            is_ended = True
        elif isinstance(command, click.Group) and not is_ended and word != "COMMAND":
            # "list/show" names two.
            for one in word.split("/"):
                child = command.get_command(click.Context(command), one)
                if child is None:
                    return f"no command {one}"
            command = child
    return None


def words_of(rest: str) -> list[tuple[str, ...]]:
    """Paths of the commands that a mention names."""
    words: list[tuple[str, ...]] = [()]
    command: click.Command = main
    for word in shlex.split(rest, comments=True):
        if not isinstance(command, click.Group) or word.startswith("-"):
            break
        parts = [one for one in word.split("/") if command.get_command(click.Context(command), one)]
        if not parts:
            break
        words = [(*path, one) for path in words for one in parts]
        command = command.get_command(click.Context(command), parts[-1])  # type: ignore[assignment]
    return words


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(command, click.Group):
        yield words
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        child = command.get_command(context, name)
        assert child is not None
        yield from leaves(child, (*words, name))


def test_a_wrong_command_or_option_would_be_found():
    assert problem_with("results list --json") is None
    assert problem_with("results list/show") is None
    assert problem_with("run --home ./x  # the daemon") is None
    assert problem_with("frobnicate") == "no command frobnicate"
    assert problem_with("results frobnicate") == "no command frobnicate"
    assert problem_with("run --frobnicate") == "no option --frobnicate"
    page = "```sh\nA=b lungwatch run --once\nsystemctl start lungwatch\n```\n`lungwatch doctor`"
    assert list(mentions(page)) == ["run --once", "doctor"]


@pytest.mark.parametrize(
    "page", [*PAGES, *MODEL_CARDS], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_mentioned_command_and_option_exists(page):
    wrong = {
        rest: problem for rest in mentions(page.read_text()) if (problem := problem_with(rest))
    }
    assert not wrong


def test_every_command_is_mentioned_in_the_readme_or_the_documents():
    mentioned = {
        path
        for page in PAGES
        if page.name != "CHANGELOG.md"  # where a command is announced, not explained
        for rest in mentions(page.read_text())
        for path in words_of(rest)
    }
    missing = [" ".join(words) for words in leaves(main) if words not in mentioned]
    assert not missing


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_mentioned_make_target_exists(page):
    mentioned = {found["target"] or found["span"] for found in MAKE.finditer(page.read_text())}
    assert mentioned <= make_targets()


def test_the_readme_shows_the_two_commands_and_says_what_it_is_not():
    text = (ROOT / "README.md").read_text()
    fenced = "\n".join(fence["body"] for fence in FENCE.finditer(text))
    assert re.search(r"^make demo\b", fenced, re.MULTILINE)
    assert re.search(r"^make test\b", fenced, re.MULTILINE)
    assert "Not a medical device" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page):
    broken = [
        found["target"]
        for found in LINK.finditer(FENCE.sub("", page.read_text()))
        if "://" not in found["target"] and not (page.parent / found["target"]).exists()
    ]
    assert not broken
