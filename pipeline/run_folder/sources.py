"""Where a run's records and pictures are; the embedded benchmark is written to disk when a run asks for it."""

from __future__ import annotations

import hashlib
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
from odedit.storage.location import Location, Place, at, copy_folder, locate
from odedit.world.facts import WORLD
from pipeline.config.run import DataConfig
from pipeline.run_folder.workspace import Workspace

_ROOTS = ("image_root", "rephrase_root", "pool")
_WRITTEN_LAST = "evaluation.json"


@dataclass(frozen=True)
class Sources:
    """Absolute paths and addresses, so that workers find them from wherever they run."""

    path: str
    image_root: str | None
    rephrase_root: str | None
    pool: str | None
    max_pixels: int
    max_bytes: int

    @cached_property
    def reader(self) -> ImageReader:
        """Opens the pictures of the records."""
        return self._reader_of(self.path)

    @cached_property
    def pool_reader(self) -> ImageReader:
        """Opens the pictures of the pool."""
        return self._reader_of(self.pool or self.path)

    def _reader_of(self, path: str) -> ImageReader:
        return ImageReader.for_records(
            path, self.image_root, self.rephrase_root, max_pixels=self.max_pixels, max_bytes=self.max_bytes
        )

    def identity(self) -> dict[str, str]:
        """What tells whether the inputs are still the same files. Raises InputError if one is not there."""
        files = {"data.path": self.path, "data.pool": self.pool}
        return {name: _identity(path, name) for name, path in files.items() if path is not None}


def resolve(data: DataConfig, out: Path | str) -> Sources:
    """Finds the inputs, writing the embedded benchmark beside `out` if it is asked for and not there yet.

    Args:
        out: Path or address, with what is secret in it.

    Raises:
        OSError: The benchmark cannot be written.
    """
    if data.split is None:
        return Sources(
            path=absolute(data.path),
            image_root=absolute(data.image_root) if data.image_root else None,
            rephrase_root=absolute(data.rephrase_root) if data.rephrase_root else None,
            pool=absolute(data.pool) if data.pool else None,
            max_pixels=data.max_pixels,
            max_bytes=data.max_bytes,
        )
    folder = below(above(absolute(str(out))), embedded_name(data.split_seed))
    build_embedded(folder, data.split_seed)
    return Sources(
        path=below(folder, f"{data.split}.json"),
        image_root=below(folder, "images"),
        rephrase_root=below(folder, "images_rephrase"),
        pool=absolute(data.pool) if data.pool else below(folder, "train.json"),
        max_pixels=data.max_pixels,
        max_bytes=data.max_bytes,
    )


def place_of_embedded(data: DataConfig, out: str, aside: str) -> str:
    """The `out` to give to `resolve` in a dry run.

    It is the run's own if the embedded benchmark is already beside it, else one below `aside`.
    """
    if data.split is None:
        return out
    folder = at(below(above(absolute(out)), embedded_name(data.split_seed)))
    return out if (folder / _WRITTEN_LAST).exists() else f"{aside}/out"


def check_apart(data: DataConfig, out: Location) -> None:
    """Raises InputError if a new run would be written among the data, where it would be read, packed or sent with it.

    Exempt: a data folder that contains the current folder, since a project may keep its pictures at its top.
    """
    if data.split is not None or not out.is_local or Workspace(out).run.exists():
        return
    place, here = os.path.realpath(out), os.path.realpath(os.getcwd())
    for name in ("path", *_ROOTS):
        text = getattr(data, name)
        if text is None or "://" in text:
            continue
        folder = os.path.realpath(absolute(text))
        if os.path.isdir(folder) and _is_below(place, folder) and not _is_below(here, folder):
            raise InputError(
                f"out: {str(out)!r} lies in data.{name} ({folder!r}), whose files are not to be mixed with results. "
                "Choose a folder elsewhere (out=...)."
            )


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def embedded_name(seed: int = 0) -> str:
    """What the benchmark's folder is called; another version of the code that draws it has another folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(world.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return f"world{WORLD or ''}-{digest.hexdigest()[:8]}" + (f"-seed{seed}" if seed else "")


def build_embedded(place: Place, seed: int = 0) -> None:
    """Writes the benchmark unless it is there; two runs that start at once do not disturb each other."""
    location = at(place, "out")
    if location.is_local:
        _build_local(Path(location), seed)
    elif not (location / _WRITTEN_LAST).exists():
        with tempfile.TemporaryDirectory() as folder:
            world.build(folder, seed)
            copy_folder(Path(folder), location, _WRITTEN_LAST)


def _build_local(folder: Path, seed: int) -> None:
    if folder.is_dir():
        return
    try:
        with folder_written_atomically(folder) as temporary:
            world.build(temporary, seed)
    except OSError:
        if not folder.is_dir():  # else another run was faster, with the same content
            raise


def with_absolute_paths(data: DataConfig) -> DataConfig:
    """Full paths, for a configuration that is read somewhere else; the embedded benchmark keeps its name."""
    names = _ROOTS if data.split is not None else ("path", *_ROOTS)
    found: dict[str, Any] = {name: absolute(value) for name in names if (value := getattr(data, name)) is not None}
    return replace(data, **found)


def absolute(text: str) -> str:
    """The full path, or the address as it is."""
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))


def _identity(path: str, setting: str) -> str:
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
