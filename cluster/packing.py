"""Packing of a job: the code, and the files that its settings name.

An address (`s3://`) or a full path in a setting is read where the job runs; a path below the current folder is sent
with the job; any other path would be missing there and is refused before anything is sent. Needs neither torch nor Ray.
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

COMMANDS = ("commit", "edit", "study", "train", "tune")
MAX_BYTES = 400 * 2**20
"""Largest job. Ray's own limit is 512 MiB."""

_CODE = ("odedit", "pipeline", "tune", "cluster")
_VERSION = "pipeline/config/VERSION"
"""File from which `pipeline.config.version` reads the version of the sent code."""
_READ = (
    "path", "validation", "pool", "pictures", "image_root", "rephrase_root", "pool_image_root", "pool_rephrase_root",
    "checkpoint", "add",
)  # fmt: skip
"""Settings that name inputs."""
_READ_OPTIONS = ("--add",)
"""Options that name inputs, as the settings of the same names do."""
_WRITTEN = ("out", "feature_store", "storage")
"""Settings that name outputs, which must outlive the job."""
_FOLDER_OPTIONS = {
    "commit": ("--change", "--from"),
    "edit": (),
    "study": ("--out",),
    "train": ("--out",),
    "tune": ("--out", "--resume"),
}
_RELATIVE_DATABASE = re.compile(r"sqlite(\+\w+)?:///(?!/)")
"""Beginning of the address of a database file whose path is relative; a full path has a fourth slash."""
_IGNORE_FILES = (".gitignore", ".rayignore")
"""Files that Ray would obey in every folder of the job, and leave out what is to be sent."""
_PASSWORD = re.compile(
    r"://[^/\s@]*:\S*@|https?://[^/\s]*@|[?&][^=&?\s]*(?:key|secret|token|password|sas|sig|credential)[^=&?\s]*=",
    re.IGNORECASE,
)
"""Password or key in an address. A user name alone counts for http(s), where it may be a token."""
_LIBRARIES_OF_THE_CLUSTER = ("ray",)
"""Libraries whose version is the cluster's; a job cannot install another one."""


class JobError(ValueError):
    """Invalid input or a failing cluster; the message is for the user. This package may not import `odedit.errors`."""


@dataclass
class Parcel:
    """A packed job.

    Attributes:
        folder: Working directory of the job.
        arguments: Arguments of `python -m odedit` in the job.
        notes: Notes for the user, one sentence each.
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
    """Copies the code and the files of a command into `folder`.

    Args:
        arguments: Command (one of `COMMANDS`) and its arguments.
        folder: Empty folder to fill.
        here: Base of relative paths.
        include: Further files and folders below `here`.
        code: Version of the code, stored with it, since the job has no git history.

    Raises:
        JobError: The command is another one, a file is missing or outside of `here`, results would be lost with the
            job, a password would be sent in clear, or the job is larger than `MAX_BYTES`.
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
    replaced = {key for key, _ in overrides}
    from_file = _flattened("", _take_config(parcel, here))
    settings = [*((key, value) for key, value in from_file if key not in replaced), *overrides]
    inputs = [(option, text) for option in _READ_OPTIONS if (text := _option(parcel.arguments, option)[1])]
    for key, value in (*settings, *inputs):
        _add_setting(key, value, parcel, here)
    for path in include:
        _add_file("--include", str(path), parcel, here)
    _check_passwords([*settings, *(("the command", text) for text in parcel.arguments)])
    _check_results(parcel.arguments, settings)
    if parcel.num_bytes > MAX_BYTES:
        largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raise JobError(
            f"The job has {parcel.num_bytes / 2**20:.0f} MiB of files, more than {MAX_BYTES / 2**20:.0f} "
            f"(the largest file: {largest.relative_to(folder)}). Put records, pictures and weights on storage that the "
            "cluster reads, and set their paths there; `odedit data pack` writes to s3:// and gs://."
        )
    return parcel


def requirements() -> list[str]:
    """Requirements that pip installs for a job: the project's dependencies without those of the cluster."""
    try:
        lines = requires("odedit") or []
    except PackageNotFoundError as error:
        raise JobError("--install: odedit is not installed here, so its dependencies are not known.") from error
    needed = [line for line in lines if "extra ==" not in line]
    return [line for line in needed if re.split(r"[\[<>=!~; ]", line)[0] not in _LIBRARIES_OF_THE_CLUSTER]


def _copy_code(name: str, folder: Path) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise JobError(f"The package {name!r} of this project is not installed here.")
    source = Path(next(iter(spec.submodule_search_locations)))
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", *_IGNORE_FILES))


def _take_config(parcel: Parcel, here: Path) -> Mapping[str, Any]:
    """Copies the file of `--config`, sets the argument to its new path, and returns its settings."""
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
    # The file keeps its name, which is the default name of a search or study.
    (parcel.folder / path.name).write_text(content, encoding="utf-8")
    _set_option(parcel.arguments, index, "--config", path.name)
    return values if isinstance(values, Mapping) else {}


def _option(arguments: Sequence[str], name: str) -> tuple[int | None, str]:
    """Index and value of an option given as `name VALUE` or `name=VALUE`; (None, "") if it is missing."""
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


def _flattened(prefix: str, values: object) -> Iterator[tuple[str, object]]:
    """Settings with dotted keys; the items of a list have the list's key."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flattened(f"{prefix}.{key}".removeprefix("."), value)
    elif isinstance(values, list):
        for value in values:
            yield from _flattened(prefix, value)
    else:
        yield prefix, values


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, object]]:
    for text in arguments[1:]:
        key, equals, value = text.partition("=")
        if equals and not key.startswith("-"):
            try:
                yield from _flattened(key, yaml.safe_load(value))
            except yaml.YAMLError as error:
                raise JobError(f"{text!r}: the value is not valid YAML.") from error


def _add_setting(key: str, value: object, parcel: Parcel, here: Path) -> None:
    """Copies the file that a setting or an option names, or checks that the job does not need it from here."""
    name = key.rpartition(".")[2].removeprefix("--")
    if not isinstance(value, str) or value.partition(":")[0] == "embedded":
        return
    if (name == "name" and key.split(".")[-2:-1] == ["editor"]) or name == "family":
        _add_module(key, value, parcel, here)
    elif _RELATIVE_DATABASE.match(value):
        _check_outlives(key, value)
    elif "://" in value:
        pass  # any other address is valid on every node
    elif name in _READ or key.split(".")[-2:] == ["commit", "start"]:  # MEND has a start, too, which is no path
        is_of_hub = name == "checkpoint" and value.count("/") <= 1 and not (here / value).exists()
        if Path(value).is_absolute() or value.startswith("~"):
            parcel.notes.append(f"{key}: {value} is read where the job runs; it is not sent.")
        elif not is_of_hub:
            _add_file(key, value, parcel, here)
    elif name in _WRITTEN:
        _check_outlives(key, value)


def _add_file(key: str, value: str, parcel: Parcel, here: Path) -> None:
    path = Path(value)
    source = here / path
    if not source.exists():
        raise JobError(
            f"{key}: there is no {value!r} here to send. For a file on the cluster, give its full path or address."
        )
    if path.is_absolute() or not source.resolve().is_relative_to(here.resolve()):
        raise JobError(
            f"{key}: {value!r} lies outside of the current folder, so it would not be sent. Submit from a folder "
            "above it, or give a path or address that the cluster reads."
        )
    target = parcel.folder / path
    if source.is_dir():
        left_out = shutil.ignore_patterns("__pycache__", ".git", *_IGNORE_FILES)
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _add_module(key: str, name: str, parcel: Parcel, here: Path) -> None:
    """Copies the user's own editor or backbone, given by its dotted name."""
    top = name.split(".")[0]
    if "." not in name or top in _CODE:
        return
    for candidate in (top, f"{top}.py"):
        if (here / candidate).exists():
            _add_file(key, candidate, parcel, here)
            return
    parcel.notes.append(f"{key}: {top!r} is not in the current folder; it has to be installed where the job runs.")


def _check_outlives(key: str, value: str) -> None:
    """Raises JobError if an output path is relative, so that it would be deleted with the job."""
    if not Path(value).is_absolute():
        path = "path (sqlite:////folder/file.db)" if _RELATIVE_DATABASE.match(value) else "path"
        raise JobError(
            f"{key}: {value!r} would be written into the job's own folder and be lost with it. Give a full {path} on "
            "storage that every node has mounted, or an address."
        )


def holds_password(text: str) -> bool:
    """True when an address in the text holds a password or an access key.

    >>> holds_password("out=s3://bucket/runs"), holds_password("storage=postgresql+psycopg://me:secret@host/name")
    (False, True)
    """
    return "://" in text and _PASSWORD.search(text) is not None


def _check_passwords(settings: Sequence[tuple[str, object]]) -> None:
    """Raises JobError if an address holds a password: Ray shows a job's command, and its files stay on the nodes."""
    for key, value in settings:
        if isinstance(value, str) and holds_password(value):
            raise JobError(
                f"{key}: an address holds a password or key, which Ray's dashboard would show and every node would "
                "keep. Remove it from the address and pass it by: --env MLFLOW_TRACKING_USERNAME --env "
                "MLFLOW_TRACKING_PASSWORD for MLflow, --env PGPASSWORD for PostgreSQL, --env AWS_ACCESS_KEY_ID --env "
                "AWS_SECRET_ACCESS_KEY for s3://."
            )


def _check_results(arguments: Sequence[str], settings: Sequence[tuple[str, object]]) -> None:
    """Raises JobError if neither a setting nor an option names an output that outlives the job."""
    command = arguments[0]
    given = [(option, value) for option in _FOLDER_OPTIONS[command] if (value := _option(arguments, option)[1])]
    for option, value in given:
        if "://" not in value:
            _check_outlives(option, value)
    has_setting = command in ("commit", "edit")
    if any(key == "out" for key, _ in settings) if has_setting else given:
        return
    example = "out=/shared/runs/name" if has_setting else "--out /shared/name"
    raise JobError(
        f"The results of `{command}` would be written into the job's own folder and be lost with it. Set a folder on "
        f"storage that every node has mounted or at an address: {example}"
    )
