"""Locations of a run's records and pictures. The embedded benchmark is written to disk on demand."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow.fs import FileType

from odedit import world
from odedit.data.images import ImageReader
from odedit.errors import InputError
from odedit.runtime.addresses import above, below, masked, relative_note
from odedit.storage.atomic import folder_written_atomically
from odedit.storage.location import Location, LocationLike, at, copy_folder, locate
from odedit.world.facts import WORLD
from pipeline.config.run import DataConfig
from pipeline.run_folder.workspace import Workspace

_ROOTS = ("image_root", "rephrase_root", "pool")
_WRITTEN_LAST = "evaluation.json"


@dataclass(frozen=True)
class Sources:
    """Absolute paths and addresses of the inputs, valid on every worker."""

    path: str
    image_root: str | None
    rephrase_root: str | None
    pool: str | None
    max_pixels: int
    max_bytes: int

    @cached_property
    def reader(self) -> ImageReader:
        """Reader of the records' pictures."""
        return self._reader_of(self.path)

    @cached_property
    def pool_reader(self) -> ImageReader:
        """Reader of the pool's pictures."""
        return self._reader_of(self.pool or self.path)

    def _reader_of(self, path: str) -> ImageReader:
        return ImageReader.for_records(
            path, self.image_root, self.rephrase_root, max_pixels=self.max_pixels, max_bytes=self.max_bytes
        )

    def identity(self) -> dict[str, str]:
        """Path, size and modification time of each input, to detect changes. Raises InputError if a file is missing."""
        files = {"data.path": self.path, "data.pool": self.pool}
        return {name: identity_of(path, name) for name, path in files.items() if path is not None}


def resolve(data: DataConfig, out: Path | str, rephrases: int = 1) -> Sources:
    """Resolves the inputs. The embedded benchmark, if chosen, is written beside `out` unless it exists.

    Args:
        out: Path or address, credentials included.
        rephrases: Number of supervising rephrases in the embedded benchmark, `supervision.rephrases`.

    Raises:
        OSError: The benchmark cannot be written.
    """
    path = absolute(data.path)
    others = {name: absolute(value) if (value := getattr(data, name)) else None for name in _ROOTS}
    if data.split is not None:
        folder = below(above(absolute(str(out))), embedded_name(data.split_seed, rephrases))
        build_embedded(folder, data.split_seed, rephrases)
        path = below(folder, f"{data.split}.json")
        others |= {
            "image_root": below(folder, "images"),
            "rephrase_root": below(folder, "images_rephrase"),
            "pool": others["pool"] or below(folder, "train.json"),
        }
    return Sources(path, **others, max_pixels=data.max_pixels, max_bytes=data.max_bytes)


def out_of_dry_run(data: DataConfig, out: str, aside: str, rephrases: int = 1) -> str:
    """The `out` that a dry run passes to `resolve`, which may write the embedded benchmark beside it.

    Returns:
        `out` itself if nothing would be written, else a path below the temporary folder `aside`.
    """
    if data.split is None:
        return out
    folder = at(below(above(absolute(out)), embedded_name(data.split_seed, rephrases)))
    return out if (folder / _WRITTEN_LAST).exists() else f"{aside}/out"


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
            world.build(temporary, seed, rephrases)
    except OSError:
        if not folder.is_dir():  # otherwise another run has just written the same content
            raise


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """The section with full paths, valid in any current folder. The embedded benchmark keeps its name."""
    names = _ROOTS if data.split is not None else ("path", *_ROOTS)
    paths: dict[str, Any] = {name: absolute(value) for name in names if (value := getattr(data, name)) is not None}
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
            info = location.child("pack.json").info()
    except OSError as error:
        raise InputError(f"{setting}: cannot look at {masked(path)!r} ({masked(str(error))}).") from error
    if info.type == FileType.NotFound:
        raise InputError(
            f"{setting}: there is no file {masked(path)!r}, and no packed folder of that name.{relative_note(path)}"
        )
    return f"{path} ({info.size} bytes, modified {info.mtime_ns})"
