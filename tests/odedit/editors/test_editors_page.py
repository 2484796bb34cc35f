"""The editor shown in `odedit/editors/README.md` keeps the contract."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from odedit import editors, load_editor

# Collected here again, with the `editor` below.
from tests.odedit.editors.test_editor_contract import (  # noqa: F401
    edited,
    encoded,
    sigma2_0,
    test_an_edit_learns,
    test_applied_then_removed_is_bitwise_the_model_also_after_an_exception,
    test_config_is_frozen_and_has_defaults,
    test_merged_weights_are_the_edits_together,
    test_phi_0_changes_no_logit,
    test_saved_and_read_back_it_scores_the_same,
    test_the_positions_that_are_read_are_those_of_the_whole,
    test_together_with_one_edit_is_applied,
)

SHIPPED = set(editors.names())
README = (Path(editors.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editors")
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 46
    (folder / "bitfit.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editors, "__path__", [*editors.__path__, str(folder)])
        patch.delitem(sys.modules, "odedit.editors.bitfit", raising=False)
        assert "bitfit" in editors.names()
        yield load_editor("bitfit")
        sys.modules.pop("odedit.editors.bitfit", None)


def test_every_editor_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)) == SHIPPED


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https)([^)]+)\)", README))
def test_links_resolve(path):
    assert (Path(editors.__file__).parent / path).exists()
