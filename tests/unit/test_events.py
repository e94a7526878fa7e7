"""Every event has a literal action, and the documentation lists each of them."""

import ast
import re
from pathlib import Path

from lungwatch.daemon.retry import ACTIONS

ROOT = Path(__file__).parents[2]
_FIELD = re.compile("`([a-z][a-z0-9_]*)`")


def called(node):
    """Yield the action of each call of `event` below a node, as far as it is literal.

    Where a library hands over events of its own, it is imported as `log`.
    """
    for call in ast.walk(node):
        name = getattr(call, "func", None)
        is_event = isinstance(name, ast.Name) and name.id in ("event", "log")
        if isinstance(call, ast.Call) and is_event:
            first = call.args[0]
            yield from (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,)


def test_every_action_is_literal_and_documented_and_none_else_is():
    found = {action for pair in ACTIONS.values() for action in pair}
    for folder in ("daemon", "cli", "db", "core"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for action in called(ast.parse(path.read_text())):
                if ast.unparse(action).startswith("ACTIONS["):
                    continue  # the table is imported above
                assert isinstance(action, ast.Constant), f"{path.name}: {ast.unparse(action)}"
                assert re.fullmatch("[a-z]+(_[a-z]+)*", action.value), path.name
                found.add(action.value)
    text = (ROOT / "docs" / "monitoring.md").read_text().partition("| action | of |")[2]
    documented = {
        action
        for line in text.splitlines()
        if line.startswith("| `")
        for action in _FIELD.findall(line.split("|")[1])
    }
    assert len(found) > 30
    assert documented == found
