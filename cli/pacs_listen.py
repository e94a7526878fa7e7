"""`lungwatch pacs listen`: receive images without processing them."""

import signal
import threading
from pathlib import Path

import click

from lungwatch.cli.options import home_options


@click.command()
@click.option("--port", type=click.IntRange(1, 65_535), help="Instead of the configured one.")
@home_options
def listen(*, port: int | None, home: Path | None, config_path: Path | None) -> None:
    """Receive images by C-STORE into the drop folder until stopped.

    `lungwatch run` does the same beside its work where `pacs_port` is set; this is for a home
    whose daemon runs at other times, or not on the network.
    """
    from dataclasses import replace

    from lungwatch.daemon import logs
    from lungwatch.daemon.config import load_config
    from lungwatch.daemon.configchecks import check_receiving
    from lungwatch.daemon.dicomnet import make_listener
    from lungwatch.daemon.home import Home
    from lungwatch.errors import ConfigError

    config = load_config(config_path, home)
    config = replace(config, pacs_port=port or config.pacs_port)
    check_receiving(config)
    if not config.pacs_port:
        raise ConfigError("no port to listen on: set 'pacs_port', or give --port")
    logs.configure(log_format=config.log_format)
    place = Home(config.home)
    place.prepare()
    ended = threading.Event()
    crashes: list[BaseException] = []

    def on_crash(name: str, error: BaseException) -> None:
        del name
        crashes.append(error)
        ended.set()

    listener = make_listener(config, place, on_crash)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    listener.start()
    ended.wait()
    listener.stop()
    if crashes:
        raise crashes[0]
