"""Hub ids: a cached copy is the same model as a folder of its files, and an unreachable hub is reported at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import load_file, save_file

from odedit import InputError, load_backbone
from odedit.backbones import fingerprint, inspect_backbone, load_processor
from odedit.backbones.common.hub import snapshot, snapshot_with_weights
from tests.support import tiny_models

HUB_ID = "made-up/tiny-llava"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.write("llava", tmp_path / "folder")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the future folder of its only version."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot.cache_clear()
    snapshot_with_weights.cache_clear()
    model = tmp_path / "cache" / "models--made-up--tiny-llava"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    return model / "snapshots" / ("0" * 40)


def unreachable(calls: list[str]):
    def model_info(self, hub_id, **_):
        calls.append(hub_id)
        raise ConnectionError("no route to host")

    return model_info


def test_a_model_in_the_cache_is_the_folders(folder, cache, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", unreachable([]))
    shutil.copytree(folder, cache)
    assert fingerprint("llava", HUB_ID) == fingerprint("llava", str(folder))
    model = load_backbone("llava", HUB_ID)
    assert model.checkpoint == HUB_ID and model.fingerprint == fingerprint("llava", str(folder))
    tensors = load_file(cache / "model.safetensors")
    tensors["language_model.lm_head.weight"][-1, -1] += 1
    save_file(tensors, cache / "model.safetensors")
    assert fingerprint("llava", HUB_ID) != fingerprint("llava", str(folder))


def test_a_silent_hub_is_asked_once_and_local_folders_are_named(cache, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(HfApi, "model_info", unreachable(calls))
    expected = rf"{HUB_ID}.* does not answer \(no route to host\).*local folder .*backbone.checkpoint=/path"
    with pytest.raises(InputError, match=expected):
        inspect_backbone("llava", HUB_ID)
    assert calls == [HUB_ID]


def test_the_hub_is_not_asked_where_the_user_says_so(folder, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"is not asked \(HF_HUB_OFFLINE is set\).*local folder"):
        inspect_backbone("llava", HUB_ID)
    shutil.copytree(folder, cache)
    (cache / "model.safetensors").rename(cache / "elsewhere")
    with pytest.raises(InputError, match="the local cache lacks some of the model's files"):
        inspect_backbone("llava", HUB_ID)
    (cache / "elsewhere").rename(cache / "model.safetensors")
    assert inspect_backbone("llava", HUB_ID).num_layers == 2


def test_a_name_that_the_hub_does_not_have_is_said(cache, monkeypatch):
    def model_info(self, hub_id, **_):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(InputError, match="has no such model, or a private one. Check the name, set HF_TOKEN"):
        inspect_backbone("llava", HUB_ID)


def test_a_name_that_is_no_hub_id_is_said(cache):
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        inspect_backbone("llava", "so many/wörds --")


class Hub:
    """A hub whose newest version has the files of a folder.

    Attributes:
        fetched: Names of the files that were downloaded.
    """

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commit, self.fetched = "1" * 40, []

        def listed(api, *_, **__):
            for path in folder.iterdir():
                yield RepoFile(path=path.name, size=path.stat().st_size, oid="0" * 40, type="file")

        def download(repo_id: str, filename: str, revision: str, **_: object) -> str:
            self.fetched.append(filename)
            target = cache.parent / revision / filename
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / filename, target)
            return str(target)

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=self.commit))
        monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha=self.commit))
        monkeypatch.setattr(HfApi, "list_repo_tree", listed)
        monkeypatch.setattr("huggingface_hub._snapshot_download.hf_hub_download", download)


def forget() -> None:
    """Clears what a process remembers of the hub."""
    snapshot.cache_clear()
    snapshot_with_weights.cache_clear()


@pytest.mark.parametrize("in_shards", [False, True])
def test_what_was_downloaded_is_found_again_without_the_hub(in_shards, folder, cache, monkeypatch):
    if in_shards:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / "part-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part-1.safetensors")})
        )
    (folder / "pytorch_model.bin").touch()
    hub = Hub(folder, cache, monkeypatch)
    load_processor("llava", HUB_ID)
    weights = {"part-1.safetensors" if in_shards else "model.safetensors"}
    assert "tokenizer.json" in hub.fetched and not weights & {*hub.fetched}, "a processor needs no weights"
    named = fingerprint("llava", HUB_ID)
    assert weights <= {*hub.fetched} and "pytorch_model.bin" not in hub.fetched
    assert named == fingerprint("llava", str(folder))
    forget()
    monkeypatch.setattr(HfApi, "model_info", unreachable([]))
    assert fingerprint("llava", HUB_ID) == named
    assert snapshot(HUB_ID).name == hub.commit


def test_a_newer_version_replaces_the_one_in_the_cache_also_offline(folder, cache, monkeypatch):
    shutil.copytree(folder, cache)
    hub = Hub(tiny_models.write("llava", folder.parent / "newer", seed=1), cache, monkeypatch)
    newer = fingerprint("llava", HUB_ID)
    assert newer == fingerprint("llava", str(folder.parent / "newer")) != fingerprint("llava", str(folder))
    hub.commit = "2" * 40
    assert snapshot_with_weights(HUB_ID).name == "1" * 40, "a process keeps its version"
    forget()
    monkeypatch.setattr(HfApi, "model_info", unreachable([]))
    assert fingerprint("llava", HUB_ID) == newer


@pytest.mark.parametrize("name", ["../other.safetensors", "*", "part.bin"])
def test_an_index_names_files_of_its_own_folder_alone(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="not a safetensors file in its own folder"):
        inspect_backbone("llava", str(folder))
