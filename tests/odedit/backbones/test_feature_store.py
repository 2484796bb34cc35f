"""Cached and stored features equal computed ones, also with damaged files and failing storage."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from torch import Tensor

from odedit import InputError, load_backbone
from odedit.backbones import encode_requests
from odedit.backbones.common import feature_store
from odedit.backbones.common.feature_cache import made_with, with_feature_cache
from odedit.backbones.common.feature_store import FeatureStore
from odedit.storage.location import Location
from tests.support import tiny_models
from tests.support.requests import TEMPLATE, make_picture

PICTURES = [make_picture(number) for number in range(5)]
KEYS = [picture.key for picture in PICTURES]


class Counted:
    """Number of pictures in each call of a backbone's image tower."""

    def __init__(self, backbone, monkeypatch):
        self.calls = []
        original = backbone.tower
        monkeypatch.setattr(backbone, "tower", lambda pixels: self.calls.append(len(pixels)) or original(pixels))


def files_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def equal(one, other) -> bool:
    same = [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one.values(), other.values(), strict=True)]
    return list(one) == list(other) and all(same)


def close(one, other) -> bool:
    """Equal up to rounding, which on some processors depends on the number of pictures."""
    return list(one) == list(other) and all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def alone(model) -> dict[str, Tensor]:
    """Features of single pictures."""
    return {key: feature for picture in PICTURES for key, feature in model.image_features([picture]).items()}


def refuse(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def store(tmp_path):
    return FeatureStore.at(str(tmp_path / "store"), warn=refuse)


@pytest.mark.parametrize("before_connector", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_another_process_computed_is_read_bit_for_bit(store, tmp_path, monkeypatch, dtype, before_connector):
    model = load_backbone("blip2", "embedded", dtype=dtype)
    computed = model.image_features(PICTURES, before_connector)
    first = with_feature_cache(model, store).image_features(PICTURES, before_connector)
    counted = Counted(model, monkeypatch)
    again = with_feature_cache(model, store).image_features([*PICTURES[::-1], PICTURES[2]], before_connector)
    assert counted.calls == [] and len(files_of(tmp_path / "store")) == len(PICTURES)
    assert equal(first, computed) and equal({key: again[key] for key in KEYS}, computed)
    assert list(again) == KEYS[::-1]


def test_only_pictures_that_are_not_there_are_computed(backbone, store, monkeypatch):
    expected = backbone.image_features(PICTURES)
    with_feature_cache(backbone, store).image_features(PICTURES[1:3])
    counted = Counted(backbone, monkeypatch)
    assert equal(with_feature_cache(backbone, store).image_features(PICTURES), expected)
    assert counted.calls == [3]


def test_batches_with_a_store_are_those_without(backbone, batches, requests_8, store):
    for _ in range(2):
        model = with_feature_cache(backbone, store)
        for one, other in zip(encode_requests(model, requests_8, TEMPLATE), batches, strict=True):
            for item in fields(one):
                mine, theirs = getattr(one, item.name), getattr(other, item.name)
                assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, item.name


def test_in_memory_a_picture_is_computed_once_within_the_bytes(backbone, monkeypatch):
    expected = backbone.image_features(PICTURES)
    first_two = backbone.image_features(PICTURES[:2])
    counted = Counted(backbone, monkeypatch)
    size = next(iter(expected.values())).nbytes
    model = with_feature_cache(backbone, cache_bytes=2 * size)
    assert equal(model.image_features(PICTURES[:2]), first_two)
    model.image_features(PICTURES[1:3])
    assert counted.calls == [2, 1], "the second was remembered"
    assert close(model.image_features(PICTURES), expected)
    assert counted.calls == [2, 1, 3], "the first had to go"
    model.image_features(PICTURES[4:], before_connector=True)
    assert counted.calls[3:] == [1], "the other side of the connector is another feature"


def test_features_are_found_only_by_the_model_that_made_them(tmp_path, monkeypatch):
    """Weights, type, processor and side of the connector each change the files."""
    directory = tiny_models.write("llava", tmp_path / "a")
    other_weights = tiny_models.write("llava", tmp_path / "b", seed=1)
    other_processor = tiny_models.write("llava", tmp_path / "c")
    path = other_processor / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_mean": [0.4, 0.5, 0.6]}))
    models = [
        load_backbone("llava", str(directory)),
        load_backbone("llava", str(other_weights)),
        load_backbone("llava", str(other_processor)),
        load_backbone("llava", str(directory), dtype="bfloat16"),
    ]
    assert models[2].fingerprint == models[0].fingerprint, "weights alone do not tell a processor"
    store = FeatureStore.at(str(tmp_path / "store"), warn=refuse)
    for count, model in enumerate(models, start=1):
        assert equal(with_feature_cache(model, store).image_features(PICTURES), model.image_features(PICTURES))
        assert len(files_of(tmp_path / "store")) == count * len(PICTURES)
    with_feature_cache(models[0], store).image_features(PICTURES, before_connector=True)
    with_feature_cache(load_backbone("llava", str(directory)), store).image_features(PICTURES)
    assert len(files_of(tmp_path / "store")) == 5 * len(PICTURES), "the same model elsewhere finds its own"


def test_another_program_makes_other_features(backbone, store, tmp_path, monkeypatch):
    code = tmp_path / "decoding.py"
    known = [made_with(backbone)]
    code.write_text("# another way to read a picture\n")
    with monkeypatch.context() as patch:
        patch.setattr("odedit.data.decoding.__file__", str(code))
        known.append(made_with(backbone))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "0")
        known.append(made_with(backbone))
    assert known[0] not in known[1:] and made_with(backbone) == known[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, _: b"",
        lambda data, _: data[:5],
        lambda data, _: data[:60],
        lambda data, _: data[:-1],
        lambda data, _: data + b"\0",
        lambda data, _: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:],
        lambda data, _: b"\xff" * len(data),
        lambda data, _: data.replace(b"odedit-features-1", b"odedit-features-0"),
        lambda _, other: other,
    ],
    ids=["empty", "no header", "half a header", "cut", "longer", "bit", "noise", "format", "another picture's"],
)
def test_a_damaged_file_is_computed_again_and_replaced(backbone, store, tmp_path, monkeypatch, damage):
    expected = alone(with_feature_cache(backbone, store))
    file, other = files_of(tmp_path / "store")[:2]
    whole = file.read_bytes()
    file.write_bytes(damage(whole, other.read_bytes()))
    assert file.read_bytes() != whole
    counted = Counted(backbone, monkeypatch)
    assert equal(with_feature_cache(backbone, store).image_features(PICTURES), expected)
    assert counted.calls == [1] and file.read_bytes() == whole


def _write_and_read(root: str, number: int) -> int:
    """Writes and reads the same features repeatedly; returns the number of features read."""
    store = FeatureStore.at(root, warn=refuse)
    features = {f"picture-{key}": torch.full((64, 32), float(key)) for key in range(8)}
    seen = 0
    for turn in range(12):
        keys = [f"picture-{(key + number + turn) % 8}" for key in range(8)]
        read = store.read("model/connected", keys)
        assert all(torch.equal(value, features[key]) for key, value in read.items())
        store.write("model/connected", {key: features[key] for key in keys}, {"family": "none"})
        seen += len(read)
    assert len(store.read("model/connected", features)) == 8
    return seen


def test_writers_of_the_same_pictures_do_not_disturb_each_other(tmp_path):
    root = tmp_path / "store"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        seen = pool.starmap(_write_and_read, [(str(root), number) for number in range(3)])
    assert all(count >= 11 * 8 for count in seen), "what was written once stays to be read"
    left = [path for path in root.rglob("*") if path.is_file()]
    assert len(left) == 8, "nothing temporary stays behind"


def test_a_store_that_fails_costs_a_warning_and_nothing_else(backbone, tmp_path, monkeypatch):
    warnings: list[str] = []
    store = FeatureStore.at(str(tmp_path / "store"), warn=warnings.append)
    expected = with_feature_cache(backbone, store).image_features(PICTURES)
    (folder,) = (tmp_path / "store").iterdir()
    folder.rename(tmp_path / "aside")
    folder.write_text("a file where a folder should be")
    model = with_feature_cache(backbone, store, cache_bytes=0)
    for _ in range(2):
        assert equal(model.image_features(PICTURES), expected)
    assert len(warnings) == 2 and "cannot be read" in warnings[0] and "cannot be written" in warnings[1]
    assert all(repr(str(tmp_path / "store")) in text and text.endswith("nothing else.") for text in warnings)

    folder.unlink()
    counted = Counted(backbone, monkeypatch)
    model.image_features(PICTURES)
    assert not folder.exists(), "a store that failed is left alone for a while"
    clock = feature_store.time.monotonic
    monkeypatch.setattr(feature_store.time, "monotonic", lambda: clock() + 61)
    for _ in range(2):
        assert equal(model.image_features(PICTURES), expected)
    assert counted.calls == [5, 5] and len(warnings) == 2


def test_features_go_through_any_file_system(backbone, tmp_path, monkeypatch):
    there = Location("s3://bucket/features", SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "bucket/features")
    assert not there.is_local
    expected = with_feature_cache(backbone, FeatureStore(there, refuse)).image_features(PICTURES)
    counted = Counted(backbone, monkeypatch)
    assert equal(with_feature_cache(backbone, FeatureStore(there, refuse)).image_features(PICTURES), expected)
    assert counted.calls == [] and len(files_of(tmp_path / "bucket" / "features")) == len(PICTURES)


def test_a_client_with_errors_of_its_own_costs_no_edit(backbone):
    class Broken:
        def __getattr__(self, name):
            raise LookupError("no credentials for KEY in s3://me:secret@bucket")

    warnings: list[str] = []
    store = FeatureStore(Location("s3://bucket/x", Broken(), "bucket/x"), warnings.append)
    assert equal(with_feature_cache(backbone, store).image_features(PICTURES), backbone.image_features(PICTURES))
    assert len(warnings) == 2 and "secret" not in "".join(warnings)


def test_an_address_names_a_store_too(backbone, tmp_path, monkeypatch):
    with_feature_cache(backbone, FeatureStore.at(f"file://{tmp_path}/store", warn=refuse)).image_features(PICTURES)
    counted = Counted(backbone, monkeypatch)
    with_feature_cache(backbone, FeatureStore.at(str(tmp_path / "store"), warn=refuse)).image_features(PICTURES)
    assert counted.calls == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{file}", "is or lies under a file, expected a folder"),
        ("{file}/below/it", "is or lies under a file, expected a folder"),
        ("file://{file}", "is or lies under a file, expected a folder"),
        ("gopher://me:secret@bucket/features", "cannot use the address 'gopher://***@bucket/features'"),
        ("", "got an empty path"),
    ],
)
def test_what_cannot_be_a_store_is_said_at_once(tmp_path, text, expected):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="pipeline.feature_store: ") as caught:
        FeatureStore.at(text.format(file=file), "pipeline.feature_store")
    assert expected in str(caught.value) and "secret" not in str(caught.value)


def test_any_text_is_a_key(backbone, store, monkeypatch):
    odd = [replace(picture, key=f"../{picture.key}/ü\n") for picture in PICTURES]
    with_feature_cache(backbone, store).image_features(odd)
    counted = Counted(backbone, monkeypatch)
    assert list(with_feature_cache(backbone, store).image_features(odd)) == [picture.key for picture in odd]
    assert counted.calls == []
