"""The units: well-formed, sandboxed, and in step with each other and with the installer."""

import os
import re
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = sorted(
    path.name for path in SYSTEMD.iterdir() if path.suffix in (".service", ".timer", ".socket")
)
SERVICES = [name for name in UNITS if name.endswith(".service")]
MOST_EXPOSURE = 2.0


@pytest.fixture
def analyze():
    """Run systemd-analyze and return what it says, both ways."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")

    def run(*args: str):
        return subprocess.run(
            ["systemd-analyze", *args], capture_output=True, text=True, check=False
        )

    return run


def section(name: str, title: str = "Service"):
    """The lines of a unit's section."""
    text = (SYSTEMD / name).read_text()
    body = text.partition(f"[{title}]\n")[2]
    return re.split(r"^\[", body, flags=re.MULTILINE)[0].splitlines()


def sandbox(name: str):
    """What a service has in common with the others, by what its first line says."""
    lines = section(name)
    start = next(i for i, line in enumerate(lines) if line.startswith("# The sandbox"))
    end = lines.index("RestrictAddressFamilies=AF_UNIX")
    return lines[start : end + 1]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_exposed_as_little_as_promised(analyze, name):
    said = analyze("security", "--offline=yes", "--no-pager", str(SYSTEMD / name))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert found, said.stdout + said.stderr
    assert float(found[1]) <= MOST_EXPOSURE


def test_systemd_finds_no_fault_with_the_units(analyze, tmp_path):
    """But for the command, which is not there before it is installed."""
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    said = analyze("verify", "--man=no", *(str(tmp_path / name) for name in UNITS))
    # It loads the machine's own units too, and speaks of those.
    ours = [line for line in said.stderr.splitlines() if "lungwatch" in line]
    assert (said.returncode, ours) == (0, [])


def test_systemd_finds_no_fault_with_the_drop_in_and_all_that_it_offers(analyze, tmp_path):
    """Its commented lines, too: each is one that a reader takes the `# ` from."""
    text = (SYSTEMD / "lungwatch-network.conf").read_text()
    text = re.sub(r"^# ([A-Z]\w+=)", r"\1", text, flags=re.MULTILINE)
    assert text.count("\nLoadCredential=") == 3
    unit = (SYSTEMD / "lungwatch.service").read_text()
    unit = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE)
    (tmp_path / "lungwatch.service").write_text(unit)
    dropin = tmp_path / "lungwatch.service.d/network.conf"
    dropin.parent.mkdir()

    def faults(content: str):
        dropin.write_text(content)
        said = analyze("verify", "--man=no", str(tmp_path / "lungwatch.service"))
        return [line for line in said.stderr.splitlines() if "lungwatch" in line]

    assert faults(text) == []
    assert faults(text + "LoadCredentials=x:/y\n") != []  # the drop-in is looked at, then


def test_the_three_services_share_one_sandbox():
    assert sandbox("lungwatch.service") == sandbox("lungwatch-backup.service")
    assert sandbox("lungwatch.service") == sandbox("lungwatch-retention.service")


def test_the_service_is_watched_and_restarted():
    lines = section("lungwatch.service")
    for wanted in ("Type=notify", "NotifyAccess=main", "WatchdogSec=30", "Restart=on-failure"):
        assert wanted in lines
    assert "StartLimitBurst=5" in section("lungwatch.service", "Unit")


def test_only_the_daemon_has_a_capability_and_only_one():
    lines = section("lungwatch.service")
    assert "CapabilityBoundingSet=CAP_LEASE" in lines
    assert "AmbientCapabilities=CAP_LEASE" in lines
    for name in ("lungwatch-backup.service", "lungwatch-retention.service"):
        assert "CapabilityBoundingSet=" in section(name)
        assert not any(line.startswith("Ambient") for line in section(name))


def test_backup_and_retention_wait_for_the_right_time():
    for name in ("lungwatch-backup", "lungwatch-retention"):
        for suffix in ("service", "timer"):
            lines = section(f"{name}.{suffix}", "Unit")
            assert "Wants=time-sync.target" in lines
            after = [line for line in lines if line.startswith("After=")]
            assert any("time-sync.target" in line for line in after)
        assert "Environment=BOOT_ID=%b" in section(f"{name}.service")
    assert not any("time-sync" in line for line in section("lungwatch.service", "Unit"))


def test_the_network_is_opened_by_the_drop_in_alone():
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((SYSTEMD / "lungwatch-network.conf").read_text())
    assert parser["Service"]["PrivateNetwork"] == "no"
    assert parser["Service"]["IPAddressAllow"] == "localhost"
    assert all("PrivateNetwork=yes" in section(name) for name in SERVICES)


def test_the_installer_knows_every_unit():
    script = (SYSTEMD / "install.sh").read_text()
    listed = re.search(r'^names="([^"]*)"', script, flags=re.MULTILINE)
    assert listed
    assert sorted(listed[1].split()) == UNITS


def test_the_installer_is_valid_and_says_how_it_is_called():
    script = str(SYSTEMD / "install.sh")
    subprocess.run(["/bin/sh", "-n", script], check=True)
    said = subprocess.run(["/bin/sh", script], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "install|uninstall" in said.stderr


def test_uninstalling_removes_the_program_and_keeps_data_unless_told(tmp_path):
    """Twice each, since an administrator may; in a tree of its own."""
    script = str(SYSTEMD / "install.sh")
    unit = tmp_path / "etc/systemd/system/lungwatch.service"
    kept = tmp_path / "var/lib/lungwatch/lungwatch.db"
    program = tmp_path / "opt/lungwatch/.venv"
    for path in (unit, kept):
        path.parent.mkdir(parents=True)
        path.touch()
    program.mkdir(parents=True)

    def uninstall(**env: str):
        subprocess.run(
            ["/bin/sh", script, "uninstall"],
            env=os.environ | {"DESTDIR": str(tmp_path)} | env,
            capture_output=True,
            check=True,
        )

    for _ in range(2):
        uninstall()
        assert (unit.exists(), program.exists(), kept.exists()) == (False, False, True)
    for _ in range(2):
        uninstall(PURGE="1")
        assert not kept.parent.exists()
