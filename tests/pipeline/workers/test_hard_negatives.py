"""Hard negatives of a run are drawn from the pool only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odedit.data.images import ImageReader
from odedit.data.negatives import NegativePool
from odedit.data.pack import pack
from odedit.data.pool import Pool
from odedit.objectives import ObjectiveConfig
from pipeline.config.run import from_dict
from pipeline.driver.run import Outcome
from pipeline.run_folder import rows as results
from pipeline.workers import negatives
from tests.support.mmedit_files import record, write_array, write_images

Inline = Callable[..., Outcome]
CONTRAST = {"objective": {"name": "contrast", "negatives": 3}}


@pytest.fixture
def pool(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings with a packed pool of four records, which share no picture with the run's."""
    folder = tmp_path / "train"
    folder.mkdir()
    records = [record(number) for number in range(20, 29)]
    roots = write_images(folder, records)
    pack(str(write_array(folder / "train.json", records[5:])), str(roots[0]), str(roots[1]), str(folder / "packed"))
    return settings | {"data": settings["data"] | {"pool": str(folder / "packed")}, "supervision": {}}


def test_a_run_draws_hard_negatives_from_the_pool(
    pool: dict[str, Any], inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    of_request = NegativePool.probes

    def probes(self: NegativePool, request: Any, feature: Any) -> Any:
        negatives = of_request(self, request, feature)
        seen[request.edit_id] = [probe.picture.key for probe in negatives if probe.picture is not None]
        assert {probe.target for probe in negatives} == {request.replaced}
        assert set(seen[request.edit_id]) <= self.features.keys() and len(self.features) == 4
        return negatives

    monkeypatch.setattr(NegativePool, "probes", probes)
    outcome = inline(from_dict(pool | CONTRAST))
    assert outcome.summary["n"] == 5
    assert len(seen) == 5 and all(len(keys) == 3 for keys in seen.values())
    rows = results.read_rows(results.parts(outcome.workspace))
    assert all(len(row["losses"]["loc"]) == 3 for row in rows)


def test_an_unreadable_picture_is_no_hard_negative(backbone: Any, tmp_path: Path) -> None:
    records = [record(number) for number in range(3)]
    roots = write_images(tmp_path, records)
    path = write_array(tmp_path / "train.json", [*records, records[0], record(9)])
    pool = Pool.sample(str(path), ImageReader(str(roots[0]), str(roots[1])))
    drawn = negatives.negative_pool(ObjectiveConfig(name="contrast"), backbone, lambda: pool, ["layers.2.ffn.in"])
    assert drawn is not None and len(drawn.features) == 3 and drawn.count == 12
    assert drawn.things == {}, "the records name no things"
    assert negatives.negative_pool(ObjectiveConfig(), backbone, lambda: pytest.fail("not needed"), []) is None


def test_a_picture_has_the_things_of_all_records_that_show_it(backbone: Any, tmp_path: Path) -> None:
    records = [record(number) for number in range(3)]
    records[0] |= {"fact": "owner of four", "entity": "four"}
    records.append(records[0] | {"fact": "city of four", "src": "Where is it?"})
    roots = write_images(tmp_path, records)
    pool = Pool.sample(str(write_array(tmp_path / "train.json", records)), ImageReader(str(roots[0]), str(roots[1])))
    drawn = negatives.negative_pool(ObjectiveConfig("contrast", positives=2), backbone, lambda: pool, [])
    assert drawn is not None and len(drawn.features) == 3 and drawn.positives == 2
    assert list(drawn.things.values()) == [{"fact: owner of four", "fact: city of four", "entity: four"}]
