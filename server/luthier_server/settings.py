"""luthierd's settings, read once: flags, then LUTHIER_* variables, then a TOML file, then the defaults here."""

import argparse
import dataclasses
import ipaddress
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SettingsError(Exception):
    """A setting that cannot be used; the message names it."""


def _data_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "luthier"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "luthier"


def _option(default: Any, text: str, **metadata: Any) -> Any:
    metadata["help"] = text
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting; the name of a field is its flag (`--data-dir`), variable (`LUTHIER_DATA_DIR`) and TOML key."""

    listen: str = _option("127.0.0.1:50051", "address to serve gRPC on, HOST:PORT; port 0 takes a free one")
    data_dir: Path = _option(_data_dir, "folder for the database, datasets, checkpoints and models")
    slots: int = _option(0, "jobs that run at once; 0 means one per GPU, or one without", metavar="N")
    cpu_slots: int = _option(1, "exports that run at once, beside the jobs that train", metavar="N")
    tls_cert: Path | None = _option(None, "certificate chain (PEM) to speak TLS with; read again when it changes")
    tls_key: Path | None = _option(None, "key (PEM) of the certificate, without a password; read again when it changes")
    tls_ca: Path | None = _option(None, "authority (PEM) that `luthierd health` checks the certificate with")
    token_file: Path | None = _option(None, "tokens that callers need, one a line; read again when it changes")
    insecure_bind: bool = _option(False, "allow an address other than loopback without both TLS and tokens")
    warm: str = _option("on", "keep a warm trainer host, so that jobs start at once", choices=("on", "off"))
    model_root: tuple[Path, ...] = _option(tuple, "folder from which base models may be taken; may be repeated")
    secrets_dir: Path | None = _option(None, "folder of secrets, one file each, that specs refer to by name")
    threads: int = _option(0, "CPU threads of each trainer; 0 lets torch decide", metavar="N")
    max_queued: int = _option(10_000, "jobs that may wait", metavar="N")
    max_dataset_bytes: int = _option(16 * 2**30, "largest dataset file", metavar="BYTES")
    cache_bytes: int = _option(20 * 2**30, "room for tokenised datasets; the least used ones go", metavar="BYTES")
    import_host: tuple[str, ...] = _option(
        ("huggingface.co", "*.huggingface.co", "hf.co", "*.hf.co"),
        "host that datasets may be imported from: NAME, *.NAME, NAME:PORT, http://NAME:PORT, or * for any with a public"
        " address; may be repeated",
        metavar="HOST",
    )
    import_network: tuple[str, ...] = _option(
        (), "private network that these hosts may lie in, such as 10.1.0.0/16; may be repeated", metavar="CIDR"
    )
    import_bucket: tuple[str, ...] = _option(
        (), "bucket that datasets may be imported from, such as s3://data/train; may be repeated", metavar="URL"
    )
    import_root: tuple[Path, ...] = _option(tuple, "folder that datasets may be imported from; may be repeated")
    export_root: tuple[Path, ...] = _option(tuple, "folder that exports may be copied into; may be repeated")
    llama_cpp_dir: Path | None = _option(
        None, "folder of a llama.cpp whose converter writes the GGUF files of models that Luthier's own does not know"
    )
    max_watchers: int = _option(20_000, "watches that may be open", metavar="N")
    heartbeat_seconds: float = _option(15.0, "idle time after which a watch carries a heartbeat", metavar="S")
    slow_consumer_seconds: float = _option(30.0, "time after which a watcher that does not read is let go", metavar="S")
    stall_timeout: float = _option(300.0, "silence after which a trainer is killed", metavar="S")
    cancel_grace: float = _option(5.0, "time a cancelled trainer has to save and leave", metavar="S")
    stop_grace: float = _option(30.0, "time a trainer has to save and leave when the server stops", metavar="S")
    stop_trainers: bool = _option(False, "stop the trainers with the server; their jobs go on from a checkpoint")
    retry_seconds: float = _option(5.0, "wait before a lost attempt is tried again; doubles each time", metavar="S")
    retention_days: float = _option(30.0, "how long the events of an ended job stay, at least 7", metavar="DAYS")
    free_bytes: int = _option(256 * 2**20, "room at which jobs that a full disk paused go on", metavar="BYTES")
    device_memory_bytes: int = _option(
        0, "memory that training may take on its device; 0 means all that the device has", metavar="BYTES"
    )
    price_per_device_hour: float = _option(
        0.0, "what an hour of a device costs, for estimates; 0 means no price", metavar="PRICE"
    )
    currency: str = _option("USD", "currency of the price, as three letters: EUR, USD, ...", metavar="CODE")
    trainer_python: str = _option(sys.executable, "the Python that has luthier-trainer", metavar="PATH")
    external_host: bool = _option(False, "use a trainer host that somebody else starts and ends, as in compose.yaml")
    log_level: str = _option("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    puppet: str = _option("", argparse.SUPPRESS)

    @property
    def warmed(self) -> bool:
        """Whether the trainer host imports torch ahead of the first job."""
        return self.warm == "on"


_FIELDS = {each.name: each for each in dataclasses.fields(Settings)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="luthierd",
        description="The daemon of Luthier: keeps fine-tuning jobs, drives trainers, streams their progress over gRPC.",
        epilog="Every flag is also a variable (LUTHIER_DATA_DIR) and a key of the TOML file (data_dir).",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings (LUTHIER_CONFIG)")
    for each in _FIELDS.values():
        flag = "--" + each.name.replace("_", "-")
        options = {key: value for key, value in each.metadata.items() if key != "help"}
        text = each.metadata["help"]
        if text != argparse.SUPPRESS and each.default is not dataclasses.MISSING and each.default not in (None, False):
            text = f"{text} (default: {each.default})"
        if each.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif each.type in (tuple[Path, ...], tuple[str, ...]):
            options.setdefault("metavar", "DIR")
            parser.add_argument(flag, action="append", help=text, **options)
        else:
            options.setdefault("metavar", None if "choices" in options else each.name.upper())
            parser.add_argument(flag, help=text, **options)
    return parser


def _typed(name: str, value: Any, source: str) -> Any:
    kind = _FIELDS[name].type
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False}
            return words[str(value).lower()]
        if kind == tuple[Path, ...]:
            parts = value if isinstance(value, list) else [part for part in str(value).split(os.pathsep) if part]
            return tuple(Path(part).expanduser() for part in parts)
        if kind == tuple[str, ...]:
            return tuple(str(each) for each in (value if isinstance(value, list) else str(value).split(",")) if each)
        if kind in (Path, Path | None):
            return Path(str(value)).expanduser()
        if kind is int and isinstance(value, str):
            return int(value.replace("_", ""))
        if kind in (int, float):
            return kind(value)
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{source}: {name} cannot be {value!r}") from error
    choices = _FIELDS[name].metadata.get("choices")
    if choices and value not in choices:
        raise SettingsError(f"{source}: {name} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if unknown := sorted(set(found) - set(_FIELDS)):
        raise SettingsError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(_FIELDS)}")
    return {name: _typed(name, value, str(path)) for name, value in found.items()}


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings of this start. Raises SettingsError; SystemExit for --help or a flag that does not exist."""
    flags = vars(_parser().parse_args(arguments))
    config = flags.pop("config", None) or environment.get("LUTHIER_CONFIG")
    values = _from_file(Path(config)) if config else {}
    for name in _FIELDS:
        variable = f"LUTHIER_{name.upper()}"
        if variable in environment:
            values[name] = _typed(name, environment[variable], variable)
    for name, value in flags.items():
        values[name] = _typed(name, value, "--" + name.replace("_", "-"))
    settings = Settings(**values)
    _check(settings)
    return settings


def _is_loopback(listen: str) -> bool:
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(settings: Settings) -> None:
    host, colon, port = settings.listen.rpartition(":")
    if not colon or not (settings.listen.startswith("unix:") or port.isdigit()):
        raise SettingsError(f"--listen must be HOST:PORT, not '{settings.listen}'")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise SettingsError("--tls-cert and --tls-key belong together: give both, or neither")
    protected = settings.tls_cert is not None and settings.token_file is not None
    if not (protected or settings.insecure_bind or _is_loopback(settings.listen)):
        raise SettingsError(
            f"refusing to listen on {host or 'every address'}: anybody who reaches the port could run jobs. Give "
            "--tls-cert, --tls-key and --token-file, listen on 127.0.0.1, or pass --insecure-bind if the network is "
            "yours alone"
        )
    if settings.retention_days < 7:
        raise SettingsError("--retention-days must be at least 7: watchers may resume for that long")
    for name in ("slots", "threads", "device_memory_bytes", "price_per_device_hour"):
        if not 0 <= getattr(settings, name) < 2**63:
            raise SettingsError(f"--{name.replace('_', '-')} must not be negative")
    if settings.cpu_slots < 1:
        raise SettingsError("--cpu-slots must be at least 1: exports would wait for ever")
    if len(settings.currency) != 3 or not settings.currency.isascii() or not settings.currency.isupper():
        raise SettingsError(f"--currency must be three capital letters such as EUR, not '{settings.currency}'")
    for root in settings.model_root:
        if not root.is_dir():
            raise SettingsError(f"--model-root {root}: there is no such folder")
    for root in settings.export_root:
        if not root.is_dir():
            raise SettingsError(f"--export-root {root}: there is no such folder")
    if settings.llama_cpp_dir is not None and not settings.llama_cpp_dir.is_dir():
        raise SettingsError(f"--llama-cpp-dir {settings.llama_cpp_dir}: there is no such folder")
