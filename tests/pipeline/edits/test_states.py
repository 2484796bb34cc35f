"""Hidden states of a run's edits and rephrases, and their picture in the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odedit.errors import InputError
from pipeline import commands
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome
from pipeline.edits.states import PROBES, hidden_states
from pipeline.run_folder.rows import parts, read_rows


def test_states_are_those_of_the_chosen_edits_and_the_report_draws_them(
    settings: dict[str, Any], inline: Callable[[RunConfig], Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(settings["data"]["path"])
    records = json.loads(file.read_text())
    del records[1]["image_rephrase"]
    for name in ("rephrase", "image_rephrase"):
        del records[4][name]  # alone in its group
    file.write_text(json.dumps(records))
    settings["supervision"] |= {"rephrase_source": "record"}
    workspace = inline(
        from_dict(settings | {"editor": {"name": "ftl", "max_steps": 2}, "objective": {"name": "native"}})
    ).workspace

    every_id = [row["edit_id"] for row in read_rows(parts(workspace), ("edit_id",))]
    ids = [every_id[number] for number in (0, 1, 4)]
    states = hidden_states(workspace, ids)
    assert states.edit_ids == tuple(ids) and states.probes == PROBES == ("rel", "t_gen", "m_gen")
    is_known = np.isfinite(states.before).all(-1)
    assert is_known.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert np.array_equal(is_known, np.isfinite(states.after).all(-1))
    moved = np.abs(states.after - states.before).max(-1)
    assert (moved[is_known] > 0).all(), "each edit changes its own states"
    every = hidden_states(workspace)
    assert len(every.edit_ids) == 5
    assert np.allclose(every.before[:, [0, 1, 4]], states.before, atol=1e-4, equal_nan=True)

    capsys.readouterr()
    commands.report(str(workspace.out), None, with_states=True)
    text = Path(workspace.report).read_text()
    assert capsys.readouterr().out.strip() == str(workspace.report)
    section = text[text.index('<section id="states"') : text.index('<section id="resources"')]
    before, after = re.findall(r'<svg viewBox="0 0 100 100".*?</svg>', section, re.DOTALL)
    for panel in (before, after):
        assert [panel.count(f"<{mark} ") for mark in ("circle", "rect", "path", "line")] == [5, 4, 3, 7]
    assert f'href="#edit={ids[2]}"' in before and 'class="mark right"' not in before
    commands.report(str(workspace.out), None)
    assert 'id="states"' not in Path(workspace.report).read_text(), "without the option no model is loaded"


def test_a_run_that_kept_no_edits_is_named(settings: dict[str, Any], inline: Callable[[RunConfig], Outcome]) -> None:
    workspace = inline(from_dict(settings | {"keep_edits": False})).workspace
    with pytest.raises(InputError, match=rf"{workspace.out}: .* keep_edits=true"):
        hidden_states(workspace)
