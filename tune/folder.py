"""The folder of a search: its files, the search that it belongs to, and the lock of the process that runs it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from odedit.errors import InputError
from odedit.runtime.addresses import below, masked
from odedit.storage.location import Location, delete_all, locate
from pipeline.config.run import read_yaml
from pipeline.config.values import flatten, masked_values
from pipeline.config.version import code_version
from pipeline.run_folder import lock, sources
from pipeline.run_folder.workspace import CONFIG_HEADER, check_access, read_json, write_json
from tune.config import Search, SearchConfig, from_values, override

STATE, CONFIG, JOURNAL = "search.json", "search.yaml", "optuna.journal"
_BEFORE_IT_BEGINS = {lock.LOCK, "trials", "validation", "evaluation"}
"""Entries of a folder whose search ended before its records were staged."""
BEFORE_THE_FIRST_TRIAL = {*_BEFORE_IT_BEGINS, STATE, CONFIG, JOURNAL}
"""Entries that are deleted if the search ends before its first trial."""
TUNE_FOLDER = ".tune-"
"""Prefix of the folders that hold Tune's state while a search runs."""


@dataclass(frozen=True)
class Folder:
    """Files of a search."""

    address: str
    """Absolute path or address."""

    @classmethod
    def of(cls, out: Path | str) -> Folder:
        """The folder with an absolute path or address."""
        return cls(sources.absolute(str(out)))

    @cached_property
    def out(self) -> Location:
        return locate(self.address, "--out")

    def run_out(self, name: str) -> str:
        """`out` of a final run."""
        return below(self.address, f"evaluation/{name}")

    @property
    def state(self) -> dict[str, Any]:
        """State of the search, for resuming it; empty if there is none."""
        state = read_json(self.out / STATE)
        return state if isinstance(state, dict) and "search_id" in state else {}

    @property
    def validation(self) -> Location:
        return self.out / "validation"

    @property
    def evaluation(self) -> Location:
        return self.out / "evaluation"

    def update(self, **values: Any) -> None:
        write_json(self.out / STATE, self.state | values)


def resumed(address: str, overrides: list[str]) -> SearchConfig:
    """The configuration of the search in a folder.

    Raises:
        InputError: There is none, or it had passwords, which are not kept.
    """
    folder = Folder.of(address).out
    state = Folder.of(address).state
    if not state:
        raise InputError(f"--resume: {folder} holds no search; expected the folder that `odedit tune` wrote.")
    if state.get("had_secrets"):
        raise InputError(f"--resume: the passwords of {folder / CONFIG} were not kept; add --config with the file.")
    values = read_yaml(folder / CONFIG)
    for text in overrides:
        override(values, text)
    return from_values(values)


def check_folder(search: Search, folder: Folder, *, resume: bool) -> None:
    """Raises InputError if `out` belongs to something else, or cannot hold a search."""
    out = folder.out
    if not out.is_local and search.config.storage is None:
        raise InputError(
            f"storage: has to be given where a search is kept at an address ({out}): Optuna writes to a database, such "
            "as postgresql+psycopg://user@host/name, or to a file on this machine."
        )
    check_access(out, "--out")
    state = folder.state
    if resume and not state:
        raise InputError(f"--resume: {out} holds no search; expected the folder that `odedit tune` wrote.")
    if out.is_file():
        raise InputError(f"--out: {out} is a file. Choose a folder.")
    if not state and set(out.names()) - _BEFORE_IT_BEGINS:
        raise InputError(f"--out: {out} is not empty and holds no search. Choose another folder.")
    if state and not _is_replaced(search, folder, resume=resume):
        then, now = (flatten(values) for values in (state["identity"], _identity(search)))
        changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if changed:
            lines = "\n".join(f"  {name}: was {then.get(name)!r}, now {now.get(name)!r}" for name in changed)
            raise InputError(f"{'--resume' if resume else '--out'}: {out} holds another search:\n{lines}\n"
                             "Choose another folder, or give that search's configuration.")  # fmt: skip


def clear_folder(search: Search, folder: Folder, *, resume: bool) -> None:
    """Deletes what a search left that had no trial yet and is not resumed. The caller holds the lock (`alone`).

    Raises:
        InputError: See `check_folder`; another search may have begun since that check, which held no lock.
    """
    check_folder(search, folder, resume=resume)
    if _is_replaced(search, folder, resume=resume):
        (folder.out / STATE).delete()
    if not folder.state:
        delete_all(folder.validation.glob())


def _is_replaced(search: Search, folder: Folder, *, resume: bool) -> bool:
    """Whether the folder's search has other settings and no trial, so that this one may replace it."""
    state = folder.state
    return bool(state) and not resume and not (folder.out / "trials").names() and state["identity"] != _identity(search)


def _identity(search: Search) -> dict[str, Any]:
    values = masked_values(search.config.to_dict() | search.config.identity())
    return {name: values[name] for name in search.config.identity()}


@contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """Holds the lock of the search inside the block. Raises InputError if another process holds it."""
    with lock.alone(folder.out, "--out", "the search in"):
        for left in folder.out.glob(f"{TUNE_FOLDER}*"):  # left by a killed driver
            remove_folder(left)
        yield


def remove_folder(folder: Location) -> None:
    """Deletes a folder of Tune's state; errors are ignored."""
    with suppress(OSError):
        folder.filesystem.delete_dir(folder.path)


def remember(search: Search, folder: Folder, records: sources.Sources) -> None:
    """Writes the state and settings of the search. Raises InputError if its record files have changed."""
    state, inputs = folder.state, {name: masked(text) for name, text in records.identity().items()}
    for name, then in state.get("inputs", {}).items():
        if inputs.get(name) != then:
            raise InputError(f"validation: {name} was {then}, and is {inputs.get(name)} now. Choose another folder.")
    text = yaml.safe_dump(search.config.to_dict(), sort_keys=False, allow_unicode=True)
    public = yaml.safe_dump(masked_values(search.config.to_dict()), sort_keys=False, allow_unicode=True)
    search_id = state.get("search_id") or uuid.uuid4().hex
    folder.update(
        search_id=search_id,
        study=state.get("study") or f"{folder.out.name}-{search_id[:8]}",
        identity=_identity(search),
        inputs=inputs,
        had_secrets=text != public,
        code=state.get("code") or code_version(),
    )
    (folder.out / CONFIG).write_text(f"{CONFIG_HEADER} {code_version()}\n{public}")
