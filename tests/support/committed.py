"""A committed model with its run, made in this process: records edited one by one, and the first edit committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from odedit import load_backbone
from odedit.backbones import Backbone
from odedit.editing.files import load_edits
from odedit.editing.merging import export
from odedit.editors.base import Editor
from odedit.inputs.batch import EditParams
from odedit.ways.common.files import CommittedInfo, save_committed
from pipeline.config.run import RunConfig, from_dict
from pipeline.driver.run import Outcome, run
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array, write_images

TARGETS = ("Clara Lund", "Lower Ford", "yellow zero")
"""Answers in the vocabulary of the embedded models."""
EDITORS: dict[str, dict[str, Any]] = {
    "ftl": {"name": "ftl", "learning_rate": 3e-3, "max_steps": 60},
    "lora": {"name": "lora", "learning_rate": 1e-2, "max_steps": 60},
}


@dataclass(frozen=True)
class Model:
    """A committed model.

    Attributes:
        outcome: The run, with rows of all records.
        editor, params: The committed edit, the first record's.
        images: Folder of the pictures.
        questions: Question and picture's name of every record.
    """

    config: RunConfig
    outcome: Outcome
    backbone: Backbone
    editor: Editor
    params: EditParams
    images: Path
    questions: tuple[tuple[str, str], ...]

    @property
    def out(self) -> Path:
        return Path(self.outcome.workspace.out)


def make(
    folder: Path, family: str = "blip2", editor: str = "ftl", checkpoint: str = "embedded", **settings: Any
) -> Model:
    """Edits three records, and writes the model with the first edit to `out`."""
    records = [record(number, src=f"who owns digit {number}?", alt=TARGETS[number]) for number in range(3)]
    folder.mkdir(parents=True, exist_ok=True)
    image_root, rephrase_root = write_images(folder, records)
    values = {
        "data": {
            "path": str(write_array(folder / "vqa_eval.json", records)),
            "image_root": str(image_root),
            "rephrase_root": str(rephrase_root),
        },
        "backbone": {"family": family, "checkpoint": checkpoint},
        "supervision": {"locality_source": "record"},
        "objective": {"name": "native"},
        "editor": EDITORS[editor],
        "stopping": {"worst_token_nll": 0.1},
        "tracking": {"enabled": False},
        "out": str(folder / "out"),
    }
    config = from_dict(values | settings)
    with pytest.MonkeyPatch.context() as patch:
        inline_pipeline.install(patch)
        outcome = run(config, Console(quiet=True))
    backbone = load_backbone(family, checkpoint)
    files = sorted(Path(outcome.workspace.edits).glob("*.safetensors"))
    loaded, params, infos = load_edits(files[:1], backbone)
    export(backbone, loaded, params, folder / "out" / "model")
    info = CommittedInfo(
        "sum", {}, infos[0].editor, infos[0].editor_config, family, checkpoint, str(backbone.fingerprint), "float32",
        "mmedit", tuple(info.edit_id for info in infos),
    )  # fmt: skip
    save_committed(folder / "out" / "committed.safetensors", params, info)
    questions = tuple((str(entry["src"]), str(entry["image"])) for entry in records)
    return Model(config, outcome, backbone, loaded, params, image_root, questions)


def without_odedit(program: str, *arguments: object, cwd: Path, seconds: float = 300) -> str:
    """Standard output of a Python program in a process where odedit cannot be imported."""
    block = "import sys\nfor name in ('odedit', 'pipeline'): sys.modules[name] = None\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", block + program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def in_single_precision(backbone: Backbone, source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with float32 weights."""
    backbone.model.to(torch.float32).save_pretrained(folder)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    return folder


def answers(made: Model, max_tokens: int = 8, *, with_pictures: bool = True) -> list[str]:
    """What odedit generates for every question with the written model."""
    from odedit import Probe
    from odedit.backbones.common.generation import until_end
    from odedit.data.images import ImageReader
    from odedit.evaluation.scores import decoded
    from odedit.inputs.prompts import find_template
    from pipeline.edits.answers import Questions

    model = load_backbone(made.config.backbone.family, str(made.out / "model"))
    reader = ImageReader(str(made.images))
    probes = [Probe(text, "", reader.read(image) if with_pictures else None) for text, image in made.questions]
    questions = Questions(model, ("layers.-1.ffn.in",), probes, [max_tokens] * len(probes), find_template("mmedit"))
    return [decoded(model, until_end(tokens, model.ends)[0]).strip() for tokens in questions.answers()]
