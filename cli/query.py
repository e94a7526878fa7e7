"""`lungwatch query`: the service that answers readers without access to the home, and its client.

A reader is a member of the group that may connect to the service's socket. The service runs as
the home's user, answers the commands of `SERVED` alone, and writes each to the audit trail in
the name of the user that the kernel gives (SO_PEERCRED, unix(7)). It needs no daemon.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from lungwatch.cli.main import Served, Site, home_options
from lungwatch.cli.options import file_path
from lungwatch.errors import HomeError, LungwatchError, describe_unexpected
from lungwatch.files import write_atomic

SOCKET = Path("/run/lungwatch/query.sock")
"""Where the service of systemd/ listens."""

SERVED = (
    ("results", "list"),
    ("results", "show"),
    ("results", "stats"),
    ("results", "export"),
    ("results", "compare"),
    ("pacs", "queue"),
)
"""Commands that readers may give."""

# These name files, which the service would read or write with its own rights.
_FILE_OPTIONS = ("--home", "--config", "--labels", "--output", "-o")
_FORMATS = ("csv", "json")
_MAX_REQUEST_BYTES = 1 << 16
_REQUEST_S = 10.0
_ANSWER_S = 60.0
_CHUNK_BYTES = 1 << 16
_MOST_CONNECTIONS = 16


def reader_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `home_options` to a command of `SERVED`, which asks the service where it has to."""

    @functools.wraps(command)
    def with_access(*, site: Site, **options: Any) -> Any:  # noqa: ANN401 - click's options by name
        context = click.get_current_context()
        path = None if context.find_object(Served) else _socket_for(site)
        if path is None:
            if site.named_home is not None and _is_closed(site.named_home):
                raise LungwatchError(
                    f"no right to read {site.named_home}; readers ask the service at {SOCKET}, "
                    "without --config (systemd/README.md)"
                )
            return command(site=site, **options)
        if options.get("labels") is not None:
            # Left out, the answer would be to another question.
            raise LungwatchError(
                "the service does not read files of those who ask: give --labels as a user who "
                "may read the home"
            )
        words = list(context.find_root().meta["lungwatch.words"])
        _ask(path, words, site.named_home, options.get("output"))

    return home_options(with_access, must_read=False)


def _socket_for(site: Site) -> Path | None:
    """Return the service's socket; None where this user reads the home without it."""
    if named := os.environ.get("LUNGWATCH_QUERY_SOCKET"):
        return Path(named)
    if site.config_path is not None:
        return None
    home = site.named_home
    is_closed = _is_closed(home) if home else not Path("lungwatch-home").exists()
    return SOCKET if is_closed and SOCKET.exists() else None


def _is_closed(home: Path) -> bool:
    return os.access(home, os.F_OK) and not os.access(home, os.R_OK | os.X_OK)


def _ask(path: Path, words: Sequence[str], home: Path | None, output: Path | None) -> NoReturn:
    """Have the service run a command, print what it answers, and exit with its status."""
    request: dict[str, object] = {
        "words": _without_files(words),
        "home": None if home is None else str(home.absolute()),
        "environment": {name: os.environ.get(name, "") for name in ("SUDO_USER", "USER")},
    }
    if output is not None:
        request["format"] = output.suffix.lower()[1:]
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as file:
                head = json.loads(file.readline())
                out, err = file.read(head["stdout"]), file.read(head["stderr"])
    except PermissionError as error:
        raise LungwatchError(
            f"no right to ask {path}: readers are members of its group (systemd/README.md)"
        ) from error
    except (OSError, ValueError) as error:
        raise LungwatchError(f"{path} does not answer: {error}") from error
    if (len(out), len(err)) != (head["stdout"], head["stderr"]):
        raise LungwatchError(f"{path} ended before its answer was complete")
    if output is not None and head["exit"] == 0:
        try:
            write_atomic(output, out)
        except OSError as error:
            raise LungwatchError(f"cannot write {output}: {error.strerror}") from error
        out = b""
    sys.stdout.buffer.write(out)
    sys.stdout.flush()
    sys.stderr.buffer.write(err)
    sys.stderr.flush()
    sys.exit(head["exit"])


def _without_files(words: Sequence[str]) -> list[str]:
    """Return a command line without the options that name files, and their values."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in _FILE_OPTIONS:
            next(rest, None)
        elif not _names_file(word):
            kept.append(word)
    return kept


def _names_file(word: str) -> bool:
    return word.partition("=")[0] in _FILE_OPTIONS or word.startswith("-o")


@click.group()
def query() -> None:
    """Answer the query commands of users who may not read the home (systemd/README.md)."""


@query.command()
@home_options
def answer(site: Site) -> None:
    """Answer one connection, standard input, as a service of systemd with `Accept=yes`."""
    program = click.get_current_context().find_root().command
    with socket.socket(fileno=os.dup(0)) as connection:
        _answer(connection, site, program)


def _answer(connection: socket.socket, site: Site, program: click.Command) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    try:
        words, served = _read_request(connection, site)
        status = _run(program, words, served, out, err)
    # Whatever goes wrong, nothing is printed of what may not be in the audit trail.
    except Exception as error:
        said = str(error) if isinstance(error, LungwatchError) else describe_unexpected(error)
        out, status = io.BytesIO(), 1
        err = io.BytesIO(f"lungwatch: error: {said}\n".encode("utf-8", "backslashreplace"))
    head = {"exit": status, "stdout": len(out.getvalue()), "stderr": len(err.getvalue())}
    connection.settimeout(_ANSWER_S)
    # A reader who has gone is no fault of the service.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(head).encode() + b"\n" + out.getvalue() + err.getvalue())


def _read_request(connection: socket.socket, site: Site) -> tuple[list[str], Served]:
    """Read which command a reader gives, and who that is.

    Raises
    ------
    LungwatchError
        If readers may not give it, or not of this home.
    """
    from lungwatch.db.audit import Actor

    connection.settimeout(_REQUEST_S)
    data = b""
    while chunk := connection.recv(_CHUNK_BYTES):
        data += chunk
        if len(data) > _MAX_REQUEST_BYTES:
            raise LungwatchError("the request is too long")
    request = json.loads(data)
    words = request["words"] if isinstance(request, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise LungwatchError("the request is not understood")
    if tuple(words[:2]) not in SERVED or any(map(_names_file, words)):
        raise LungwatchError("readers may not give this command, or not with these options")
    home = request.get("home")
    if home is not None and Path(str(home)).resolve() != site.home.root.resolve():
        raise HomeError(f"this service answers for {site.home.root} alone")
    if tuple(words[:2]) == ("results", "export"):
        if request.get("format") not in _FORMATS:
            raise LungwatchError("an export is CSV or JSON")
        words = [*words, "--output", f"export.{request['format']}"]
    pid, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    claims = request.get("environment")
    said = claims.items() if isinstance(claims, dict) else ()
    actor = Actor(
        uid=uid,
        login_uid=_login_of_peer(pid, uid),
        environment={str(name): str(value) for name, value in said if value},
    )
    return words, Served(site=site, actor=actor)


def _login_of_peer(pid: int, uid: int) -> int | None:
    """Return who logged in as the peer; None if its number may be another process's by now."""
    from lungwatch.db.audit import login_uid_of

    found = login_uid_of(pid)
    try:
        return found if Path(f"/proc/{pid}").stat().st_uid == uid else None
    except OSError:
        return None


def _run(
    program: click.Command, words: list[str], served: Served, out: io.BytesIO, err: io.BytesIO
) -> int:
    """Run a command in a reader's name, and return its exit status."""

    def text(file: io.BytesIO) -> io.TextIOWrapper:
        return io.TextIOWrapper(file, "utf-8", errors="surrogateescape", write_through=True)

    # Kept: a wrapper that is collected closes its file.
    texts = text(out), text(err)
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            program.main(words, prog_name="lungwatch", obj=served)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for one in texts:
                one.flush()
                one.detach()


@query.command()
@click.option("--socket", "path", type=file_path, required=True, help="Socket to make.")
@click.option("--group", metavar="NAME", help="Group that may connect; only this user if none.")
@home_options
def listen(site: Site, *, path: Path, group: str | None) -> None:
    """Listen on a socket and answer until stopped, on a machine without systemd."""
    home = site.home.root.absolute()
    command: list[str] = [
        *(sys.executable, "-c", "from lungwatch.cli.main import main; main()"),
        *("query", "answer", "--home", str(home)),
        *(() if site.config_path is None else ("--config", str(site.config_path))),
    ]
    with socket.socket(socket.AF_UNIX) as server:
        os.umask(0o177)
        try:
            if path.is_socket():
                path.unlink()
            server.bind(str(path))
            if group is not None:
                shutil.chown(path, group=group)
                path.chmod(0o660)
        except (OSError, LookupError) as error:
            raise LungwatchError(f"cannot listen on {path}: {error}") from error
        os.umask(0o077)
        server.listen(_MOST_CONNECTIONS)
        click.echo(f"listening on {path}", err=True)
        children: list[subprocess.Popen[bytes]] = []
        while True:
            connection, _ = server.accept()
            with connection:
                children.append(subprocess.Popen(command, stdin=connection.fileno()))  # noqa: S603 - its own command
            children = [child for child in children if child.poll() is None]
            if len(children) >= _MOST_CONNECTIONS:
                children.pop(0).wait()
