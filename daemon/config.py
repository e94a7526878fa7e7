"""The configuration, read once into a frozen object.

Sources, the later ones winning: defaults, the TOML file, `LUNGWATCH_…` in the environment,
options of the command line. An unknown key or a bad value stops the start with its name.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lungwatch.daemon.outbox.destination import is_ae_title, parse_destination
from lungwatch.errors import ConfigError
from lungwatch.imaging import ReadPolicy
from lungwatch.models import SHIPPED_DEFAULT

PREFIX = "LUNGWATCH_"
# Read elsewhere: the file itself, the crash points and the test suite's own switches.
_NOT_KEYS = ("CONFIG", "CRASH_AT", "HANG_AT", "TEST_")

ObserverChoice = Literal["auto", "inotify", "polling"]
SrChoice = Literal["comprehensive-3d", "comprehensive"]
LogFormat = Literal["auto", "text", "json", "journald"]

_OBJECT_KINDS = ("sc", "sr")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set.

    Attributes
    ----------
    home
        Folder that holds `incoming/`, `done/` and the rest.
    database_url
        SQLAlchemy URL; empty for `lungwatch.db` in the home.
    model
        Name of a bundle ("baseline-1.0.0") or path of a bundle's folder.
    observer
        "auto" takes inotify on local file systems and polling on network ones.
    stability_s
        Seconds that a file must be unchanged before it is taken, unless its writer was seen
        to close it or move it in; 0 picks 1 s on local and 5 s on network file systems.
    open_timeout_s
        Seconds without a change after which a file that was seen being written, and never
        closed, is taken all the same. Only where the kernel can't tell whether it is open.
    rescan_s
        Seconds between two looks at the whole drop folder.
    decode_workers, overlay_workers
        Threads of the two stages that can run beside each other.
    decode_timeout_s
        Seconds that decoding one file may take before its process is killed.
    decode_memory_mb
        Address space that one decoding process may take, in MiB.
    inference_threads
        Threads of one onnxruntime call; 0 for one per processor.
    batch_size
        Most images in one onnxruntime call.
    max_in_flight
        Most files between claim and end; bounds the memory.
    max_attempts
        Tries at a file that the process did not survive.
    retries
        Tries again after a passing trouble, each after twice the time of the one before.
    stuck_s
        Seconds without progress, beyond its own timeouts, after which a stage counts as stuck
        and the service manager's watchdog is no longer fed.
    min_free_mb
        Free space below which no file is claimed, in MiB.
    drain_s
        Seconds that a stop waits for what is in flight.
    overlay_side_px
        Longest side of the X-ray in an overlay.
    modalities, body_parts, reject_lateral, min_side_px, max_pixels
        What counts as a chest radiograph; see `lungwatch.imaging.ReadPolicy`.
    log_format
        "text", "json" (an object a line) or "journald" (fields of systemd's journal); "auto" is
        "journald" where standard error leads to the journal, else "text".
    metrics_port
        Port of this machine (127.0.0.1) that serves /metrics, /health and /ready; 0: none.
    metrics_textfile
        Path of a file that the metrics are written to, for node_exporter's textfile collector.
    retain_done_days, retain_quarantine_days, retain_overlays_days
        Days after its end that `lungwatch retention run` leaves a file of these folders; 0: for
        ever. What waits to be sent or tried again is never removed; the row stays.
    retain_max_gb
        GiB that these folders may hold together; the oldest go first. 0: no limit.
    keep_backups
        Backups of the database that `lungwatch backup create` keeps; 0: all.
    pacs_ae_title
        This program's own application entity title, at most 16 characters.
    pacs_port, pacs_address
        Where images are received by C-STORE; port 0: nowhere. "0.0.0.0" or "::" listens on
        every interface, and needs `pacs_calling_addresses`.
    pacs_calling_ae_titles, pacs_calling_addresses
        Who may send: AE titles (all if empty), and addresses or networks such as "10.1.0.0/16"
        (this machine alone if empty).
    pacs_max_associations, pacs_max_object_mb
        Most associations at once; most MiB of one object, held in memory while it comes.
    pacs_tls_certificate, pacs_tls_key, pacs_tls_ca
        Paths of PEM files: this side's certificate and key, and what the other side's
        certificate is checked against (the system's authorities if empty).
    pacs_destinations
        Where results are sent by C-STORE: "AETITLE@host:port", with "+tls" at the end where
        the connection is to be encrypted. None: nothing is sent.
    pacs_send
        What is sent of each result: "sc" (the overlay as a Secondary Capture), "sr" (a
        Structured Report).
    pacs_sr
        The SOP class of the report: "comprehensive-3d" or "comprehensive".
    pacs_deidentify, pacs_deidentify_key
        Send without what identifies the patient; the key is the path of a file that holds the
        secret from which pseudonyms are made.
    pacs_retry_s, pacs_retry_max_s
        Seconds before a destination that was not reached is tried again, doubled each time up
        to the most.
    """

    home: Path = Path("lungwatch-home")
    database_url: str = ""
    model: str = SHIPPED_DEFAULT
    observer: ObserverChoice = "auto"
    stability_s: float = 0.0
    open_timeout_s: float = 30.0
    rescan_s: float = 0.5
    decode_workers: int = 2
    overlay_workers: int = 2
    decode_timeout_s: float = 60.0
    decode_memory_mb: int = 4096
    inference_threads: int = 0
    batch_size: int = 8
    max_in_flight: int = 16
    max_attempts: int = 3
    retries: int = 4
    stuck_s: float = 300.0
    min_free_mb: int = 200
    drain_s: float = 20.0
    overlay_side_px: int = 1024
    modalities: tuple[str, ...] = tuple(sorted(ReadPolicy().modalities))
    body_parts: tuple[str, ...] = tuple(sorted(ReadPolicy().body_parts))
    reject_lateral: bool = True
    min_side_px: int = 64
    max_pixels: int = 120_000_000
    log_format: LogFormat = "auto"
    metrics_port: int = 0
    metrics_textfile: str = ""
    retain_done_days: int = 0
    retain_quarantine_days: int = 0
    retain_overlays_days: int = 0
    retain_max_gb: int = 0
    keep_backups: int = 14
    pacs_ae_title: str = "LUNGWATCH"
    pacs_port: int = 0
    pacs_address: str = "127.0.0.1"
    pacs_calling_ae_titles: tuple[str, ...] = ()
    pacs_calling_addresses: tuple[str, ...] = ()
    pacs_max_associations: int = 10
    pacs_max_object_mb: int = 512
    pacs_tls_certificate: str = ""
    pacs_tls_key: str = ""
    pacs_tls_ca: str = ""
    pacs_destinations: tuple[str, ...] = ()
    pacs_send: tuple[str, ...] = _OBJECT_KINDS
    pacs_sr: SrChoice = "comprehensive-3d"
    pacs_deidentify: bool = False
    pacs_deidentify_key: str = ""
    pacs_retry_s: float = 5.0
    pacs_retry_max_s: float = 900.0

    @property
    def read_policy(self) -> ReadPolicy:
        """What the reader accepts."""
        return ReadPolicy(
            modalities=frozenset(value.upper() for value in self.modalities),
            body_parts=frozenset(value.upper() for value in self.body_parts),
            reject_lateral=self.reject_lateral,
            min_side_px=self.min_side_px,
            max_pixels=self.max_pixels,
        )


_RANGES: dict[str, tuple[float, float]] = {
    "stability_s": (0, 3600),
    "open_timeout_s": (1, 86_400),
    "rescan_s": (0.05, 3600),
    "decode_workers": (1, 64),
    "overlay_workers": (1, 64),
    "decode_timeout_s": (1, 3600),
    "decode_memory_mb": (512, 1_000_000),
    "inference_threads": (0, 256),
    "batch_size": (1, 256),
    "max_in_flight": (1, 10_000),
    "max_attempts": (1, 100),
    "retries": (0, 20),
    "stuck_s": (1, 86_400),
    "min_free_mb": (0, 10_000_000),
    "drain_s": (0, 3600),
    "overlay_side_px": (128, 8192),
    "min_side_px": (1, 4096),
    "max_pixels": (4096, 1_000_000_000),
    "metrics_port": (0, 65_535),
    "retain_done_days": (0, 36_500),
    "retain_quarantine_days": (0, 36_500),
    "retain_overlays_days": (0, 36_500),
    "retain_max_gb": (0, 1_000_000),
    "keep_backups": (0, 10_000),
    "pacs_port": (0, 65_535),
    "pacs_max_associations": (1, 1000),
    "pacs_max_object_mb": (1, 4096),
    "pacs_retry_s": (0.1, 3600),
    "pacs_retry_max_s": (0.1, 86_400),
}


def load_config(
    config_path: Path | None = None,
    home: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read the configuration.

    Parameters
    ----------
    config_path
        A TOML file; None for `LUNGWATCH_CONFIG`, then `lungwatch.toml` in the home if there.
    home
        From the command line; wins over everything.
    environ
        The environment; the process's own if None.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key, a value of the wrong type or out of
        range: the message names the key and where it was found.
    """
    environ = os.environ if environ is None else environ
    from_env = _from_environment(environ)
    if config_path is None and environ.get(PREFIX + "CONFIG"):
        config_path = Path(environ[PREFIX + "CONFIG"])
    if config_path is None:
        candidate = Path(home or from_env.get("home") or Config.home) / "lungwatch.toml"
        config_path = candidate if candidate.is_file() else None
    values = _from_file(config_path) if config_path else {}
    values |= from_env
    if home is not None:
        values["home"] = home
    values["home"] = Path(values.get("home", Config.home)).expanduser().absolute()
    config = Config(**values)
    if not config.database_url:
        if "?" in str(config.home):  # the rest would be read as the URL's parameters
            raise ConfigError(f"'home' must not contain '?': {config.home}")
        values["database_url"] = f"sqlite:///{config.home / 'lungwatch.db'}"
        config = Config(**values)
    _check_sending(config)
    check_receiving(config)
    return config


def check_receiving(config: Config) -> None:
    """Refuse a port that is open to a network from which nobody may send.

    Raises
    ------
    ConfigError
        If it is.
    """
    if not config.pacs_port or config.pacs_calling_addresses:
        return
    if config.pacs_address not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"'pacs_address' {config.pacs_address} is open to the network: name who may send in "
            "'pacs_calling_addresses'"
        )


def _check_sending(config: Config) -> None:
    """Refuse what can be told of the destinations before one of them is asked."""
    if not is_ae_title(config.pacs_ae_title):
        raise ConfigError(
            f"bad value for 'pacs_ae_title': {config.pacs_ae_title!r} is not of 1 to 16 characters"
        )
    for text in config.pacs_destinations:
        try:
            parse_destination(text)
        except ConfigError as error:
            raise ConfigError(f"bad value for 'pacs_destinations': {error}") from error
    if len(set(config.pacs_destinations)) < len(config.pacs_destinations):
        raise ConfigError("bad value for 'pacs_destinations': one is named twice")
    kinds = config.pacs_send
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(_OBJECT_KINDS):
        raise ConfigError(
            f"bad value for 'pacs_send': {list(kinds)!r} is not of sc and sr, each once"
        )
    if config.pacs_sr not in get_args(SrChoice):
        listed = " or ".join(get_args(SrChoice))
        raise ConfigError(f"bad value for 'pacs_sr': {config.pacs_sr!r} is not {listed}")
    if config.pacs_deidentify and not config.pacs_deidentify_key:
        raise ConfigError(
            "'pacs_deidentify' needs 'pacs_deidentify_key', the path of a file with a secret: "
            "make one with `head -c 32 /dev/urandom > FILE; chmod 600 FILE`"
        )
    if config.pacs_retry_max_s < config.pacs_retry_s:
        raise ConfigError("'pacs_retry_max_s' is less than 'pacs_retry_s'")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return {key: _checked(key, value, f"in {path}") for key, value in raw.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name.removeprefix(PREFIX).startswith(_NOT_KEYS):
            continue
        key = name.removeprefix(PREFIX).lower()
        values[key] = _checked(key, _parse(key, text, name), f"in the environment ({name})")
    return values


def _parse(key: str, text: str, name: str) -> object:
    """Turn an environment variable's text into the type of its key."""
    kind = _KINDS.get(key)
    parsers: dict[Any, Callable[[str], object]] = {
        int: int,
        float: float,
        tuple: lambda value: [part.strip() for part in value.split(",") if part.strip()],
        bool: lambda value: {"true": True, "1": True, "false": False, "0": False}[value.lower()],
    }
    try:
        return parsers[kind](text) if kind in parsers else text
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{name}: {text!r} is not a value for '{key}'") from error


def _checked(key: str, value: object, where: str) -> object:
    kind = _KINDS.get(key)
    if kind is None:
        known = ", ".join(sorted(_KINDS))
        raise ConfigError(f"unknown key '{key}' {where}; known keys: {known}")
    problem = ConfigError(f"bad value for '{key}' {where}: {value!r}")
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise problem
        return tuple(cast(list[str], value))
    if kind is Path:
        if not isinstance(value, str) or not value:
            raise problem
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise problem
    if key == "observer" and value not in ("auto", "inotify", "polling"):
        raise ConfigError(
            f"bad value for 'observer' {where}: {value!r} is not auto, inotify or polling"
        )
    if key == "log_format" and value not in get_args(LogFormat):
        raise ConfigError(
            f"bad value for 'log_format' {where}: {value!r} is not auto, text, json or journald"
        )
    if key in _RANGES and isinstance(value, int | float):
        low, high = _RANGES[key]
        if not low <= value <= high:
            raise ConfigError(f"bad value for '{key}' {where}: {value} is not within {low}..{high}")
    return value


def _kind(field_type: object) -> type:
    if field_type in (ObserverChoice, SrChoice, LogFormat):
        return str
    if field_type == tuple[str, ...]:
        return tuple
    return cast(type, field_type)


_KINDS: dict[str, type] = {field.name: _kind(field.type) for field in fields(Config)}
