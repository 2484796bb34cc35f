"""Requests are prepared once for all runs of the same records."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from odedit import EditRequest, Picture, Probe
from pipeline.config.run import from_dict
from pipeline.driver.preflight import prepare
from pipeline.workers import preparer as stage
from pipeline.workers.plan import Job
from pipeline.workers.request_cache import RequestCache


def request(number: int) -> EditRequest:
    picture = Picture(str(number), np.zeros((3, 4, 4), dtype=np.float32))
    probe = Probe("what?", "this", picture)
    return EditRequest(f"edit-{number}", probe, probes={"t_gen": probe})


def test_the_cache_keeps_the_most_recently_used_requests_within_its_bytes() -> None:
    cache = RequestCache(max_bytes=2 * 192)
    first, second, third = (request(number) for number in range(3))
    cache.put("a", first)
    cache.put("b", second)
    assert cache.get("a") is first
    cache.put("c", third)
    assert cache.get("b") is None and cache.get("a") is first and cache.get("c") is third
    cache.put("a", replace(first, edit_id="again"))
    assert cache.get("c") is third, "replacing a request takes no further bytes"


def test_another_run_of_the_same_records_reads_no_picture_twice(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        from_dict(settings | {"out": f"{settings['out']}-{i}", "objective": {"name": n}})
        for i, n in enumerate(("native", "odedit"))
    ]
    noisy = from_dict(
        settings | {"out": f"{settings['out']}-2", "supervision": {"locality_source": "record", "rephrase_noise": 0.5}}
    )
    jobs = [Job(ready.config, ready.sources, ready.workspace) for ready in (prepare(run) for run in (*runs, noisy))]
    cache = RequestCache()
    alone = stage.Preparer(jobs[1])(0)
    first = stage.Preparer(jobs[0], cache)(0)
    calls: list[str] = []
    build = stage.build_request
    monkeypatch.setattr(
        stage, "build_request", lambda record, *rest: calls.append(record.edit_id) or build(record, *rest)
    )
    second = stage.Preparer(jobs[1], cache)(0)
    assert calls == [] and first.requests
    for cached, fresh in zip(second.requests, alone.requests, strict=True):
        assert cached.edit_id == fresh.edit_id
        for picture, expected in zip(cached.pictures(), fresh.pictures(), strict=True):
            assert picture.key == expected.key and np.array_equal(picture.pixels, expected.pixels)
    third = stage.Preparer(jobs[2], cache)(0)
    assert len(calls) == len(third.requests), "other supervision makes other requests"
