"""Files at addresses: atomic writes, retries of transient errors, no retries of permanent ones."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odedit import InputError
from odedit.backbones.common.feature_store import FeatureStore
from odedit.editing.files import EditInfo, load_edit, save_edit
from odedit.storage import retries
from odedit.storage.location import SMALL_BYTES, Location, delete_all, locate
from odedit.storage.tensors import read_tensors, write_tensors
from tests.support.object_store import ObjectStore
from tests.support.paths import ROOT

LARGE = os.urandom(12 * 2**20)
"""Content large enough for an upload in two parts."""


@pytest.fixture
def run(bucket: ObjectStore) -> Location:
    return locate("s3://odedit/run", "out")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter waits between attempts, with the same number of attempts."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "_outages", retries._OutageLog())


def test_a_file_at_an_address_is_like_a_local_one(run: Location, tmp_path: Path) -> None:
    for folder in (run, locate(str(tmp_path), "out")):
        assert not (folder / "a").exists() and (folder / "none").names() == [] and not folder.is_file()
        (folder / "a").write_text("ä")
        (folder / "b/c").parent.make_folder()
        (folder / "b/c").write_bytes(LARGE)
        (folder / "empty").write_with(lambda path: path.write_bytes(b""))
        assert (folder / "a").read_text() == "ä" and (folder / "b/c").read_bytes() == LARGE
        assert (folder / "empty").read_bytes() == b"" and (folder / "empty").is_file()
        assert folder.names() == ["a", "b", "empty"] and folder.is_folder() and (folder / "b").names("c*") == ["c"]
        assert (folder / "b/c").parent.path == (folder / "b").path and str(folder / "b/c").endswith("/b/c")
        with (folder / "b/c").local_copy() as path:
            assert path.read_bytes() == LARGE and path.name == "c"
        with (folder / "b/c").open() as stream:
            stream.seek(-3, os.SEEK_END)
            assert stream.read() == LARGE[-3:] and stream.seek(5) == 5 and stream.read(2) == LARGE[5:7]
        (folder / "a").write_once("other")
        (folder / "new").write_once("first")
        assert ((folder / "a").read_text(), (folder / "new").read_text()) == ("ä", "first")
        assert pickle.loads(pickle.dumps(folder / "new")).read_text() == "first"
        (folder / "none").delete()
        delete_all((folder / "b").glob())
        assert (folder / "b").names() == [] and (folder / "a").exists()
        with pytest.raises(FileNotFoundError):
            (folder / "none").read_bytes()


def test_tensors_and_edits_are_read_where_they_lie(run: Location) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([1, 2])}
    write_tensors(run / "t.safetensors", tensors, {"format": "x"})
    read, metadata = read_tensors(run / "t.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tensors.items()) and metadata == {"format": "x"}
    info = EditInfo("e", "wise", {}, "blip2", "embedded", "f", "{}", "q", "a")
    save_edit(f"{run}/e.safetensors", {"w": tensors["w"]}, info)
    assert load_edit(f"{run}/e.safetensors")[1] == info
    (run / "cut.safetensors").write_bytes((run / "e.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match="^edit 's3://odedit/run/cut.safetensors' cannot be read as safetensors"):
        load_edit(f"{run}/cut.safetensors")
    with pytest.raises(InputError, match="^edit 's3://odedit/run/none': no such file"):
        load_edit(f"{run}/none")


def test_a_small_object_takes_one_request(run: Location, bucket: ObjectStore) -> None:
    (run / "small").write_bytes(b"x" * SMALL_BYTES)
    assert bucket.requests[1:] == ["PUT /odedit/run/small"]
    (run / "small").exists()
    assert bucket.requests[2:] == ["HEAD /odedit/run/small"]


def test_an_upload_that_is_refused_half_way_leaves_what_was_there(run: Location, bucket: ObjectStore) -> None:
    (run / "old").write_bytes(b"old")
    bucket.answer = lambda method, path: 403 if "partNumber=2" in path else None
    for name in ("old", "new"):
        with pytest.raises(OSError, match="ACCESS_DENIED"):
            (run / name).write_bytes(LARGE)
    assert bucket.names() == ["run/old"] and (run / "old").read_bytes() == b"old"


def test_an_upload_whose_process_is_killed_leaves_nothing(run: Location, bucket: ObjectStore) -> None:
    write = "locate('s3://odedit/run/new', 'out').write_bytes(b'x' * 12 * 2**20)"
    code = f"from odedit.storage.location import locate; {write}"
    started = threading.Event()
    killed = []

    def answer(method: str, path: str) -> int | None:
        if "partNumber=2" in path:
            assert started.wait(60)
            process.send_signal(signal.SIGKILL)
            killed.append(path)
        return None

    bucket.answer = answer
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    started.set()
    assert process.wait(60) == -signal.SIGKILL and killed
    assert bucket.names() == [] and not (run / "new").exists()


def test_an_interruption_waits_for_the_upload_that_has_begun(run: Location) -> None:
    class Interrupting:
        """Sends Ctrl-C between opening an object and writing its content."""

        def open_output_stream(self, path: str) -> Any:
            stream = run.filesystem.open_output_stream(path)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
            return stream

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            replace(run / "new", small=Interrupting()).write_bytes(b"whole")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (run / "new").read_bytes() == b"whole"


def test_what_passes_is_tried_again_and_said_once(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    answers = [OSError(errno.ESTALE, "Stale file handle"), ConnectionResetError(), OSError("AWS Error SLOW_DOWN"), "ok"]
    calls = iter(answers)

    def act() -> object:
        answer = next(calls)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert retries.retried(act) == "ok"
    (record,) = [record for record in caplog.records if record.name == "odedit.storage.retries"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "The storage refuses for now (Stale file handle); trying again for up to 60 s."


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        OSError("AWS Error ACCESS_DENIED during PutObject operation"),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation"),
        OSError("AWS Error UNKNOWN (HTTP status 507) during PutObject operation"),
        OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(impatient: None, error: OSError) -> None:
    calls = []

    def act() -> None:
        calls.append(1)
        raise error

    with pytest.raises(OSError) as caught:
        retries.retried(act)
    assert caught.value is error and len(calls) == 1


def test_patience_ends(impatient: None) -> None:
    calls = []

    def act() -> None:
        calls.append(1)
        raise ConnectionRefusedError

    for patience, at_least, at_most in ((0.0, 1, 1), (0.2, 10, 1000)):
        calls.clear()
        with pytest.raises(ConnectionRefusedError):
            retries.retried(act, patience)
        assert at_least <= len(calls) <= at_most


def test_a_server_that_is_gone_and_comes_back_costs_time_only(
    run: Location, bucket: ObjectStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_outages", retries._OutageLog())
    (run / "old").write_bytes(b"old")
    with (run / "old").open() as stream:
        bucket.stop()
        # Longer than the object store client's own retries.
        back = threading.Timer(9, bucket.start)
        back.start()
        (run / "new").write_bytes(LARGE)
        assert stream.read() == b"old"
    back.join()
    assert (run / "new").read_bytes() == LARGE
    messages = [record.getMessage() for record in caplog.records if record.name == "odedit.storage.retries"]
    assert len(messages) == 1 and "NETWORK_CONNECTION" in messages[0]


def test_features_lie_in_a_bucket_and_cost_nothing_when_it_refuses(bucket: ObjectStore) -> None:
    said: list[str] = []
    features = {"one": torch.randn(2, 3), "two": torch.randn(2, 3)}
    FeatureStore.at("s3://odedit/features", warn=said.append).write("model", features, {"made": "here"})
    assert len(bucket.names("features/model/")) == 2
    again = FeatureStore.at("s3://odedit/features", warn=said.append)
    read = again.read("model", ["one", "two", "three"])
    assert list(read) == ["one", "two"] and torch.equal(read["one"], features["one"]) and not said
    bucket.answer = lambda method, path: 403
    assert again.read("model", ["one"]) == {}
    again.write("model", features, {})
    assert [" cannot be read (" in said[0], " cannot be written (" in said[1], len(said)] == [True, True, 2]
