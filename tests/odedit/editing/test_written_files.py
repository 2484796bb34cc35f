"""Files and folders written atomically, with the modes of the umask; and dataclasses that print in one line."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import odedit
import pipeline
import tune
from odedit import EditResult, InputError
from odedit.runtime.brief import brief
from odedit.storage.atomic import check_new, folder_written_atomically, new_folder, write_atomically
from odedit.storage.location import at
from odedit.storage.tensors import read_tensors, write_tensors
from tests.support.requests import make_request


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_modes_are_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    tensors = {"w": torch.arange(3.0)}
    write_tensors(at(tmp_path / "tensors"), tensors, {"a": "b"})
    write_atomically(tmp_path / "text", lambda path: path.write_text("text"))
    at(tmp_path / "once").write_once("text")
    with folder_written_atomically(tmp_path / "above" / "folder") as folder:
        (folder / "file").write_text("text")
    read, metadata = read_tensors(at(tmp_path / "tensors"))
    assert torch.equal(read["w"], tensors["w"]) and metadata == {"a": "b"}
    for path in tmp_path.rglob("*"):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "folder"
    with pytest.raises(OSError, match="disk full"), folder_written_atomically(target) as folder:
        (folder / "file").write_text("half")
        assert not target.exists()
        raise OSError("disk full")
    assert not list(tmp_path.iterdir()), "nor the folders above it"

    target.mkdir(parents=True)  # An empty folder may exist.
    with folder_written_atomically(target) as folder:
        (folder / "file").write_text("whole")
    assert [path.name for path in target.iterdir()] == ["file"]
    with pytest.raises(InputError, match="is there already"):
        check_new(target)
    with pytest.raises(OSError, match="not empty"), folder_written_atomically(target):
        pass
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_new_folder_is_removed_if_it_stays_empty(tmp_path: Path) -> None:
    for content in (None, "file"):
        with pytest.raises(ValueError, match="wrong"), new_folder(tmp_path / "a" / "b"):
            if content:
                (tmp_path / "a" / "b" / content).touch()
            raise ValueError("wrong")
        assert (tmp_path / "a").exists() == bool(content)
    with new_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_folder_is_removed_with_the_files_that_the_block_has_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    for stranger in (None, "notes.md"):
        with pytest.raises(ValueError, match="wrong"), new_folder(folder, {"records", "parts"}):
            (folder / "parts").mkdir()
            (folder / "parts" / "one").touch()
            (folder / "records").touch()
            if stranger:
                (folder / stranger).touch()
            raise ValueError("wrong")
        assert (tmp_path / "a").exists() == bool(stranger)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "parts", "records"]

    with pytest.raises(ValueError, match="wrong"), new_folder(folder, {"records", "state"}):
        (folder / "state").touch()
        raise ValueError("wrong")
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "parts", "records"], "what was there stays"


def test_a_folder_that_another_process_makes_first_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def late(self: Path, *arguments: Any, **options: Any) -> None:
        os.mkdir(self)  # the other process
        mkdir(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="wrong"):
        patch.setattr(Path, "mkdir", late)
        with new_folder(tmp_path / "a" / "b"):
            raise ValueError("wrong")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), new_folder(tmp_path / "file"):
        pass


def test_a_folder_may_be_named_by_a_link_but_not_be_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with folder_written_atomically(tmp_path / "link") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "file").read_text() == "whole"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="--out: . is there already"):
        check_new(Path("."))


def _dataclasses() -> Iterator[Any]:
    for package in (odedit, pipeline, tune):
        for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not entry.name.endswith("__main__"):
                module = importlib.import_module(entry.name)
                yield from (
                    value for value in vars(module).values() if inspect.isclass(value)
                    and value.__module__ == entry.name and is_dataclass(value)
                )  # fmt: skip


def test_every_dataclass_with_tensors_prints_in_one_line() -> None:
    large = ("Tensor", "ndarray", "EditParams")
    with_tensors = [
        cls for cls in _dataclasses() if any(part in str(field.type) for field in fields(cls) for part in large)
    ]
    assert len(with_tensors) > 10
    assert [cls.__name__ for cls in with_tensors if cls.__repr__ is not brief] == []

    result = EditResult("first", {"w": torch.zeros(1, 300, 20)}, 3, "converged", 0.5, {"rel": [0.5] * 90})
    assert repr(result) == (
        "EditResult(edit_id='first', params={'w': Tensor(1, 300, 20)}, steps=3, stop_reason='converged', seconds=0.5, "
        "curves={'rel': [90 values]}, error=None, delta={})"
    )
    assert "pixels=array(32, 32, 3)" in repr(make_request(0)) and len(repr(make_request(0))) < 4000
