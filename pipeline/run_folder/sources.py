"""Locations of a run's records and pictures. The embedded benchmark is written to disk on demand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType

from odedit import world
from odedit.data.images import ImageReader
from odedit.data.packed import MANIFEST
from odedit.data.roots import root_of
from odedit.data.tables import shards
from odedit.errors import InputError
from odedit.runtime.addresses import above, below, masked, relative_note
from odedit.storage.atomic import folder_written_atomically
from odedit.storage.location import Location, LocationLike, at, copy_folder, locate
from odedit.world.facts import WORLD
from pipeline.config.run import DataConfig, embedded_split
from pipeline.run_folder.workspace import Workspace

_ROOTS = ("image_root", "rephrase_root", "pictures", "pool", "pool_image_root", "pool_rephrase_root")
_WRITTEN_LAST = "evaluation.json"


@dataclass(frozen=True)
class Sources:
    """Absolute paths and addresses of the inputs, valid on every worker.

    Attributes:
        added: Further files of records, of a run that scores those of `commit.add` and commits none.
    """

    path: str
    image_root: str | None
    rephrase_root: str | None
    pool: str | None
    max_pixels: int
    max_bytes: int
    pictures: str | None = None
    pool_image_root: str | None = None
    pool_rephrase_root: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    added: tuple[str, ...] = ()

    @cached_property
    def reader(self) -> ImageReader:
        """Reader of the records' pictures."""
        return self._reader_of(self.path, self.image_root, self.rephrase_root)

    @cached_property
    def pool_reader(self) -> ImageReader:
        """Reader of the pool's pictures: of `pool`, else of `pictures`, else of the records."""
        if self.pool is None:
            return self.reader if self.pictures is None else ImageReader(self.pictures, **self._limits)
        image_root = self.pool_image_root or self.image_root
        rephrase_root = self.pool_rephrase_root or self.pool_image_root or self.rephrase_root
        return self._reader_of(self.pool, image_root, rephrase_root)

    @property
    def _limits(self) -> dict[str, Any]:
        return {"max_pixels": self.max_pixels, "max_bytes": self.max_bytes}

    def _reader_of(self, path: str, image_root: str | None, rephrase_root: str | None) -> ImageReader:
        return ImageReader.for_records(path, image_root, rephrase_root, **self._limits)

    def identity(self) -> dict[str, str]:
        """Path, size and modification time of each input, to detect changes. Raises InputError if a file is missing."""
        files = {"data.path": self.path, "data.pool": self.pool}
        files |= {f"commit.add {number}": path for number, path in enumerate(self.added)}
        found = {name: identity_of(path, name.partition(" ")[0]) for name, path in files.items() if path is not None}
        if self.pictures is not None:
            found["data.pictures"] = _folder_identity(self.pictures, "data.pictures")
        return found


def resolve(data: DataConfig, out: Path | str, rephrases: int = 1) -> Sources:
    """Resolves the inputs. The embedded benchmark, if chosen, is written beside `out` unless it exists.

    Args:
        out: Path or address, credentials included.
        rephrases: Number of supervising rephrases in the embedded benchmark, `supervision.rephrases`.

    Raises:
        InputError: There is no such file of records, or its pictures need a root.
        OSError: The benchmark cannot be written.
    """
    path = absolute(data.path)
    roots = {name: absolute(value) if (value := getattr(data, name)) else None for name in _ROOTS}
    if data.split is not None:
        embedded = _embedded(data.path, out, rephrases)
        path = embedded["path"]
        roots |= {"image_root": embedded["image_root"], "rephrase_root": embedded["rephrase_root"]}
        if roots["pool"] is None and roots["pictures"] is None:
            roots["pool"] = embedded["pool"]
    else:
        roots["image_root"] = root_of(path, roots["image_root"], data.columns, data.task)
    if data.pool is not None and embedded_split(data.pool)[0] is not None:
        embedded = _embedded(data.pool, out, rephrases)
        roots |= {
            "pool": embedded["path"],
            "pool_image_root": embedded["image_root"],
            "pool_rephrase_root": embedded["rephrase_root"],
        }
    limits = {"max_pixels": data.max_pixels, "max_bytes": data.max_bytes}
    return Sources(path, **roots, **limits, columns=dict(data.columns))  # type: ignore[arg-type]


def _embedded(text: str, out: Path | str, rephrases: int) -> dict[str, str]:
    """Files of a split of the embedded benchmark, which is written unless it exists."""
    split, seed = embedded_split(text)
    folder = below(above(absolute(str(out))), embedded_name(int(seed), rephrases))
    build_embedded(folder, int(seed), rephrases)
    return {
        "path": below(folder, f"{split}.json"),
        "image_root": below(folder, "images"),
        "rephrase_root": below(folder, "images_rephrase"),
        "pool": below(folder, "train.json"),
    }


def out_of_dry_run(data: DataConfig, out: str, aside: str, rephrases: int = 1) -> str:
    """The `out` that a dry run passes to `resolve`, which may write the embedded benchmark beside it.

    Returns:
        `out` itself if nothing would be written, else a path below the temporary folder `aside`.
    """
    seeds = [int(seed) for split, seed in map(embedded_split, (data.path, data.pool or "")) if split is not None]
    folders = [at(below(above(absolute(out)), embedded_name(seed, rephrases))) for seed in seeds]
    return out if all((folder / _WRITTEN_LAST).exists() for folder in folders) else f"{aside}/out"


def check_apart(data: DataConfig, out: Location) -> None:
    """Raises InputError if `out` lies in a data folder, where results would be mixed with the data.

    A data folder that contains the current folder is exempt: a project may keep its pictures at its top.
    """
    if data.split is not None or not out.is_local or Workspace(out).run.exists():
        return
    target, current = os.path.realpath(out), os.path.realpath(os.getcwd())
    for name in ("path", *_ROOTS):
        text = getattr(data, name)
        if text is None or "://" in text:
            continue
        folder = os.path.realpath(absolute(text))
        if os.path.isdir(folder) and _is_below(target, folder) and not _is_below(current, folder):
            raise InputError(
                f"out: {str(out)!r} lies in data.{name} ({folder!r}), whose files are not to be mixed with results. "
                "Choose a folder elsewhere (out=...)."
            )


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def embedded_name(seed: int = 0, rephrases: int = 1) -> str:
    """Name of the benchmark's folder, with the version of its content."""
    name = f"world{WORLD or ''}-{world.BENCHMARK_VERSION}" + (f"-seed{seed}" if seed else "")
    return name + (f"-rephrases{rephrases}" if rephrases > 1 else "")


def build_embedded(target: LocationLike, seed: int = 0, rephrases: int = 1) -> None:
    """Writes the benchmark to a folder or address unless it exists. Safe when two runs start at once."""
    location = at(target, "out")
    if location.is_local:
        _build_local(Path(location), seed, rephrases)
    elif not (location / _WRITTEN_LAST).exists():
        with tempfile.TemporaryDirectory() as folder:
            world.build(folder, seed, rephrases)
            copy_folder(Path(folder), location, _WRITTEN_LAST)


def _build_local(folder: Path, seed: int, rephrases: int) -> None:
    if folder.is_dir():
        return
    try:
        with folder_written_atomically(folder) as temporary:
            kept = _kept(seed, rephrases)
            if kept is None:
                world.build(temporary, seed, rephrases)
            else:
                # Copies, not links: a user may change a picture of the run's benchmark.
                shutil.copytree(kept, temporary, dirs_exist_ok=True, copy_function=shutil.copyfile)
                if not _is_whole(temporary):  # someone has deleted files of the cache
                    world.build(temporary, seed, rephrases)
    except OSError:
        if not folder.is_dir():  # otherwise another run has just written the same content
            raise


def _is_whole(folder: Path) -> bool:
    """Whether a benchmark has every picture that its records name."""
    for file in folder.glob("*.json"):
        for record in json.loads(file.read_text(encoding="utf-8")):
            if not (folder / "images" / record["image"]).is_file():
                return False
    return (folder / _WRITTEN_LAST).is_file()


def _kept(seed: int, rephrases: int) -> Path | None:
    """The benchmark in the user's cache, drawn by the first run that needs it; None if the cache cannot be written."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(given if os.path.isabs(given) else "~/.cache").expanduser() / "odedit"
    folder = cache / embedded_name(seed, rephrases)
    try:
        if not folder.is_dir():
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with folder_written_atomically(folder) as temporary:
                world.build(temporary, seed, rephrases)
    except (OSError, RuntimeError):  # no home folder, a full or read-only disk, another run that has just written it
        return folder if folder.is_dir() else None
    return folder


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """The section with full paths, valid in any current folder. The embedded benchmark keeps its name."""
    given = {name: value for name in ("path", *_ROOTS) if (value := getattr(data, name)) is not None}
    paths: dict[str, Any] = {name: absolute(value) for name, value in given.items() if embedded_split(value)[0] is None}
    return replace(data, **paths)


def absolute(text: str) -> str:
    """The full path of a path; an address unchanged."""
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def identity_of(path: str, setting: str) -> str:
    """Path, size and modification time of an input. Raises InputError if it is missing."""
    location = locate(path, setting)
    try:
        info = location.info()
        if location.is_local and info.type == FileType.Directory:
            info = location.child(MANIFEST).info()
            if info.type == FileType.NotFound and shards(location):
                return _folder_identity(path, setting, 0)
    except OSError as error:
        raise InputError(f"{setting}: cannot look at {masked(path)!r} ({masked(str(error))}).") from error
    if info.type == FileType.NotFound:
        raise InputError(
            f"{setting}: there is no file {masked(path)!r}, and no packed folder of that name.{relative_note(path)}"
        )
    return f"{path} ({info.size} bytes, modified {info.mtime_ns})"


def _folder_identity(path: str, setting: str, depth: int | None = None) -> str:
    """Path of a folder, number of its files, and a digest of their names, sizes and times.

    Args:
        depth: 0 leaves out the folders below it; None: all of them count.
    """
    location = locate(path, setting)
    try:
        infos = location.filesystem.get_file_info(FileSelector(location.path, recursive=depth is None))
    except OSError as error:
        raise InputError(
            f"{setting}: the folder {masked(path)!r} cannot be read ({masked(str(error))}).{relative_note(path)}"
        ) from error
    files = sorted(f"{info.path} {info.size} {info.mtime_ns}" for info in infos if info.type == FileType.File)
    digest = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{path} ({len(files)} files, {digest})"
