"""The documents name only what exists: commands, options, make targets, files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.support.commands import child, outermost, walk, words

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
    context = outermost()
    is_ended = False
    for word in shlex.split(rest, comments=True):
        if word in ("…", "...", "|", "&&", ";", "&", ">"):
            return None
        if word.startswith("-"):
            name = word.partition("=")[0]
            options = context.command.get_params(context)
            if not any(name in parameter.opts for parameter in options):
                return f"no option {name}"
            is_ended = True
        elif isinstance(context.command, click.Group) and not is_ended and word != "COMMAND":
            # "list/show" names two.
            for one in word.split("/"):
                named = child(context, one)
                if named is None:
                    return f"no command {one}"
            assert named is not None
            context = named
    return None


def commands_of(rest: str) -> list[tuple[str, ...]]:
    """The words of the commands that a mention names."""
    named = [outermost()]
    for word in shlex.split(rest, comments=True):
        if not isinstance(named[-1].command, click.Group) or word.startswith("-"):
            break
        inner = [found for one in word.split("/") if (found := child(named[-1], one))]
        if not inner:
            break
        named = inner
    return [words(context) for context in named]


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
        for path in commands_of(rest)
    }
    leaves = {words(one) for one in walk() if not isinstance(one.command, click.Group)}
    missing = [" ".join(path) for path in sorted(leaves - mentioned)]
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
