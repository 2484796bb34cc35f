"""Fingerprints: earlier forms remain valid, and a machine hashes weights once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from odedit import InputError
from odedit.backbones import fingerprint
from odedit.backbones.common import weight_files
from odedit.backbones.common.fingerprints import Fingerprint, earlier_fingerprint
from odedit.editing.files import EditInfo, load_edits, save_edit
from odedit.editors.common.weights import load_weights, save_weights
from odedit.storage import disk_cache
from odedit.training.state import TrainingState, read_state, write_state
from tests.support import tiny_models


def test_the_earlier_form_is_what_earlier_versions_wrote(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(bytes(range(256)) * 2000)
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    settings = {"x": 1, "_name_or_path": "q", "y": {"z": [1, 2]}}
    assert earlier_fingerprint(tmp_path, settings) == "c52ca133dd08a279"
    assert earlier_fingerprint(tmp_path, {"x": 1, "_n": 2}, "someone/model") == "9c03d40130e097cb"


def test_files_of_earlier_versions_go_on_being_usable(backbone, tmp_path):
    now = backbone.fingerprint
    then = now.in_form_of("0" * 16)
    assert len(then) == 16 and now.in_form_of("0" * 24) == now == fingerprint("blip2", "embedded")
    params = {"layers.-1.ffn.in": torch.zeros(1, 512, 128)}
    save_edit(tmp_path / "edit.safetensors", params, EditInfo("e", "ftl", {}, "blip2", "embedded", then, "mmedit"))
    assert load_edits([tmp_path / "edit.safetensors"], backbone)[2][0].fingerprint == then
    path = str(tmp_path / "weights.safetensors")
    save_weights(path, {"a": torch.ones(1)}, "mend", {}, then)
    assert load_weights(path, "mend", {}, now)["a"] == 1
    state = TrainingState.of({"a": torch.ones(1)})
    write_state(tmp_path / "state.safetensors", state, {"backbone.weights": then})
    assert read_state(tmp_path / "state.safetensors", {"backbone.weights": now}).step == 0
    other = Fingerprint("1" * 24, lambda: "1" * 16)
    with pytest.raises(InputError, match=f"backbone.weights: was {then!r}, now {other.in_form_of(then)!r}"):
        read_state(tmp_path / "state.safetensors", {"backbone.weights": other})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A weight file, with an empty folder of notes."""
    monkeypatch.setattr(disk_cache, "folder", lambda: tmp_path / "notes")
    weight_files._contents.cache_clear()
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([float("nan")]), "c": torch.ones(2).int()}, path)
    return [path]


def as_in_a_new_process(files: list[Path]) -> dict[str, weight_files.Content]:
    weight_files._contents.cache_clear()
    return dict(weight_files.read_contents(files))


def test_a_second_process_reads_notes_instead_of_weights(files, tmp_path, monkeypatch):
    first = as_in_a_new_process(files)
    assert {name: content.largest for name, content in first.items()} == {"a": 3.0, "b": float("inf"), "c": 0.0}
    notes = tmp_path / "notes"
    assert notes.stat().st_mode & 0o777 == 0o700 and len(list(notes.glob("*.json"))) == 1

    def hashed(*_: object) -> None:
        raise AssertionError("the weights were read again")

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "_block", hashed)
        assert as_in_a_new_process(files) == first
    save_file({"a": torch.tensor([1.0, -4.0])}, files[0])
    assert as_in_a_new_process(files)["a"].largest == 4.0


@pytest.mark.parametrize("damage", ["", "[]", '{"key": 1}', "of another file", "without a tensor"])
def test_damaged_notes_are_replaced(damage, files, tmp_path):
    first = as_in_a_new_process(files)
    note = next((tmp_path / "notes").glob("*.json"))
    kept = note.read_text()
    values = json.loads(kept)
    values["key" if "file" in damage else "value"] = {"a": values["value"]["a"]}
    note.write_text(json.dumps(values) if damage.startswith(("of", "without")) else damage)
    assert as_in_a_new_process(files) == first and json.loads(note.read_text()) == json.loads(kept)


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_is_not_the_users_own_is_not_used(kind, files, tmp_path):
    notes, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "open to others":
        notes.mkdir()
        notes.chmod(0o777)
    elif kind == "a link":
        notes.symlink_to(elsewhere)
    else:
        notes.touch()
    assert as_in_a_new_process(files)["a"].largest == 3.0
    assert not list(elsewhere.iterdir()) and (kind != "open to others" or not list(notes.iterdir()))


@pytest.mark.parametrize(
    ("dtype", "stored", "value", "fits"),
    [
        ("float16", torch.float32, 65519.0, True),
        ("float16", torch.float32, 65520.0, False),
        ("float16", torch.bfloat16, 65536.0, False),
        ("float16", torch.float64, 65519.0, True),
        ("bfloat16", torch.float32, 3.3961e38, True),
        ("bfloat16", torch.float32, 3.4e38, False),
        ("float32", torch.float64, 1e39, False),
    ],
)
def test_a_value_is_too_large_if_it_becomes_infinite(dtype, stored, value, fits, tmp_path):
    assert torch.tensor([value], dtype=stored).to(getattr(torch, dtype)).isfinite().all() == fits
    folder = tiny_models.write("llava", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(stored)
    tensors[name].view(-1)[-1] = -value
    save_file(tensors, folder / "model.safetensors")
    if fits:
        assert fingerprint("llava", str(folder), dtype=dtype)
    else:
        with pytest.raises(InputError, match=rf"1 tensor \(first: .*\) with values beyond {dtype}"):
            fingerprint("llava", str(folder), dtype=dtype)
