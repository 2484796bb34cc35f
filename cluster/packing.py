"""What a job takes along: the code, the files its settings name, and nothing else.

A setting that names a path means one of three things to a job. An address (`s3://`) and a full path are read where the
job runs; a path below the current folder is taken along; anything else would not be there, and is refused now rather
than hours later. Needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import yaml

COMMANDS = ("edit", "study", "train", "tune")
MAX_BYTES = 400 * 2**20
"""Ray refuses more than 512 MiB; what is this large belongs on storage that the cluster reads."""

_CODE = ("odedit", "pipeline", "tune", "cluster")
_VERSION = "pipeline/config/VERSION"
"""Where `pipeline.config.version` looks for the version of code that was sent."""
_READ = ("path", "pool", "image_root", "rephrase_root", "checkpoint")
"""Settings that name what a run reads."""
_WRITTEN = ("out", "feature_store", "storage")
"""Settings that name what has to outlive the job."""
_FOLDER_OPTIONS = {"edit": (), "study": ("--out",), "train": ("--out",), "tune": ("--out", "--resume")}
_PASSWORD = re.compile(
    r"://[^/\s@]*:\S*@|https?://[^/\s]*@|[?&][^=&?\s]*(?:key|secret|token|password|sas|sig|credential)[^=&?\s]*=",
    re.IGNORECASE,
)
"""In an address; a user name alone may be a token where the address is a web server's."""
_LIBRARIES_OF_THE_CLUSTER = ("ray",)
"""A job cannot bring another version of these."""


class JobError(ValueError):
    """The user's mistake, or a cluster that does not answer, in a sentence. The package imports nothing of odedit's."""


@dataclass
class Parcel:
    """A job's folder on its way.

    Attributes:
        folder: What is sent, as it lies where the job runs.
        arguments: Of `python -m odedit` there.
        notes: What the user may want to know, a sentence each.
    """

    folder: Path
    arguments: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def pack(
    arguments: Sequence[str], folder: Path, here: Path, include: Sequence[Path] = (), code: str | None = None
) -> Parcel:
    """Copies what the command needs into `folder`.

    Args:
        arguments: `edit`, `tune`, `study` or `train` and what follows.
        folder: Empty.
        here: What relative paths start from.
        include: More files and folders below `here`.
        code: Version of the code, which travels with it: a parcel has no git history.

    Raises:
        JobError: The command is none of those, a file is not there or lies elsewhere, its results would be lost with
            the job, a password would be sent in clear, or it is too much.
    """
    if not arguments or arguments[0] not in COMMANDS:
        got = arguments[0] if arguments else "nothing"
        raise JobError(
            f"A job runs one of {', '.join(COMMANDS)}; got {got!r}. Such as: odedit submit -- edit --config F"
        )
    parcel = Parcel(folder, list(arguments))
    for name in _CODE:
        _copy_code(name, folder)
    if code is not None:
        (folder / _VERSION).write_text(f"{code}\n", encoding="utf-8")
    overrides = list(_overrides(parcel.arguments))
    replaced = {where for where, _ in overrides}
    settings = _named("", _take_config(parcel, here))
    places = [*((where, value) for where, value in settings if where not in replaced), *overrides]
    for where, value in places:
        _place(where, value, parcel, here)
    for path in include:
        _take("--include", str(path), parcel, here)
    _check_passwords([*places, *(("the command", text) for text in parcel.arguments)])
    _check_results(parcel.arguments, places)
    if parcel.num_bytes > MAX_BYTES:
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raise JobError(
            f"The job would take {parcel.num_bytes / 2**20:.0f} MiB along, more than {MAX_BYTES / 2**20:.0f} "
            f"(the largest file: {largest.relative_to(folder)}). Put records, pictures and weights where the cluster "
            "reads them, and name that place; `odedit data pack` writes to s3:// and gs://."
        )
    return parcel


def requirements() -> list[str]:
    """What pip installs for a job: the project's own dependencies, less what the cluster itself runs on."""
    try:
        found = requires("odedit") or []
    except PackageNotFoundError as error:
        raise JobError("--install: odedit is not installed here, so its dependencies are not known.") from error
    needed = [line for line in found if "extra ==" not in line]
    return [line for line in needed if re.split(r"[\[<>=!~; ]", line)[0] not in _LIBRARIES_OF_THE_CLUSTER]


def _copy_code(name: str, folder: Path) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"The package {name!r} of this project is not installed here.")
    source = Path(next(iter(spec.submodule_search_locations)))
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _take_config(parcel: Parcel, here: Path) -> Mapping[str, Any]:
    """Takes the file of --config along and makes the argument its name there; what is in it."""
    index, text = _option(parcel.arguments, "--config")
    if index is None:
        return {}
    path = here / Path(text).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
        values = yaml.safe_load(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise JobError(f"--config: {text!r} cannot be read ({reason}).") from error
    # Its name says what a search or study is called.
    (parcel.folder / path.name).write_text(content, encoding="utf-8")
    _set_option(parcel.arguments, index, "--config", path.name)
    return values if isinstance(values, Mapping) else {}


def _option(arguments: Sequence[str], name: str) -> tuple[int | None, str]:
    """Where `name VALUE` or `name=VALUE` stands, and the value."""
    for index, text in enumerate(arguments):
        if text == name and index + 1 < len(arguments):
            return index, arguments[index + 1]
        if text.startswith(f"{name}="):
            return index, text.partition("=")[2]
    return None, ""


def _set_option(arguments: list[str], index: int, name: str, value: str) -> None:
    if arguments[index] == name:
        arguments[index + 1] = value
    else:
        arguments[index] = f"{name}={value}"


def _named(where: str, values: object) -> Iterator[tuple[str, object]]:
    """Every setting of a file, with its path."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _named(f"{where}.{key}".removeprefix("."), value)
    elif isinstance(values, list):
        for value in values:
            yield from _named(where, value)
    else:
        yield where, values


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, object]]:
    for text in arguments[1:]:
        key, equals, value = text.partition("=")
        if equals and not key.startswith("-"):
            try:
                yield from _named(key, yaml.safe_load(value))
            except yaml.YAMLError as error:
                raise JobError(f"{text!r}: the value is not valid YAML.") from error


def _place(where: str, value: object, parcel: Parcel, here: Path) -> None:
    """Takes along what a setting names, or says what will become of it."""
    name = where.rpartition(".")[2]
    if not isinstance(value, str) or value.startswith("embedded"):
        return
    if (name == "name" and where.split(".")[-2:-1] == ["editor"]) or name == "family":
        _take_module(where, value, parcel, here)
    elif "://" in value:
        pass  # an address means the same everywhere
    elif name in _READ:
        is_of_hub = name == "checkpoint" and value.count("/") <= 1 and not (here / value).exists()
        if Path(value).is_absolute() or value.startswith("~"):
            parcel.notes.append(f"{where}: {value} is read where the job runs; it is not sent.")
        elif not is_of_hub:
            _take(where, value, parcel, here)
    elif name in _WRITTEN:
        _check_outlives(where, value)


def _take(where: str, value: str, parcel: Parcel, here: Path) -> None:
    path = Path(value)
    source = here / path
    if not source.exists():
        raise JobError(
            f"{where}: there is no {value!r} here to be taken along. What the cluster has is named by its full path "
            "or address."
        )
    if path.is_absolute() or not source.resolve().is_relative_to(here.resolve()):
        raise JobError(
            f"{where}: {value!r} lies outside of the current folder, so it would not arrive. Submit from a folder "
            "above it, or name a place that the cluster reads."
        )
    target = parcel.folder / path
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _take_module(where: str, name: str, parcel: Parcel, here: Path) -> None:
    """An editor or backbone of the user's own, given by its dotted name."""
    top = name.split(".")[0]
    if "." not in name or top in _CODE:
        return
    for candidate in (top, f"{top}.py"):
        if (here / candidate).exists():
            _take(where, candidate, parcel, here)
            return
    parcel.notes.append(f"{where}: {top!r} is not in the current folder; it has to be installed where the job runs.")


def _check_outlives(where: str, value: str) -> None:
    """Raises JobError if what is written to a place is gone with the job."""
    if not Path(value).is_absolute():
        raise JobError(
            f"{where}: {value!r} would be written into the job's own folder and be lost with it. Give a full path on "
            "storage that every node has mounted, or an address."
        )


def holds_password(text: str) -> bool:
    """Whether an address in the text holds a password or an access key.

    >>> holds_password("out=s3://bucket/runs"), holds_password("storage=postgresql+psycopg://me:secret@host/name")
    (False, True)
    """
    return "://" in text and _PASSWORD.search(text) is not None


def _check_passwords(places: Sequence[tuple[str, object]]) -> None:
    """Raises JobError if an address holds a password: a job's command is shown, and its files stay on the nodes."""
    for where, value in places:
        if isinstance(value, str) and holds_password(value):
            raise JobError(
                f"{where}: an address holds a password or key, which Ray's dashboard would show and every node would "
                "keep. Take it out of the address and hand it on: --env MLFLOW_TRACKING_USERNAME --env "
                "MLFLOW_TRACKING_PASSWORD for MLflow, --env PGPASSWORD for PostgreSQL, --env AWS_ACCESS_KEY_ID --env "
                "AWS_SECRET_ACCESS_KEY for s3://."
            )


def _check_results(arguments: Sequence[str], places: Sequence[tuple[str, object]]) -> None:
    """Raises JobError if nobody said where the results go."""
    command = arguments[0]
    given = [(option, value) for option in _FOLDER_OPTIONS[command] if (value := _option(arguments, option)[1])]
    for option, value in given:
        if "://" not in value:
            _check_outlives(option, value)
    if given or (command == "edit" and any(where == "out" for where, _ in places)):
        return
    wanted = "out=/shared/runs/name" if command == "edit" else "--out /shared/name"
    raise JobError(
        f"The results of `{command}` would be written into the job's own folder and be lost with it. Say where they "
        f"go, on storage that every node has mounted or at an address: {wanted}"
    )
