"""The versions that the suite is tested with, written to `constraints.txt` (``make constraints``).

pip resolves the extra `dev` as on an empty machine and installs nothing; what it would install is
the tested set. The file names versions only: pip's own configuration says where they come from.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "constraints.txt"
_HEAD = """\
# Versions that the suite is tested with, on Python {version}: `make constraints` writes this file.
# make installs with it; `make CONSTRAINTS=` takes the newest that pyproject.toml allows.
"""


def resolve() -> dict[str, str]:
    """Return the name and version of everything that the extra `dev` installs."""
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *("--report", "-", f"{ROOT}[dev]"),
        ],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    found = [item["metadata"] for item in json.loads(report)["install"]]
    return {item["name"]: item["version"] for item in found if item["name"] != "lungwatch"}


def main() -> None:
    """Write the file."""
    pins = [
        f"{name}=={version}\n"
        for name, version in sorted(resolve().items(), key=lambda item: item[0].lower())
    ]
    head = _HEAD.format(version=".".join(map(str, sys.version_info[:2])))
    TARGET.write_text(head + "".join(pins))
    print(f"{len(pins)} versions in {TARGET.name}")


if __name__ == "__main__":
    main()
