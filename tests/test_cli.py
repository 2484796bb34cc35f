"""Commands: invalid input of any kind ends with a clear message and exit code 2, never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from odedit.__main__ import app
from pipeline import commands
from pipeline.driver import preflight
from pipeline.run_folder.staging import OWN_PICTURES, PICTURES
from pipeline.workers import joining, ray_session
from tests.support import inline_pipeline
from tests.support.mmedit_files import encoded, picture, record, write_array, write_images


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A configuration file and its small input."""
    records = [record(number) for number in range(3)]
    image_root, rephrase_root = write_images(tmp_path, records)
    values = {
        "data": {
            "path": str(write_array(tmp_path / "vqa_eval.json", records)),
            "image_root": str(image_root),
            "rephrase_root": str(rephrase_root),
        },
        "supervision": {"locality_source": "record"},
        "editor": {"name": "wise", "site": "layers.2.ffn.in", "max_steps": 1},
        "tracking": {"enabled": False},
        "out": str(tmp_path / "out"),
    }
    return {"values": values, "config": write_config(tmp_path, values), "folder": tmp_path}


def write_config(folder: Path, values: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def expect(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    for part in parts:
        assert part in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["edit"], ["score", "model"], ["commit"]], ids=lambda command: command[0])
def test_records_are_named_by_a_file_or_on_the_command_line(command: list[str]) -> None:
    expect(odedit(*command, "backbone.checkpoint=embedded"), 2, "Give --config FILE or data.path=FILE")


def test_a_training_names_its_own_records(tmp_path: Path) -> None:
    command = ("train", "mend", "data.path=records.json", "--out", tmp_path / "mend.safetensors")
    expect(odedit(*command), 2, "Give --config FILE or training.path=FILE")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (OWN_PICTURES, "general questions about the records' own pictures"),
        (PICTURES, "general questions about the pictures of data.pictures"),
        ("data.pool", "the pool's questions"),
    ],
)
def test_kept_answers_name_what_was_asked(source: str, words: str) -> None:
    summary = {"kept": {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}, "kept_of": source}
    assert commands._of_other_questions(summary) == [
        f"kept: 0.500 [0.250, 0.750] of 8 answers to {words} are as before."
    ]


def test_a_run_needs_no_configuration_file(files: dict[str, Any]) -> None:
    data = files["values"]["data"]
    settings = [f"data.{name}={value}" for name, value in data.items()]
    settings += [
        "editor.name=ftl",
        "objective.name=native",
        "backbone.checkpoint=embedded",
        f"out={files['folder']}/out",
    ]
    expect(odedit("edit", *settings, "--dry-run"), 0, "3 usable records")


@pytest.mark.parametrize(
    "command",
    [[], ["demo"], ["edit"], ["train"], ["apply"], ["fetch"], ["merge"], ["world"],
     ["world", "build"], ["world", "train"], ["world", "check"], ["data"],
     ["data", "check"], ["data", "pack"]],
    ids=" ".join,
)  # fmt: skip
def test_help_everywhere(command: list[str]) -> None:
    expect(odedit(*command, "--help"), 0, "Usage: ", "--help")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=none.json", "none.json"),
        ("data.image_root=/nowhere", "data.image_root: there is no folder '/nowhere'"),
        ("editor.name=wize", "Did you mean 'wise'?"),
        ("backbone.family=blip", "Did you mean 'blip2'?"),
        ("backbone.checkpoint=./nowhere", "directory './nowhere' does not exist"),
        ("editor.clmp=1", "Did you mean 'clamp'?"),
        ("pipeline.actors=-1", "pipeline.actors: got -1"),
        ("editor.max_steps", "expected key.sub=value"),
        ("out=gopher://x", "out: cannot use the address 'gopher://x'"),
        (f"pipeline.feature_store={__file__}", "pipeline.feature_store: "),
        ("pipeline.feature_store=gopher://x", "pipeline.feature_store: cannot use the address 'gopher://x'"),
    ],
)
def test_wrong_settings_exit_with_2(files: dict[str, Any], override: str, expected: str) -> None:
    expect(odedit("edit", "--config", files["config"], override), 2, expected)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.image_root={empty}", ["data.image_root: none of 6 pictures looked for is there (fields: image, m_loc)",
                                     "vqa_eval.json, record 0: '{empty}/val2014/COCO_val2014_000000000000.jpg'"]),
        ("data.image_root={folder}/coco/val2014", ["data.image_root: none of 6 pictures"]),
        ("data.rephrase_root={empty}", ["data.rephrase_root: none of 3 pictures", "(fields: image_rephrase)"]),
        ("data.rephrase_root=null", ["data.image_root: none of 3 pictures", "Set data.rephrase_root to"]),
        ("out={folder}/run.yaml", ["out: '{folder}/run.yaml' is a file. Choose another folder."]),
        ("out={folder}/run.yaml/a", ["out: '{folder}/run.yaml' is a file, so there can be no '{folder}/run.yaml/a'"]),
        ("out=/proc/odedit/x", ["out: '/proc/odedit/x' cannot be written to"]),
        ("out={folder}/coco/run", ["out: '{folder}/coco/run' lies in data.image_root"]),
        ("tracking={{uri: 'sqlite:///{folder}/run.yaml/mlflow.db'}}", ["tracking.uri: '{folder}/run.yaml' is a file"]),
        ("tracking={{uri: 'sqlite:////proc/odedit/mlflow.db'}}", ["tracking.uri: '/proc/odedit' cannot be written to"]),
        ("tracking={{uri: 'sqlite:///{folder}/vqa_eval.json'}}", ["tracking.uri: ", "file is not a database"]),
        ("tracking={{uri: 'http://127.0.0.1:1'}}", ["tracking.uri: no server answers at 'http://127.0.0.1:1'"]),
        ("tracking={{uri: 'postgresql://me:secret@127.0.0.1:1/x'}}", ["tracking.uri: no server answers at", "***"]),
        ("tracking={{uri: 'sqlite:///{folder}/coco'}}", ["tracking.uri: ", "unable to open database file"]),
        ("pipeline.ray_address=127.0.0.1:1", ["pipeline.ray_address: no Ray answers at '127.0.0.1:1'"]),
        ("pipeline.ray_address=ray://127.0.0.1:1", ["pipeline.ray_address: no Ray answers at 'ray://127.0.0.1:1'"]),
        ("pipeline.ray_address=http://127.0.0.1:8265", ["pipeline.ray_address: got", "expected host:port"]),
        ("pipeline.ray_address=head", ["pipeline.ray_address: no Ray answers at 'head' (expected HOST:PORT, or auto)"]),
        ("pipeline.feature_store=/proc/odedit", ["pipeline.feature_store: '/proc/odedit' cannot be written to"]),
        ("pipeline.device=cuda", ["pipeline.device: got 'cuda', but no GPU"]),
        ("data.pool=none.json", ["data.pool: there is no file", "Relative paths start at the current folder"]),
        ("data.path={folder}/run.yaml", ["run.yaml: not a file of records"]),
    ],
)  # fmt: skip
def test_what_can_be_known_is_said_before_anything_is_written_or_printed(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, override: str, expected: list[str], dry_run: bool
) -> None:
    def connected(*arguments: Any) -> Any:
        pytest.fail("Ray would be started")

    monkeypatch.setattr(ray_session, "connected", connected)
    monkeypatch.setattr(preflight, "machine_gpus", lambda: 0)
    empty = files["folder"] / "empty"
    empty.mkdir()
    before = sorted(files["folder"].rglob("*"))
    places = {"folder": str(files["folder"]), "empty": str(empty)}
    options = ["--dry-run"] if dry_run else []
    result = odedit("edit", "--config", files["config"], override.format(**places), *options)
    expect(result, 2, *(part.format(**places) for part in expected))
    assert result.stdout == "" and "secret" not in result.output
    assert sorted(files["folder"].rglob("*")) == before


def test_a_run_and_a_dry_run_refuse_a_folder_of_another_run(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    expect(odedit("edit", "--config", files["config"]), 0)
    for options in ([], ["--dry-run"]):
        result = odedit("edit", "--config", files["config"], "seed=5", *options)
        expect(result, 2, "holds a run with other settings or input files", "seed: was 0, now 5")
    expect(odedit("edit", "--config", files["config"], "seed=5", "--dry-run", "--fresh"), 0, "seed: 5")
    assert len(list((files["folder"] / "out" / "edits").iterdir())) == 3, "and nothing is deleted"


def test_some_missing_pictures_are_rows_and_the_reasons_are_counted(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    root = Path(files["values"]["data"]["image_root"])
    for number in (1, 2):
        (root / record(number)["image"]).unlink()
    result = odedit("edit", "--config", files["config"])
    expect(result, 0, "1 edit, 0 failed, 2 skipped")
    expect(result, 0, "Not edited:\n  2 skipped, the first: vqa_eval.json, record 1: image '")
    summary = json.loads((files["folder"] / "out" / "summary.json").read_text())
    (reason,) = summary["reasons"]
    assert (reason["status"], reason["count"]) == ("skipped", 2) and "is not under data.image_root" in reason["first"]


def test_a_missing_configuration_exits_with_2() -> None:
    expect(odedit("edit", "--config", "none.yaml"), 2, "none.yaml: the configuration cannot be read")


def test_a_truncated_file_of_records_exits_with_2(files: dict[str, Any]) -> None:
    path = Path(files["values"]["data"]["path"])
    path.write_text(path.read_text()[:-50])
    expect(odedit("edit", "--config", files["config"]), 2, "vqa_eval.json")


def test_a_checkpoint_of_another_class_exits_with_2(files: dict[str, Any]) -> None:
    other = files["folder"] / "bert"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    result = odedit("edit", "--config", files["config"], f"backbone.checkpoint={other}")
    expect(result, 2, "'bert' is no image-text-to-text model")


def test_a_dry_run_prints_the_configuration_and_the_plan_and_writes_nothing(files: dict[str, Any]) -> None:
    result = odedit("edit", "--config", files["config"], "editor.clamp=0.5", "--dry-run")
    expect(
        result,
        0,
        "clamp: 0.5",
        "# input: 3 usable records in 1 group of 8, 0 skipped",
        "# plan: this process on",
        "# memory of a worker, about ",
    )
    assert yaml.safe_load(result.stdout)["editor"]["clamp"] == 0.5
    assert not Path(files["values"]["out"]).exists()


def test_a_dry_run_of_one_model_has_the_plan_of_its_workers(files: dict[str, Any]) -> None:
    values = {name: files["values"][name] for name in ("data", "out")} | {"pipeline": {"batch_size": 1}}
    folder = Path(files["config"]).parent / "model"
    folder.mkdir()
    config = write_config(folder, values)
    plans = "# plan of the model: this process on", "# plan of edits and scores: this process on"
    expect(odedit("commit", "--config", config, "--dry-run"), 0, *plans)


@pytest.mark.parametrize(
    ("of_job", "expected"),
    [
        ("10.0.0.1:6379", "on the cluster at 10.0.0.1:6379"),
        ("http://127.0.0.1:8265", "this process on"),
        ("local", "this process on"),
    ],
)
def test_a_job_of_a_cluster_runs_on_it(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, of_job: str, expected: str
) -> None:
    monkeypatch.setattr(joining, "login_to", lambda address: {})
    monkeypatch.setenv("RAY_ADDRESS", of_job)
    expect(odedit("edit", "--config", files["config"], "--dry-run"), 0, f"# plan: {expected}")
    named = odedit("edit", "--config", files["config"], "--dry-run", "pipeline.ray_address=10.0.0.2:6379")
    expect(named, 0, "# plan: on the cluster at 10.0.0.2:6379")


def test_edit_and_apply(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inline_pipeline.install(monkeypatch)
    expect(odedit("edit", "--config", files["config"]), 0, "reliability", "3 edits, 0 failed, 0 skipped")
    edits = sorted((files["folder"] / "out" / "edits").iterdir())
    image = files["folder"] / "question.png"
    image.write_bytes(encoded(picture(1)))
    result = odedit("apply", *edits[:2], "--prompt", "What is it?", "--image", image)
    expect(result, 0, "before: ", "after:  ")
    marked = odedit("apply", *edits[:2], "--prompt", "<image>\nWhat is it?", "--image", image)
    assert marked.exit_code == 0 and marked.stdout == result.stdout, marked.output
    expect(odedit("apply", edits[0], "--prompt", "<image>\nWhat is it?"), 2, "image marker")
    image.write_bytes(b"no picture")
    expect(odedit("apply", edits[0], "--prompt", "What is it?", "--image", image), 2, "--image: ")
    result = odedit("apply", edits[0], "--prompt", "What is it?", "--image", "nope.png")
    expect(result, 2, "--image: there is no file 'nope.png'")
    assert "data." not in result.output
    expect(odedit("apply", edits[0], "--prompt", "What is it?", "--dtype", "bfloat16"), 0, "after:  ")
    expect(odedit("apply", edits[0], "--prompt", "x", "--device", "gpu"), 2, "--device: got 'gpu', expected one of cpu")
    expect(odedit("apply", edits[0], "--prompt", "x", "--device", "cuda:99"), 2, "--device: got 'cuda:99'")
    expect(odedit("apply", edits[0], "--prompt", "x", "--dtype", "half"), 2, "--dtype: got 'half'", "bfloat16")
    expect(odedit("apply", "none.safetensors", "--prompt", "What is it?"), 2, "no such file")
    edits[0].write_bytes(b"damaged")
    expect(odedit("apply", edits[0], "--prompt", "What is it?"), 2, "cannot be read as safetensors")


def test_data_commands(files: dict[str, Any]) -> None:
    data = files["values"]["data"]
    roots = ["--image-root", data["image_root"], "--rephrase-root", data["rephrase_root"]]
    expect(odedit("data", "check", data["path"], *roots), 0, "3 of 3 records can be used")
    expect(odedit("data", "check", "none.json", *roots), 2, "none.json")
    packed = files["folder"] / "packed"
    expect(odedit("data", "pack", data["path"], packed, *roots), 0, "3 records (0 unusable), 9 pictures")
    expect(odedit("data", "check", packed), 0, "3 of 3 records can be used")
    expect(odedit("data", "pack", data["path"], packed, *roots), 2, "already holds a pack")
    elsewhere = files["folder"] / "elsewhere"
    elsewhere.mkdir()
    wrong = ("--image-root", elsewhere, "--rephrase-root", elsewhere)
    result = odedit("data", "pack", data["path"], files["folder"] / "nothing", *wrong)
    expect(result, 1, "3 records (3 unusable), 0 pictures", "Not one picture could be read")
    assert "Error" not in result.output
    expect(odedit("data", "pack", data["path"], files["folder"] / "nothing", *roots), 0, "3 records (0 unusable)")
    # Without roots, the folder below the file that holds the first pictures is taken for all.
    result = odedit("data", "check", data["path"])
    expect(result, 1, "0 of 3 records can be used", f"Pictures: under {data['image_root']} (--image-root)")
    assert "data.image_root" not in result.output


def test_a_file_to_fill_in_and_columns_of_other_names(tmp_path: Path) -> None:
    template = odedit("data", "template")
    expect(template, 0, "image,question,answer\n")
    (tmp_path / "records.csv").write_text(template.stdout.replace("question,answer", "prompt,label"))
    check = ["data", "check", tmp_path / "records.csv", "--no-images"]
    expect(odedit(*check), 1, "missing fields: 'question' and 'answer' are not there", "Fields that nobody reads")
    columns = ["--column", "question=prompt", "--column", "answer=label"]
    expect(odedit(*check, *columns), 0, "2 of 2 records can be used", "Layout: own records")
    expect(odedit(*check, "--column", "question"), 2, "--column: got 'question', expected FIELD=COLUMN")
    expect(odedit(*check, "--column", "qestion=prompt"), 2, "--column: got the key 'qestion'", "'question'?")


def test_a_run_without_a_usable_record_ends_with_its_summary_and_1(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline_pipeline.install(monkeypatch)
    data = files["values"]["data"]
    write_array(Path(data["path"]), [{"src": 1}, "text"])
    expect(odedit("edit", "--config", files["config"], "--dry-run"), 1, "None of 2 records can be used:")
    roots = ["--image-root", data["image_root"], "--rephrase-root", data["rephrase_root"]]
    expect(odedit("data", "check", data["path"], *roots), 1, "0 of 2 records can be used")
    result = odedit("edit", "--config", files["config"])
    expect(result, 1, "2/2 records (2 skipped)", "0 edits, 0 failed, 2 skipped", "No record was edited (0 failed, 2 sk")
    expect(result, 1, "1 skipped: vqa_eval.json, record 1: wrong type: the record is text")
    assert "text" in (files["folder"] / "out" / "report.html").read_text()
    assert "Error" not in result.output


def test_a_missing_file_of_records_is_called_missing(files: dict[str, Any]) -> None:
    values = files["values"]
    del values["data"]["image_root"], values["data"]["rephrase_root"]
    config = write_config(files["folder"], values)
    result = odedit("edit", "--config", config, "data.path=nofile.json")
    expect(result, 2, "nofile.json: there is no such file")
    assert "image_root" not in result.output
    for command in (["check", "nofile.json"], ["pack", "nofile.json", files["folder"] / "packed"]):
        result = odedit("data", *command)
        expect(result, 2, "nofile.json: there is no such file")
        assert "data." not in result.output.replace("data.py", "")
    expect(odedit("data", "check", values["data"]["path"], "--task", "x", "--no-images"), 2, "--task: got 'x'")


def test_an_edit_that_was_never_logged_cannot_be_fetched(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/none.db"
    expect(odedit("fetch", "edit-1", "--run", "0" * 32, "--uri", address, "--out", tmp_path), 2, "no database")
    expect(odedit("fetch", "edit-1", "--run", "0" * 32, "--uri", address, "--out", tmp_path / "new"), 2, "no database")
    assert not (tmp_path / "new").exists()


def test_an_unexpected_error_is_one_sentence_and_exit_1(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import commands

    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("something\nelse")

    monkeypatch.setattr(commands, "run", fail)
    result = odedit("edit", "--config", files["config"])
    expect(result, 1, "Failed: ZeroDivisionError: something", "odedit --debug")


def test_a_traceback_shows_no_secret(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import commands

    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("no answer from https://me:pa55word@host/x")

    monkeypatch.setattr(commands, "run", fail)
    result = odedit("--debug", "edit", "--config", files["config"])
    assert result.exit_code == 1 and "ZeroDivisionError: no answer from https://***@host/x" in result.output
    assert "Traceback" in result.output and "pa55word" not in result.output


def test_check_prints_the_first_ten_of_a_kind_or_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    values = [{"image": "a.png", "question": "what?", "answer": "" if number else "x"} for number in range(31)]
    path = write_array(tmp_path / "a.json", values)
    few, every = odedit("data", "check", path), odedit("data", "check", path, "--all")
    expect(few, 0, "And more of the same kind: 20 not an edit. --all prints each.", "1 of 31 records can be used")
    assert (few.output.count("field 'answer' is empty"), every.output.count("field 'answer' is empty")) == (10, 30)
    assert "--all" not in every.output
    packed = odedit("data", "pack", path, tmp_path / "packed")
    expect(packed, 0, "And more of the same kind: 20 not an edit. `odedit data check --all` names each.")
    assert packed.output.count("field 'answer' is empty") == 10


def test_an_output_that_was_closed_from_the_start_changes_nothing() -> None:
    for arguments, code in (("study list", 0), ("data check none.json", 2)):
        command = f'exec "{sys.executable}" -m odedit {arguments} >&-'
        done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_an_output_that_is_closed_ends_the_command_quietly(files: dict[str, Any]) -> None:
    path = write_array(files["folder"] / "many.json", [record(number, src=number) for number in range(3000)])
    data = files["values"]["data"]
    roots = ["--image-root", data["image_root"], "--rephrase-root", data["rephrase_root"]]
    command = [sys.executable, "-m", "odedit", "data", "check", str(path), "--all", *roots]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_interrupt_says_that_the_run_goes_on(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import commands

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupt)
    expect(odedit("edit", "--config", files["config"]), 130, "the same command goes on")


def test_a_password_on_the_command_line_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for argument, is_said in (("tracking.uri=https://me:pa55word@host", True), ("out=s3://bucket/x", False)):
        monkeypatch.setattr(sys, "argv", ["odedit", "edit", argument])
        said = CliRunner().invoke(app, ["edit", "--config", "none.yaml", argument])
        assert said.exit_code == 2 and ("`ps` shows to all users" in said.stderr) == is_said
        assert "pa55word" not in said.output
