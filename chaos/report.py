"""Report of a chaos run, as a table for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->"
_HEAD = (
    "fault",
    "how injected",
    "runs",
    "strikes",
    "files",
    "lost",
    "duplicated",
    "recovery",
    "commit",
    "notes",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault's trials together.

    Attributes
    ----------
    damaged
        Half-written files, files that nobody dropped, and differences that reconcile found.
    recovery_s
        Of each trial.
    injected
        How often the fault struck, all trials together; None where that is not counted.
    commit
        Of the tree that it was run on, with a "+" if there were changes besides.
    skipped
        Why it was not injected; empty if it was.
    trouble
        What stopped a trial; empty if none was stopped.
    """

    key: str
    fault: str
    how: str
    runs: int = 0
    files: int = 0
    lost: int = 0
    duplicated: int = 0
    damaged: tuple[str, ...] = ()
    recovery_s: tuple[float, ...] = ()
    injected: int | None = None
    commit: str = ""
    notes: tuple[str, ...] = ()
    skipped: str = ""
    trouble: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing was found that must not be."""
        return not (self.lost or self.duplicated or self.damaged or self.trouble)


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings for `json.dump`."""
    return [asdict(finding) | {"is_good": finding.is_good} for finding in findings]


def from_json(found: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return the findings that `as_json` wrote."""
    return [Finding(**_values(given)) for given in found]


def _values(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name != "is_good"
    }


def as_table(findings: Sequence[Finding]) -> str:
    """Return a Markdown table."""
    return tabulate([_row(finding) for finding in findings], headers=_HEAD, tablefmt="pipe")


def write_into(document: Path, findings: Sequence[Finding]) -> None:
    """Replace the table between the marks of a document."""
    text = document.read_text(encoding="utf-8")
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    document.write_text(f"{head}{_BEGIN}{as_table(findings)}\n{_END}{tail}", encoding="utf-8")


def _row(finding: Finding) -> tuple[object, ...]:
    if finding.skipped:
        skipped = f"skipped: {finding.skipped}"
        return (finding.fault, finding.how, 0, "", "", "", "", "", finding.commit, skipped)
    recovery = ""
    if finding.recovery_s:
        low, high = min(finding.recovery_s), max(finding.recovery_s)
        recovery = f"{low:.1f} s" if high - low < 0.1 else f"{low:.1f} to {high:.1f} s"
    notes = [*finding.notes, *finding.damaged, finding.trouble]
    return (
        finding.fault,
        finding.how,
        finding.runs,
        "" if finding.injected is None else finding.injected,
        finding.files,
        finding.lost,
        finding.duplicated,
        recovery,
        finding.commit,
        "; ".join(dict.fromkeys(note.replace("|", "/") for note in notes if note)),
    )
