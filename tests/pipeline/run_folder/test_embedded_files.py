"""The embedded benchmark is drawn once per machine; every folder of runs has files of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from odedit import world
from pipeline.run_folder import sources


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """Seeds and rephrases of the benchmarks that were drawn, each with a single picture."""
    calls: list[tuple[int, int]] = []

    def build(directory: Path, seed: int = 0, rephrases: int = 1) -> None:
        calls.append((seed, rephrases))
        (Path(directory) / "images").mkdir(exist_ok=True)
        (Path(directory) / "images" / "1.png").write_text("a picture")
        for name in ("train", "validation", "evaluation"):
            (Path(directory) / f"{name}.json").write_text(
                json.dumps([{"image": "1.png", "alt": f"{seed} {rephrases}"}])
            )

    monkeypatch.setattr(world, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def answer_in(folder: Path) -> str:
    (record,) = json.loads((folder / "train.json").read_text())
    return str(record["alt"])


def test_a_benchmark_is_drawn_once_and_copied(tmp_path: Path, drawn: list[tuple[int, int]]) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1), ("one", 0)):
        sources.build_embedded(tmp_path / name, seed)
    assert drawn == [(0, 1), (1, 1)]
    (tmp_path / "one" / "train.json").write_text("changed by its owner")
    sources.build_embedded(tmp_path / "three")
    assert answer_in(tmp_path / "two") == answer_in(tmp_path / "three") == "0 1"
    assert answer_in(tmp_path / "other") == "1 1"
    assert (tmp_path / "cache" / "odedit").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_left_out(
    tmp_path: Path, drawn: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for name in ("one", "two"):
        sources.build_embedded(tmp_path / name)
        assert answer_in(tmp_path / name) == "0 1"
    assert drawn == [(0, 1), (0, 1)]


def test_a_benchmark_whose_cache_lacks_a_picture_is_drawn_again(tmp_path: Path, drawn: list[tuple[int, int]]) -> None:
    sources.build_embedded(tmp_path / "one")
    (picture,) = (tmp_path / "cache" / "odedit").glob("*/images/1.png")
    picture.unlink()
    sources.build_embedded(tmp_path / "two")
    assert (tmp_path / "two" / "images" / "1.png").is_file()
