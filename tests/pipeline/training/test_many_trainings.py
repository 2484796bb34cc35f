"""Trainings of a study: once for all arms that share the weights, several at a time, interruptible."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors import safe_open

from odedit import InputError
from odedit.training.loop import TrainingError
from pipeline.config import strict
from pipeline.config.run import RunConfig, from_dict
from pipeline.study import run as runner
from pipeline.study.spec import StudyConfig
from pipeline.training import many, train
from pipeline.training.many import Training, with_weights
from tests.support import inline_pipeline
from tests.support.mmedit_files import record, write_array, write_images

QUIET = Console(quiet=True)
TRAINED = {"batch_size": 2, "training_steps": 2, "validate_every": 2}
MEND = {"name": "mend", "sites": ["layers.-1.ffn.in"], "rank": 4, "edit_rate": 0.01, "accumulate": 1} | TRAINED
UNIKE = {"name": "unike", "num_layers": 1, "encoder_width": 16, "code_width": 8, "train_batch": 2, "train_steps": 2,
         "max_steps": 2}  # fmt: skip


@pytest.fixture
def values(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Five records to train with and to edit, and three others to validate with."""
    others = [record(number) for number in range(10, 13)]
    write_images(tmp_path, others)
    validation = str(write_array(tmp_path / "val.json", others))
    section = {"path": settings["data"]["path"], "validation": validation}
    return {**settings, "training": section, "objective": {"sigma2_0": 10.0}, "editor": MEND}


def config_of(values: dict[str, Any], **objective: Any) -> RunConfig:
    return from_dict(values | {"objective": values["objective"] | objective})


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and bytes of a file of weights, regardless of the order of keys in its header."""
    with safe_open(path, framework="pt") as stream:
        return stream.metadata(), {name: stream.get_tensor(name).numpy().tobytes() for name in stream.keys()}  # noqa: SIM118


def trained_alone(config: RunConfig, path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    return content(train.run(config, path, QUIET, fresh=False))


def test_weights_are_trained_once_for_all_arms_that_share_them_and_reused(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    monkeypatch.setattr(many, "machine_cpus", lambda: 1)
    trained: list[str] = []
    original = train.run

    def run(config: RunConfig, out: Path, console: Console, *, fresh: bool) -> Path:
        trained.append(f"{config.editor.name} {config.objective.name}")
        return original(config, out, console, fresh=fresh)

    monkeypatch.setattr(train, "run", run)
    shared = {name: values[name] for name in ("data", "supervision", "training", "tracking", "objective")}
    study = {
        "title": "Weights",
        "draw": None,
        "settings": shared | {"pipeline": {"batch_size": 2}, "evaluation": {"generate": False}},
        "axes": {
            "editor": {"MEND": {"editor": MEND}, "UniKE": {"editor": UNIKE}},
            "objective": {"native": {"objective": {"name": "native"}}, "ODEdit": {"objective": {"name": "odedit"}}},
        },
        "baseline": {"objective": "native"},
        "plot": {"kind": "dots", "y": "editor", "colour": "objective"},
    }
    study["settings"]["data"] |= {"limit": 2}
    found = runner.run("one", strict.build(StudyConfig, study), tmp_path / "studies" / "one", QUIET)
    # MEND is trained under the objective, UniKE's encoders are not.
    assert trained == ["mend native", "mend odedit", "unike native"]
    assert [cell.n for cell in found.cells] == [2] * 4
    files = {path.name for path in (tmp_path / "studies" / "weights").glob("*.safetensors")}
    assert len({name for name in files if ".training." not in name}) == 3
    used = {}
    for path in (tmp_path / "studies" / "one" / "arms").glob("*/run.json"):
        used[path.parent.name] = json.loads(path.read_text())["settings"]["editor.checkpoint"]
    assert used["UniKE_native"] == used["UniKE_ODEdit"] and used["MEND_native"] != used["MEND_ODEdit"]
    # Another study beside it, of other records, reuses the weights.
    study["settings"]["data"] |= {"limit": 1}
    runner.run("two", strict.build(StudyConfig, study), tmp_path / "studies" / "two", QUIET)
    assert len(trained) == 3


def test_what_weights_depend_on_names_their_file(values: dict[str, Any], tmp_path: Path) -> None:
    def file(changes: dict[str, Any], **objective: Any) -> str:
        found = many._training(config_of(values | changes, **objective), "arm", str(tmp_path))
        assert found is not None
        return found.path

    first = file({})
    assert first == file({"data": values["data"] | {"limit": 1, "path": "elsewhere.json"}})
    assert first == file({"stopping": {"max_steps": 3}, "tracking": {"enabled": True}, "out": "other"})
    others = [
        file({"seed": 1}),
        file({"editor": MEND | {"rank": 5}}),
        file({"training": values["training"] | {"limit": 3}}),
        file({"data": values["data"] | {"template": "raw"}}),
        file({"supervision": values["supervision"] | {"rephrase_source": "record"}}),
        file({}, name="native"),
    ]
    assert len({first, *others}) == 7
    drawn = {"training": {}, "data": values["data"] | {"pool": "study/data/pool.json"}}
    assert file(drawn) == file(drawn | {"data": {}}), "the embedded records have a pool of their own"
    pool = write_array(tmp_path / "pool.json", [record(10)])
    pooled = {"data": values["data"] | {"pool": str(pool)}}
    found = {first, file(pooled)}
    for path in (values["training"]["path"], values["training"]["validation"], str(pool)):
        corrected = json.loads(Path(path).read_text())
        corrected[0]["alt"] = "a corrected answer"
        write_array(Path(path), corrected)
        found |= {file({}), file(pooled)}
    assert len(found) == 2 + 2 + 2 + 1, "the pool is read by one of the two"
    given = config_of(values | {"editor": MEND | {"checkpoint": "mine.safetensors"}})
    assert with_weights([given], ["arm"], tmp_path, QUIET) == [given] and not list(tmp_path.glob("*.safetensors"))


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "machine_cpus", lambda: 2)


def test_several_at_once_are_bit_for_bit_those_trained_alone(
    tmp_path: Path, values: dict[str, Any], two_processes: None
) -> None:
    configs = [config_of(values, name="native"), config_of(values), config_of(values)]
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    found = with_weights(configs, ["native", "ODEdit", "ODEdit again"], tmp_path / "weights", console)
    paths = [Path(config.editor.settings.checkpoint) for config in found]
    assert paths[1] == paths[2] != paths[0]
    for number in (0, 1):
        assert content(paths[number]) == trained_alone(configs[number], tmp_path / f"alone-{number}.safetensors")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("First 2 editors are trained, 2 at a time.") and str(tmp_path / "weights") in lines[0]
    time = r"about [\d.e-]+ s"
    for name, line in zip(("native", "ODEdit"), lines[1:3], strict=True):
        assert re.fullmatch(rf"Training mend for {name}: at most 2 steps of {time}, \d+ s without validation\.", line)
    assert re.fullmatch(r"All trainings together: at most about \d+ s\.", lines[3])
    for name in ("native", "ODEdit"):
        mine = [line for line in lines if line.startswith(f"mend for {name}: ")]
        assert any("5 training records, 3 validation records" in line for line in mine)
        assert any("step 2 of 2" in line for line in mine)


@pytest.mark.parametrize("editor", [MEND, MEND | {"training_steps": 1, "validate_every": 1}, UNIKE])
def test_the_time_of_a_step_is_measured_before_a_training_begins(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, editor: dict[str, Any]
) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    before = sorted(tmp_path.rglob("*"))
    config = config_of(values | {"editor": editor})
    assert train.seconds_per_step(config, tmp_path / "weights.safetensors") == 1.0
    assert sorted(tmp_path.rglob("*")) == before, "it leaves no state"


def test_a_study_says_how_long_its_trainings_take_before_the_first_of_them(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    seconds = iter([0.5, 90.0])
    monkeypatch.setattr(train, "seconds_per_step", lambda config, path: next(seconds))
    monkeypatch.setattr(train, "run", lambda *arguments, **options: stream.write("trained\n"))
    monkeypatch.setattr(many, "machine_cpus", lambda: 1)
    with_weights([long(values, name="native"), config_of(values)], ["a", "b"], tmp_path, Console(file=stream, width=80))
    first, *lines = stream.getvalue().splitlines()
    assert first.startswith("First 2 editors are trained, 1 at a time. Training takes the same time for a small draw.")
    assert lines == [
        "Training mend for a: at most 100000 steps of about 0.5 s, 13 h 53 min without validation.",
        "Training mend for b: at most 2 steps of about 90 s, 3 min 0 s without validation.",
        "All trainings together: at most about 13 h 56 min.",
        "trained",
        "trained",
    ]


def long(values: dict[str, Any], **objective: Any) -> RunConfig:
    editor = MEND | {"training_steps": 100_000, "validate_every": 1000, "patience": 1000}
    return config_of(values | {"editor": editor}, **objective)


def test_an_interrupt_ends_all_processes_which_keep_what_they_have(
    tmp_path: Path, values: dict[str, Any], two_processes: None
) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if "step 1 of" in text or "step 0 of" in text:
                self.seen = {*getattr(self, "seen", set()), text.partition(":")[0]}
                if len(self.seen) == 2:  # both have begun
                    raise KeyboardInterrupt
            return super().write(text)

    configs = [long(values, name="native"), long(values)]
    with pytest.raises(KeyboardInterrupt):
        with_weights(configs, ["a", "b"], tmp_path / "weights", Console(file=Interrupting(), width=300))
    assert not multiprocessing.active_children()
    states = sorted((tmp_path / "weights").glob("*.training.safetensors"))
    assert len(states) == 2 and len(list((tmp_path / "weights").glob("*"))) == 2, "states to go on from, no weights"


def test_the_error_of_one_ends_all_in_one_sentence(tmp_path: Path, values: dict[str, Any], two_processes: None) -> None:
    wrong = from_dict(values | {"training": values["training"] | {"path": str(tmp_path / "none.json")}})
    with pytest.raises(InputError, match=r"^mend for wrong: .*none\.json"):
        with_weights([long(values), wrong], ["a", "wrong"], tmp_path, QUIET)
    assert not multiprocessing.active_children()
    assert not [path for path in tmp_path.glob("mend-*") if ".training." not in path.name]


def test_a_training_that_fails_is_named() -> None:
    one = Training(from_dict({}), Path("x"), "native")
    with pytest.raises(TrainingError, match="^wise for native: the loss"), many._named(one):
        raise TrainingError("the loss is not finite")
    with pytest.raises(TrainingError, match="^wise for native: its process was ended"), many._named(one):
        raise many.BrokenProcessPool("gone")
    with (
        pytest.raises(TrainingError, match="^wise for native: ZeroDivisionError: division by zero$"),
        many._named(one),
    ):
        raise ZeroDivisionError("division by zero")


def test_a_gpu_or_a_large_model_is_not_shared(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "machine_cpus", lambda: 8)
    assert many._room(config_of(values), 3) == 8
    assert many._room(from_dict(values | {"pipeline": {"threads_per_actor": 3}}), 3) == 2
    large = from_dict(values | {"backbone": {"checkpoint": "Salesforce/blip2-opt-2.7b"}})
    assert many._room(large, 3) == 1
    monkeypatch.setattr(many, "machine_gpus", lambda: 4)
    assert many._room(config_of(values), 3) == 1
