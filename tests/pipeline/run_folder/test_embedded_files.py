"""The embedded benchmark is drawn once per machine; every folder of runs has files of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from odedit import world
from pipeline.run_folder import sources


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """Seeds and rephrases of the benchmarks that were drawn, each a single file."""
    calls: list[tuple[int, int]] = []

    def build(directory: Path, seed: int = 0, rephrases: int = 1) -> None:
        calls.append((seed, rephrases))
        (Path(directory) / "train.json").write_text(f"{seed} {rephrases}")

    monkeypatch.setattr(world, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_a_benchmark_is_drawn_once_and_copied(tmp_path: Path, drawn: list[tuple[int, int]]) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1), ("one", 0)):
        sources.build_embedded(tmp_path / name, seed)
    assert drawn == [(0, 1), (1, 1)]
    (tmp_path / "one" / "train.json").write_text("changed by its owner")
    sources.build_embedded(tmp_path / "three")
    assert (tmp_path / "two" / "train.json").read_text() == (tmp_path / "three" / "train.json").read_text() == "0 1"
    assert (tmp_path / "other" / "train.json").read_text() == "1 1"
    assert (tmp_path / "cache" / "odedit").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_left_out(
    tmp_path: Path, drawn: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for name in ("one", "two"):
        sources.build_embedded(tmp_path / name)
        assert (tmp_path / name / "train.json").read_text() == "0 1"
    assert drawn == [(0, 1), (0, 1)]
