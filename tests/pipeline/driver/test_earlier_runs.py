"""Runs of earlier versions, which have shorter fingerprints."""

from __future__ import annotations

import pytest

from odedit import InputError
from odedit.backbones import fingerprint
from pipeline.config.run import from_dict
from pipeline.driver.preflight import prepare, update
from pipeline.run_folder.workspace import read_json


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
