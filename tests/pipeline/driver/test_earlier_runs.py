"""Runs of earlier versions, which have shorter fingerprints."""

from __future__ import annotations

import pytest

from odedit import InputError
from odedit.backbones import fingerprint
from pipeline.config.run import from_dict
from pipeline.driver.earlier import clear
from pipeline.driver.preflight import prepare, update
from pipeline.run_folder.workspace import Workspace, read_json, write_json


@pytest.mark.parametrize("is_given", [True, False])
def test_single_edits_and_tables_of_a_model_are_deleted_with_it(tmp_path, is_given):
    """Single edits that the new model is made from are kept."""
    out = tmp_path / "out"
    single = Workspace.of(str(out / "single"))
    single.create()
    for workspace in (Workspace.of(str(out)), single):
        write_json(workspace.run, {"settings": {"commit.way": "bulk"} if workspace is not single else {}})
        workspace.summary.write_text("{}")
    mine = out / "notes.txt"
    written = [out / name for name in ("single.jsonl", "sequence.parquet", "retention.parquet")]
    for file in (mine, *written):
        file.write_text("")
    clear(Workspace.of(str(out)), f"{single.out} (0123456789abcdef)" if is_given else "")
    kept = {mine, *([out / "single", written[0]] if is_given else [])}
    assert set(out.iterdir()) == kept
    assert single.summary.exists() == is_given


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("is_same", [True, False])
def test_a_run_of_an_earlier_version_is_resumed_or_is_finished(settings, is_finished, is_same):
    config = from_dict(settings)
    ready = prepare(config)
    now = read_json(ready.workspace.run)["settings"]
    then = fingerprint("blip2", "embedded").in_form_of("0" * 16) if is_same else "0" * 16
    update(ready.workspace, settings=now | {"backbone.weights": then}, seconds=1.0)
    if is_finished:
        ready.workspace.summary.write_text("{}")
    if is_same or is_finished:
        prepare(config)
        kept = read_json(ready.workspace.run)["settings"]["backbone.weights"]
        assert kept == (then if is_finished else now["backbone.weights"])
    else:
        with pytest.raises(InputError, match="backbone.weights: was '0000000000000000', now '[0-9a-f]{16}'"):
            prepare(config)
