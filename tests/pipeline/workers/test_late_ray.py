"""A Ray that does not start in time is told in a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from odedit.errors import Explained
from pipeline.config.run import BackboneConfig, PipelineConfig
from pipeline.workers import ray_session
from pipeline.workers.plan import make_plan


@pytest.mark.parametrize(
    ("raised", "shown", "kind"),
    [
        (
            "The current node timed out during startup. This could happen because ...",
            "the machine is too busy",
            Explained,
        ),
        ("something else", "something else", Exception),
    ],
    ids=["late", "other"],
)
def test_a_ray_that_starts_too_late_is_explained(raised: str, shown: str, kind: type[Exception]) -> None:
    def init(**settings: Any) -> None:
        raise Exception(raised)

    plan = make_plan(PipelineConfig(), BackboneConfig(), 2, 0, 1)
    with pytest.raises(kind, match=shown) as caught:
        ray_session._start(SimpleNamespace(init=init), plan)
    assert type(caught.value) is kind
    ray_session._remove_session()
