"""`lungwatch run`: the daemon, or one pass over the drop folder."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lungwatch.cli.options import home_options

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

    from lungwatch.daemon.config import Config
    from lungwatch.daemon.service import Service

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command()
@home_options
@click.option("--once", is_flag=True, help="Process what is in the drop folder, then exit.")
def run(home: Path | None, config_path: Path | None, once: bool) -> None:
    """Screen every X-ray that is dropped into HOME/incoming.

    Research use only; not a medical device.
    """
    from lungwatch.daemon.config import load_config

    _leave(_run(load_config(config_path, home), once=once))


def run_to_end(config: "Config", *, rescores: bool) -> None:
    """Process what was asked for, with progress; a first signal ends it after what is in hand.

    Raises
    ------
    LungwatchError
        If the start is not possible.
    """
    status = _run(config, once=True, rescores=rescores)
    if status:
        _leave(status)


def _run(config: "Config", *, once: bool, rescores: bool = False) -> int:
    from lungwatch.daemon.logs import configure
    from lungwatch.daemon.service import Service

    has_bar = once and sys.stderr.isatty()
    configure(quiet=has_bar, log_format=config.log_format)
    service = Service(config, rescores=rescores)
    _stop_on_signal(service.stop)
    return _run_with_bar(service) if has_bar else service.run(once=once)


def _stop_on_signal(stop: Callable[[], None]) -> None:
    """Have a thread act on the signals: a handler may not touch locks, a thread may.

    The first signal drains what is in flight; the second ends at once, which loses nothing.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # the number is written to the pipe, no more

    def wait() -> None:
        os.read(reader, 1)
        stop()
        os._exit(128 + os.read(reader, 1)[0])

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _leave(status: int) -> NoReturn:
    """End the process, without Python's own clean-up if a drain has left work behind.

    A thread that is inside onnxruntime when the interpreter goes would abort the process.
    """
    from lungwatch.daemon.worker import Worker

    if any(isinstance(thread, Worker) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _run_with_bar(service: "Service") -> int:
    bar: ProgressBar[int]
    with click.progressbar(length=1, label="Screening", show_pos=True, file=sys.stderr) as bar:

        def show(ended: int, known: int) -> None:
            bar.length = max(known, 1)
            bar.update(ended - bar.pos)

        return service.run(once=True, on_progress=show)
