"""Service under a real systemd in a container: its unit, its sandbox, its watchdog.

The container has this machine's files, seen through an overlay.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lungwatch.daemon.pipeline.sandbox import fault_mark
from tests.support.attacker import REFUSED, armed
from tests.support.waits import wait_for

_BOOT_S = 60.0
_REPOSITORY = Path(__file__).parents[2]
_PACKAGES = {"": "core", "cli": "cli", "daemon": "daemon", "db": "db", "models": "models"}
# Of this very version, since the tests' own compiled packages are used; and not in a home
# folder, which the service is not shown.
_PYTHON = Path(f"/usr/bin/python3.{sys.version_info.minor}")


class Machine:
    """A container whose PID 1 is systemd, with the unit and the command installed in it."""

    def __init__(self, base: Path):
        self._base = base
        self.root = base / "root"
        self.home = self.root / "var/lib/lungwatch"
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        try:
            self._mount()
            self._install()
            self._boot()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object):
        self._stack.close()

    def run(self, *command: str, check: bool = True):
        """Run a command inside, as root."""
        return subprocess.run(
            ["nsenter", "--target", str(self._leader), "-m", "-u", "-i", "-p", "-n", *command],
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=check,
        )

    def show(self, key: str):
        """One property of the service."""
        said = self.run("systemctl", "show", "--value", "-p", key, "lungwatch")
        return said.stdout.strip()

    def journal(self, *args: str):
        said = self.run("journalctl", "-u", "lungwatch", "--no-pager", "-o", "cat", *args)
        return said.stdout

    def configure(self, **settings: str):
        """Replace the service's drop-in for the test; none without settings."""
        path = self.root / "etc/systemd/system/lungwatch.service.d/test.conf"
        path.parent.mkdir(exist_ok=True)
        lines = [
            f"{key}={value}"
            if key[0].isupper() and not key.isupper()
            else f"Environment=LUNGWATCH_{key}={value}"
            for key, value in settings.items()
        ]
        path.write_text("\n".join(["[Service]", *lines, ""]))
        self.run("systemctl", "daemon-reload")

    def _mount(self):
        def mount(*args: str, at: Path):
            done = subprocess.run(
                ["mount", *args, str(at)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
            self._stack.callback(subprocess.run, ["umount", "--lazy", str(at)], check=False)

        self._stack.callback(shutil.rmtree, self._base, ignore_errors=True)
        mount("-t", "tmpfs", "tmpfs", at=self._base)
        for name in ("upper", "work", "root"):
            (self._base / name).mkdir()
        layers = f"lowerdir=/,upperdir={self._base}/upper,workdir={self._base}/work"
        mount("-t", "overlay", "overlay", "-o", layers, at=self.root)

    def _install(self):
        program = self.root / "opt/lungwatch"
        shutil.rmtree(program, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
        for old in (self.root / "etc/systemd/system").glob("lungwatch*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        (self.root / "etc/machine-id").write_text("")
        subprocess.run([_PYTHON, "-m", "venv", "--without-pip", program / ".venv"], check=True)
        for package, folder in _PACKAGES.items():
            shutil.copytree(
                _REPOSITORY / folder,
                program / "tree/lungwatch" / package,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        (program / "site").mkdir()
        (libraries,) = (program / ".venv/lib").glob("python3.*/site-packages")
        (libraries / "test.pth").write_text("/opt/lungwatch/tree\n/opt/lungwatch/site\n")
        command = program / ".venv/bin/lungwatch"
        command.write_text(
            "#!/opt/lungwatch/.venv/bin/python\nfrom lungwatch.cli.main import main\nmain()\n"
        )
        command.chmod(0o755)
        systemd = _REPOSITORY / "systemd"
        for unit in (*systemd.glob("*.service"), *systemd.glob("*.socket")):
            shutil.copy(unit, self.root / "etc/systemd/system")
        shutil.copy(systemd / "lungwatch.sysusers", self.root / "usr/lib/sysusers.d/lungwatch.conf")

    def _boot(self):
        site = Path(pytest.__file__).parents[1]
        log = self._stack.enter_context((self._base / "console").open("wb"))
        container = subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe",
                # The list of calls that nspawn allows is older than Landlock.
                "--system-call-filter=landlock_create_ruleset landlock_restrict_self",
                "--private-network", f"--directory={self.root}", "--machine=lungwatch-test",
                f"--bind-ro={site}:/opt/lungwatch/site", "--boot",
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
        )  # fmt: skip
        self._stack.callback(container.wait)
        self._stack.callback(container.kill)
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
        deadline = time.monotonic() + _BOOT_S
        while time.monotonic() < deadline and container.poll() is None:
            found = children.read_text().split()
            if found:
                if not hasattr(self, "_leader"):
                    # It outlives a nspawn that is killed, and all that it started with it.
                    self._stack.callback(self._kill_leader)
                self._leader = int(found[0])
                asked = self.run("systemctl", "is-system-running", check=False)
                if asked.stdout.strip() in ("running", "degraded"):
                    self.run("systemd-sysusers", "lungwatch.conf")
                    return
            time.sleep(0.2)
        said = (self._base / "console").read_text(errors="replace")[-500:]
        pytest.skip(f"systemd does not boot in a container here: {said}")

    def _kill_leader(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader, signal.SIGKILL)


def skip_unless_possible():
    """Skip with the reason where this machine cannot have a container with systemd."""
    if os.geteuid() != 0:
        pytest.skip("a container with systemd as PID 1 needs root")
    for program in ("systemd-nspawn", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if not _PYTHON.exists():
        pytest.skip(f"{_PYTHON} is not installed, and the service is not shown home folders")


@pytest.fixture(scope="module")
def machine():
    skip_unless_possible()
    # Neither /tmp nor /run, which are the container's own.
    with Machine(Path(tempfile.mkdtemp(prefix="lungwatch-test-", dir="/srv"))) as machine:
        yield machine


@pytest.fixture(scope="module")
def home(machine, make_home):
    """The service's own, looked at from outside; the service runs as in the unit."""
    machine.run("systemctl", "start", "lungwatch")  # returns at READY=1
    yield type(make_home())(machine.home)
    machine.run("systemctl", "stop", "lungwatch", check=False)


def wait(machine, is_true):
    wait_for(is_true, lambda: machine.journal("-n", "30"))


def wait_for_end(machine, home, content):
    digest = hashlib.sha256(content).hexdigest()
    wait(
        machine,
        lambda: [r.is_kept and r.has_ended for r in home.rows() if r.sha256 == digest] == [True],
    )
    assert home.kept()[digest] == 1


def test_it_gets_ready_and_works_inside_the_sandbox(machine, home, sample):
    assert machine.show("ActiveState") == "active"
    wait(machine, lambda: " ended, " in machine.show("StatusText"))
    content = sample("RG1_UNCR.dcm")
    home.drop("a.dcm", content)
    wait_for_end(machine, home, content)
    assert home.rows()[0].state == "done"
    assert "cpuinfo" not in machine.journal()


def test_the_journal_knows_the_service_and_each_line_s_action(machine, home):
    lines = [json.loads(line) for line in machine.journal("-o", "json").splitlines()]
    ours = [line for line in lines if line.get("SYSLOG_IDENTIFIER") == "lungwatch"]
    assert {line["_SYSTEMD_UNIT"] for line in ours} == {"lungwatch.service"}
    assert any("action=ready" in line["MESSAGE"] for line in ours)


@pytest.mark.parametrize("name", ["lungwatch-backup", "lungwatch-retention"])
def test_what_the_timers_start_works_beside_the_service(machine, home, name):
    done = machine.run("systemctl", "start", name, check=False)
    said = machine.run("journalctl", "-u", name, "--no-pager", "-o", "cat")
    assert done.returncode == 0, said.stdout


def test_readers_alone_are_answered_by_the_query_socket(machine, home, picture):
    """Of two users known by number only, the one in the group; the audit trail has its number."""
    content, reader, stranger = picture(20), 54_321, 54_322
    home.drop("read.png", content)
    wait_for_end(machine, home, content)
    words = ("/opt/lungwatch/.venv/bin/lungwatch", "results", "list", "--json")

    def ask(uid: int, *groups: str):
        user = (f"--reuid={uid}", f"--regid={uid}", *(groups or ("--clear-groups",)))
        return machine.run("setpriv", *user, *words, "--home", "/var/lib/lungwatch", check=False)

    alone = ask(reader, "--groups=lungwatch-read")
    assert (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr.count("\n") == 1
    assert "no right to read /var/lib/lungwatch; readers ask" in alone.stderr
    machine.run("systemctl", "start", "lungwatch-query.socket")
    said = ask(reader, "--groups=lungwatch-read")
    assert said.returncode == 0, said.stderr
    digest = hashlib.sha256(content).hexdigest()
    assert digest in {row["sha256"] for row in json.loads(said.stdout)}
    for groups in ((), ("--groups=lungwatch-drop",)):
        refused = ask(stranger, *groups)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "no right to ask /run/lungwatch/query.sock" in refused.stderr
    service = (words[0], "audit", "list", "--json", "--home", "/var/lib/lungwatch")
    trail = machine.run("setpriv", "--reuid=lungwatch", "--clear-groups", *service).stdout
    users = {row["uid"] for row in json.loads(trail) if row["action"] == "results list"}
    assert users == {reader}


def test_a_decoder_that_attacks_gets_nothing(machine, home, sample, picture):
    """All that holds it is in force, by the unit's own filter too; the service requires it."""
    content, good = picture(21) + fault_mark("all"), picture(22)
    home.drop("victim.dcm", sample("RG1_UNCR.dcm"))
    wait_for_end(machine, home, sample("RG1_UNCR.dcm"))
    victim = next(path for path in home.files("done"))
    inside = Path("/") / victim.relative_to(machine.root)
    path = armed(machine.root / "opt/lungwatch/attacker.py", Path("/var/lib/lungwatch"), inside)
    path.chmod(0o644)
    machine.configure(TEST_DECODER="/opt/lungwatch/attacker.py")
    machine.run("systemctl", "restart", "lungwatch")
    home.drop("attack.png", content)
    home.drop("good.png", good)
    for each in (content, good):
        wait_for_end(machine, home, each)
    machine.configure()
    machine.run("systemctl", "restart", "lungwatch")
    assert json.loads(home.row(content).message) == {"tried": len(REFUSED), "succeeded": []}
    said = machine.journal()
    assert "action=sandbox seccomp=" in said
    assert "missing=none" in said


def test_a_stopped_process_is_killed_and_its_successor_goes_on(machine, home, picture):
    machine.configure(WatchdogSec="3")
    machine.run("systemctl", "restart", "lungwatch")
    before = int(machine.show("NRestarts"))
    machine.run("systemctl", "kill", "--kill-whom=main", "-s", "STOP", "lungwatch")
    home.drop("b.png", picture(3))
    wait(machine, lambda: int(machine.show("NRestarts")) > before)
    wait_for_end(machine, home, picture(3))
    assert "Watchdog timeout" in machine.journal()


def test_a_stage_that_hangs_has_the_service_restarted_and_the_file_ends_once(
    machine, home, picture
):
    machine.configure(WatchdogSec="3", HANG_AT="overlaid", STUCK_S="1", RETRIES="0", GATE="flag")
    machine.run("systemctl", "restart", "lungwatch")
    before = int(machine.show("NRestarts"))
    machine.configure()  # for the successor
    home.drop("c.png", picture(4))
    wait(machine, lambda: int(machine.show("NRestarts")) > before)
    wait_for_end(machine, home, picture(4))
    assert "action=stuck stage=overlay" in machine.journal()


def test_a_stop_drains_what_is_in_hand(machine, home, picture):
    wait(machine, lambda: machine.show("ActiveState") == "active")
    for number in range(5, 9):
        home.drop(f"{number}.png", picture(number))
    wait(machine, lambda: len(home.rows()) >= 5)
    machine.run("systemctl", "stop", "lungwatch")
    assert (machine.show("Result"), machine.show("ExecMainStatus")) == ("success", "0")
    assert "left=0" in machine.journal("-n", "20")
    assert list((home.root / "work").iterdir()) == []
    assert all(row.has_ended and row.is_kept for row in home.rows())


@pytest.mark.parametrize(
    ("content", "is_read"),
    [pytest.param("\n", False, id="empty"), pytest.param("s3cr-t\n", True, id="a password")],
)
def test_a_secret_of_root_reaches_the_service_and_is_not_told(machine, home, content, is_read):
    """An empty file is known as empty; with a password it is the server that is waited for."""
    secret = machine.root / "etc/lungwatch/database-password"
    secret.parent.mkdir(mode=0o700, exist_ok=True)
    secret.write_text(content)
    secret.chmod(0o600)
    machine.run("systemctl", "stop", "lungwatch", check=False)
    machine.run("systemctl", "reset-failed", "lungwatch", check=False)
    machine.configure(
        Restart="no",
        LoadCredential="database-password:/etc/lungwatch/database-password",
        DATABASE_PASSWORD_FILE="%d/database-password",
        DATABASE_URL="postgresql://screen@/lungwatch?host=/nowhere",
    )
    since = len(machine.journal())
    machine.run("systemctl", "start", "--no-block", "lungwatch")
    met = "action=database_away" if is_read else "database-password is empty"
    wait(machine, lambda: met in machine.journal()[since:])
    machine.run("systemctl", "stop", "lungwatch")
    said = machine.journal()[since:]
    assert "cannot be read" not in said
    assert said.count("lungwatch: error: ") == (0 if is_read else 1)
    assert "Traceback" not in said
    assert "s3cr-t" not in said


def test_a_mistake_in_the_configuration_is_no_loop_of_restarts(machine, home):
    """Given up after five starts, one line each; mended and reset, it starts again."""
    machine.run("systemctl", "stop", "lungwatch", check=False)
    machine.run("systemctl", "reset-failed", "lungwatch", check=False)
    machine.configure(RestartSec="100ms", RETRIES="many")
    since = len(machine.journal())
    assert machine.run("systemctl", "start", "lungwatch", check=False).returncode != 0
    wait(machine, lambda: machine.show("ActiveState") == "failed")
    said = machine.journal()[since:]
    assert "repeated too quickly" in said
    assert said.count("lungwatch: error: ") == 5
    assert "Traceback" not in said
    machine.configure()
    machine.run("systemctl", "reset-failed", "lungwatch")
    machine.run("systemctl", "start", "lungwatch")
    assert machine.show("ActiveState") == "active"
