"""Droppers may drop and read nothing; nobody else reads; what only asks changes nothing."""

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.processes import COMMAND

ANNE, BERT = 54_321, 54_322
DROPPERS = 54_330
_PYTHON = Path("/usr/bin/python3")


def tree(root):
    """Every path below a folder with its mode and content; the folder's own absence too."""
    found = {}
    for path in [root, *root.rglob("*")] if root.exists() else []:
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (stat.filemode(info.st_mode), hashlib.sha256(content).hexdigest())
    return found


def as_user(uid: int, script: str, *args: object, groups=(DROPPERS,), umask: int = 0o022):
    """Run a Python script as another user, and return what it printed or the error's name."""
    code = (
        "import os, sys\ntry:\n"
        + "".join(f"    {line}\n" for line in script.splitlines())
        + "except OSError as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [_PYTHON, "-I", "-S", "-c", code, *map(str, args)],
        user=uid, group=uid, extra_groups=list(groups), umask=umask, cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


DROP = "open(sys.argv[1], 'xb').write(b'x-ray'); print('dropped')"
READ = "print(open(sys.argv[1], 'rb').read())"
LIST = "print(os.listdir(sys.argv[1]))"
REMOVE = "os.remove(sys.argv[1]); print('removed')"


def start_with_open_umask(home):
    """Have a start make the home, whatever the umask."""
    home.incoming.rmdir()
    home.root.rmdir()
    former = os.umask(0)
    try:
        assert home.run_once().returncode == 0
    finally:
        os.umask(former)


@pytest.fixture
def home(make_home, picture):
    """A home that was made by a start with an open umask, and has a result."""
    home = make_home()
    start_with_open_umask(home)
    home.drop("x.png", picture(1))
    assert home.run_once().returncode == 0
    assert len(home.rows()) == 1
    return home


@pytest.fixture
def shared(make_home):
    """A home with a group of droppers, as the installer sets it up.

    Not below pytest's own folder, which every session of pytest closes to other users.
    """
    if os.geteuid() != 0:
        pytest.skip("to be other users needs root")
    if not _PYTHON.exists():
        pytest.skip(f"{_PYTHON}, which other users can run, is not installed")
    with tempfile.TemporaryDirectory(prefix="lungwatch-roles-") as folder:
        Path(folder).chmod(0o711)
        home = type(make_home())(Path(folder) / "home")
        start_with_open_umask(home)
        home.root.chmod(0o711)
        os.chown(home.incoming, -1, DROPPERS)
        home.incoming.chmod(0o3730)
        yield home


def test_a_new_home_is_closed_whatever_the_umask(home):
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.incoming.stat().st_mode) == 0o3730
    ours = [path for path in home.root.rglob("*") if path != home.incoming]
    assert [str(path) for path in ours if path.lstat().st_mode & 0o077] == []


@pytest.mark.parametrize(("before", "after"), [(0o755, 0o700), (0o2770, 0o2770)])
def test_an_open_home_of_an_earlier_release_is_closed_by_the_next_start(home, before, after):
    for path in [home.root, *home.root.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    home.incoming.chmod(before)
    assert home.run_once().returncode == 0
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o711
    assert stat.S_IMODE(home.incoming.stat().st_mode) == after
    closed = (*map(home.root.joinpath, ("done", "quarantine", "overlays", "lungwatch.db")),)
    assert [str(path) for path in closed if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize(
    ("name", "mode", "advice"),
    [
        ("", 0o755, "chmod go-rw"),
        ("incoming", 0o777, "chmod 3730"),
        ("done", 0o750, "chmod go-rwx"),
        ("lungwatch.db", 0o644, "chmod go-rwx"),
    ],
)
def test_doctor_fails_an_open_home_and_says_what_to_run(home, name, mode, advice):
    home.root.chmod(0o711)
    (home.root / name).chmod(mode)
    said = home.command("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(said.stdout)}
    assert said.returncode == 1
    assert checks["access"]["ok"] is False
    assert advice in checks["access"]["detail"]
    assert str(home.root / name) in checks["access"]["detail"]


def test_a_dropper_drops_and_reads_nothing_else(shared):
    path = shared.incoming / "anne.png"
    assert as_user(ANNE, DROP, path) == "dropped"
    assert as_user(ANNE, READ, path) == "b'x-ray'"
    places = ("", "incoming", "done", "quarantine", "overlays", "work", "outbox")
    for name in places:
        assert as_user(ANNE, LIST, shared.root / name) == "PermissionError", name
    assert as_user(ANNE, READ, shared.root / "lungwatch.db") == "PermissionError"
    path.unlink()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_dropper_neither_reads_nor_removes_what_another_dropped(shared, umask):
    path = shared.incoming / "anne.png"
    assert as_user(ANNE, DROP, path, umask=umask) == "dropped"
    try:
        os.getxattr(shared.incoming, "system.posix_acl_default")
    except OSError:
        pytest.skip("this file system has no access control lists")
    assert as_user(BERT, READ, path) == "PermissionError"
    assert as_user(BERT, REMOVE, path) == "PermissionError"
    assert as_user(ANNE, REMOVE, path) == "removed"


def test_a_stranger_does_nothing(shared):
    path = shared.incoming / "x.png"
    assert as_user(ANNE, DROP, path, groups=()) == "PermissionError"
    assert as_user(ANNE, LIST, shared.root, groups=()) == "PermissionError"


QUESTIONS = [
    ("doctor",),
    ("reconcile", "--dry-run"),
    ("rescore", "--dry-run"),
    ("retention", "run", "--dry-run"),
    ("backup", "list"),
    ("audit", "list"),
    ("pacs", "queue"),
    ("model", "list"),
    ("model", "verify"),
]


@pytest.mark.parametrize("command", QUESTIONS, ids=" ".join)
@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_question_makes_nothing_in_a_home_without_a_run(make_home, command, state):
    home = make_home()
    home.incoming.rmdir()
    if state == "missing":
        home.root.rmdir()
    before = tree(home.root.parent)
    said = home.command(*command)
    assert "Traceback" not in said.stderr
    assert tree(home.root.parent) == before


def test_a_question_changes_nothing_in_a_home_that_is_used(home):
    before = tree(home.root)
    for command in QUESTIONS:
        said = home.command(*command)
        assert said.returncode == 0, (command, said.stdout, said.stderr)
        assert tree(home.root) == before, command


# What a client sends and how it takes the answer, for a user who cannot run this Python.
ASK = """import json, socket
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(sys.argv[2].encode())
    connection.shutdown(socket.SHUT_WR)
    answer = connection.makefile('rb')
    head = json.loads(answer.readline())
    said = {**head, 'out': answer.read(head['stdout']).decode(), 'err': answer.read().decode()}
    print(json.dumps(said))"""
READERS = 54_331


@pytest.fixture
def service(shared, picture):
    """The service beside a home with one result, and the socket that readers may ask."""
    shared.drop("x.png", picture(1))
    assert shared.run_once().returncode == 0
    path = shared.root.parent / "query.sock"
    words = ("query", "listen", "--socket", str(path), "--home", str(shared.root))
    process = subprocess.Popen(
        [COMMAND, *words], env=shared.environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        os.chown(path, -1, READERS)
        path.chmod(0o660)
        yield path
    finally:
        process.kill()
        process.communicate()


def ask(path, *words: str, groups=(READERS,), uid=ANNE, **more: object):
    said = as_user(uid, ASK, path, json.dumps({"words": words, **more}), groups=groups)
    return json.loads(said) if said.startswith("{") else said


def reads(home):
    listed = json.loads(home.command("audit", "list", "--json").stdout)
    return [(row["action"], row["uid"]) for row in listed[::-1] if row["uid"] != os.getuid()]


def test_a_reader_reads_by_the_service_alone_and_each_time_in_the_trail(shared, service):
    listed = ask(service, "results", "list", "--json", environment={"SUDO_USER": "boss"})
    assert listed["exit"] == 0, listed["err"]
    (row,) = json.loads(listed["out"])
    with shared.daemon():
        shown = ask(service, "results", "show", str(row["id"]), "--json")
    assert json.loads(shown["out"])["sha256"] == row["sha256"]
    assert ask(service, "results", "stats")["exit"] == 0
    exported = ask(service, "results", "export", format="csv")
    assert exported["out"].startswith('"id"')
    assert ask(service, "pacs", "queue")["exit"] == 0
    names = ("results list", "results show", "results stats", "results export", "pacs queue")
    assert reads(shared) == [(name, ANNE) for name in names]
    noted = json.loads(shared.command("audit", "list", "--json", "--actor", "boss").stdout)
    assert [(one["uid"], one["environment"]) for one in noted] == [(ANNE, "SUDO_USER=boss")]
    for name in ("lungwatch.db", f"done/{row['sha256']}.png"):
        assert as_user(ANNE, READ, shared.root / name, groups=(READERS,)) == "PermissionError"


def test_droppers_and_strangers_are_not_answered(shared, service):
    for groups in ((), (DROPPERS,)):
        assert ask(service, "results", "list", groups=groups) == "PermissionError"
    assert reads(shared) == []


@pytest.mark.parametrize(
    "words",
    [
        ("retry", "--failed"),
        ("backup", "restore"),
        ("audit", "list"),
        ("query", "answer"),
        ("results", "list", "--home", "/etc"),
        ("results", "list", "--config=/etc/shadow"),
        ("results", "compare", "--labels", "/etc/shadow"),
        ("results", "export", "-o/tmp/x.csv"),
        ("--version",),
        (),
    ],
)
def test_a_reader_gives_no_other_command_and_names_no_file(shared, service, words):
    said = ask(service, *words)
    assert (said["exit"], said["out"]) == (1, "")
    assert "readers may not give this command" in said["err"]


def test_what_cannot_be_written_to_the_trail_is_not_printed(shared, service):
    with closing(sqlite3.connect(shared.root / "lungwatch.db")) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END"
        )
    for words in (("results", "list"), ("results", "show", "1"), ("results", "stats")):
        said = ask(service, *words)
        assert said["exit"] != 0, words
        assert said["out"] == ""


def test_the_command_asks_the_service_where_the_home_is_closed(shared, service):
    env = {"QUERY_SOCKET": str(service)}
    listed = shared.command("results", "list", "--json", env=env)
    assert len(json.loads(listed.stdout)) == 1, listed.stderr
    target = shared.root.parent / "all.csv"
    assert shared.command("results", "export", "-o", str(target), env=env).returncode == 0
    assert target.read_text().startswith('"id"')
    elsewhere = shared.command("results", "list", "--home", "/srv", env=env, with_home=False)
    assert elsewhere.returncode == 1
    assert "answers for" in elsewhere.stderr
    labels = shared.root.parent / "labels.csv"
    labels.write_text("sha256,label\n")
    models = ("--model", "a-1", "--model", "b-1")
    compared = shared.command("results", "compare", *models, "--labels", str(labels), env=env)
    assert compared.returncode == 1
    assert compared.stdout == ""
    assert "give --labels as a user who may read the home" in compared.stderr
