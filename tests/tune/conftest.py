"""Settings of a search over a dozen made-up records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.mmedit_files import record, write_array, write_images


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Settings of a search: eight validation records in rungs of two, four and eight, and four evaluation records."""
    records = [record(number, fact=f"fact {number // 2}") for number in range(12)]
    image_root, rephrase_root = write_images(tmp_path, records)
    evaluation = write_array(tmp_path / "evaluation.json", records[:4])
    validation = write_array(tmp_path / "validation.json", records[4:])
    return {
        "settings": {
            "data": {
                "path": str(evaluation),
                "image_root": str(image_root),
                "rephrase_root": str(rephrase_root),
            },
            "supervision": {"locality_source": "record"},
            "editor": {"name": "ftl", "sites": ["layers.2.ffn.out"], "max_steps": 2},
            "objective": {"name": "native"},
            "evaluation": {"generate": False, "mmedit": False},
            "pipeline": {"batch_size": 2},
            "keep_edits": False,
        },
        "validation": {"path": str(validation)},
        "space": {"editor.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "rungs": {"edits": 2, "factor": 2, "number": 3},
        "trials": 4,
    }
