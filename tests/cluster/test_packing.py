"""Files that are sent with a job, and commands that are refused before anything is sent."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster import packing
from odedit.__main__ import app
from pipeline.config import version
from pipeline.config.version import code_version


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "one.png").write_bytes(b"png")
    (folder / "records.json").write_text("[]")
    (folder / "mine").mkdir()
    (folder / "mine" / "editor.py").write_text("")
    (folder / ".gitignore").write_text("*\n")
    return folder


def packed(here: Path, *arguments: str, values: dict | None = None, include: tuple[Path, ...] = ()) -> packing.Parcel:
    extra = []
    if values is not None:
        (here / "run.yaml").write_text(yaml.safe_dump(values))
        extra = ["--config", "run.yaml"]
    folder = here.parent / "parcel"
    folder.mkdir()
    return packing.pack([arguments[0], *extra, *arguments[1:]], folder, here, include)


def test_files_that_settings_name_arrive_also_where_git_ignores_them(here: Path) -> None:
    values = {"data": {"path": "records.json", "image_root": "pictures"}, "editor": {"name": "mine.editor"}}
    parcel = packed(here, "edit", "out=/shared/x", values=values)
    for name in ("records.json", "pictures/one.png", "mine/editor.py", "run.yaml", "odedit/__main__.py", "tune/run.py"):
        assert (parcel.folder / name).is_file(), name
    assert parcel.arguments == ["edit", "--config", "run.yaml", "out=/shared/x"]
    assert not list(parcel.folder.rglob("__pycache__")) and not parcel.notes
    assert list((parcel.folder / "odedit").rglob("*.safetensors")), "the embedded models"


def test_ray_sends_also_what_a_folder_of_pictures_ignores(here: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    for name in (".gitignore", ".rayignore"):
        (here / "pictures" / name).write_text("/one.png\n")
        (here / "mine" / name).write_text("*.py\n")
    values = {"data": {"path": "records.json", "image_root": "pictures"}, "editor": {"name": "mine.editor"}}
    parcel = packed(here, "edit", "out=/shared/x", values=values)
    create_package(str(parcel.folder), here.parent / "job.zip", include_gitignore=True)
    with zipfile.ZipFile(here.parent / "job.zip") as sent:
        assert {"pictures/one.png", "mine/editor.py"} <= set(sent.namelist())


def test_the_code_that_is_sent_runs_by_itself(here: Path) -> None:
    parcel = packed(here, "edit", "out=/shared/x")
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[:0] = [{str(parcel.folder)!r}]; import odedit, "
               "pipeline.driver.run, tune.run, cluster.submit; print(odedit.__file__, tune.run.__file__)"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == [str(parcel.folder / "odedit/__init__.py"), str(parcel.folder / "tune/run.py")]


def test_a_job_knows_the_version_of_the_code_that_was_sent(here: Path) -> None:
    folder = here.parent / "parcel"
    folder.mkdir()
    packing.pack(["edit", "out=/shared/x"], folder, here, code="0.1.0 (0123456789ab+changes)")
    script = "from pipeline.config.version import code_version as version; print(version())"
    code = f"import sys; sys.path[:0] = [{str(folder)!r}]; {script}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "0.1.0 (0123456789ab+changes)\n"


def test_a_version_knows_of_changes_in_every_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "pipeline").mkdir()
    (here / "cluster").mkdir()
    (here / ".gitignore").write_text("")
    (here / "cluster" / "submit.py").write_text("")
    monkeypatch.setattr(version, "__file__", str(here / "pipeline" / "config" / "version.py"))
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=here, check=True)
    assert re.search(r"\([0-9a-f]{12}\)$", code_version())
    (here / "records.json").write_text("of no interest")
    assert "+changes" not in code_version()
    (here / "cluster" / "submit.py").write_text("changed")
    assert re.search(r"\([0-9a-f]{12}\+changes\)$", code_version())


def test_submitting_sends_the_version_along(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []

    def pack(*arguments: object) -> None:
        sent.append(arguments[-1])
        raise packing.JobError("enough")

    monkeypatch.chdir(here)
    monkeypatch.setattr(packing, "pack", pack)
    CliRunner().invoke(app, ["submit", "edit", "out=/shared/x"])
    assert sent == [code_version()]


def test_overrides_and_files_on_request_are_taken_as_well(here: Path) -> None:
    parcel = packed(here, "edit", "data.path=records.json", "out=/shared/x", include=(Path("pictures/one.png"),))
    assert (parcel.folder / "records.json").is_file() and (parcel.folder / "pictures/one.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "mend", "--out=/shared/mend.safetensors", "training.validation=new.json"], "new.json"),
        (["commit", "out=/shared/y", "--change", "/shared/x", "--add", "new.json"], "new.json"),
        (["commit", "out=/shared/y", "--change=/shared/x", "--add=new.json"], "new.json"),
        (["commit", "out=/shared/y", "data.path=records.json", "commit.add=[new.json]"], "new.json"),
        (["commit", "out=/shared/y", "data.path=records.json", "commit.start=earlier"], "earlier/run.json"),
        (["edit", "out=/shared/y", "data.path=records.json", "editor.name=mend", "editor.start=paper"], "records.json"),
        (["edit", "out=/shared/x", "data.path=embedded-facts.json"], "embedded-facts.json"),
        (["edit", "out=/shared/x", "backbone.checkpoint=embedded_model"], "embedded_model/config.json"),
    ],
)
def test_every_input_is_sent(here: Path, arguments: list[str], name: str) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text("[]")
    parcel = packed(here, *arguments)
    assert (parcel.folder / name).read_text() == "[]" and not parcel.notes


def test_the_embedded_benchmark_is_no_file(here: Path) -> None:
    (here / "embedded").mkdir()
    (here / "embedded" / "own.json").write_text("[]")
    values = {"data": {"path": "embedded:train:3"}, "backbone": {"checkpoint": "embedded"}}
    parcel = packed(here, "edit", "out=/shared/x", values=values)
    assert not (parcel.folder / "embedded").exists() and not parcel.notes


def test_what_an_override_replaces_is_neither_taken_nor_refused(here: Path) -> None:
    values = {"data": {"path": "records.json"}, "out": "runs/x"}
    parcel = packed(here, "edit", "data={path: /data/other.json}", "out=/shared/x", values=values)
    assert not (parcel.folder / "records.json").exists()
    assert parcel.notes == ["data.path: /data/other.json is read where the job runs; it is not sent."]


def test_a_configuration_from_elsewhere_arrives_under_its_name(here: Path) -> None:
    far = here.parent / "far.yaml"
    far.write_text("seed: 3\n")
    parcel = packed(here, "tune", f"--config={far}", "--out", "/shared/search")
    assert parcel.arguments == ["tune", "--config=far.yaml", "--out", "/shared/search"]
    assert (parcel.folder / "far.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["edit", "out=s3://bucket/runs/one"],
        ["edit", "out=/shared/one", "tracking.uri=sqlite:////shared/mlflow.db"],
        ["tune", "--out=/shared/one", "storage=sqlite:////shared/search.db"],
        ["tune", "--out", "s3://bucket/searches/one"],
        ["tune", "--resume=s3://bucket/searches/one"],
        ["study", "table4", "--out", "gs://bucket/studies/one"],
        ["train", "mend", "--out=s3://bucket/mend.safetensors"],
    ],
)
def test_results_may_go_to_an_address(here: Path, arguments: list[str]) -> None:
    parcel = packed(here, *arguments)
    assert parcel.notes == [] and parcel.arguments[-1] == arguments[-1]


def test_notes_name_what_is_read_on_the_cluster(here: Path) -> None:
    values = {"data": {"path": "/data/vqa.json", "pool": "s3://bucket/pool.json"}, "out": "/shared/x"}
    values |= {"editor": {"name": "elsewhere.editor"}, "backbone": {"checkpoint": "Salesforce/blip2-opt-2.7b"}}
    notes = packed(here, "edit", values=values).notes
    assert notes == [
        "data.path: /data/vqa.json is read where the job runs; it is not sent.",
        "editor.name: 'elsewhere' is not in the current folder; it has to be installed where the job runs.",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["commit", "--change", "/shared/one"], "The results of `commit` would be written into the job's own folder"),
        (["demo"], "A job runs one of commit, edit, study, train, tune; got 'demo'"),
        (["edit"], "The results of `edit` would be written into the job's own folder"),
        (["tune"], "every node has mounted or at an address: --out /shared/name"),
        (["tune", "--out", "searches/x"], "--out: 'searches/x' would be written into the job's own folder"),
        (["tune", "--resume=searches/x"], "--resume: 'searches/x' would be written"),
        (["edit", "out=runs/x"], "out: 'runs/x' would be written into the job's own folder"),
        (["edit", "out=/x", "pipeline.feature_store=features"], "pipeline.feature_store: 'features' would be written"),
        (["tune", "--out=/x", "storage=search.journal"], "storage: 'search.journal' would be written"),
        (["tune", "--out=/x", "storage=sqlite:///search.db"], "storage: 'sqlite:///search.db' would be written"),
        (["tune", "--out=/x", "storage=sqlite+pysqlite:///x.db"], "storage: 'sqlite+pysqlite:///x.db' would be"),
        (["edit", "out=/x", "tracking.uri=sqlite:///mlflow.db"], "Give a full path (sqlite:////folder/file.db) on"),
        (["edit", "out=/x", "data.path=none.json"], "data.path: there is no 'none.json' here"),
        (["commit", "out=/x", "--change=/y", "--add=none.json"], "--add: there is no 'none.json' here"),
        (["edit", "out=/x", "data.image_root=.."], "data.image_root: '..' lies outside of the current folder"),
        (["edit", "out=/x", "data.path=["], "'data.path=[': the value is not valid YAML."),
        (["edit", "out=/x", "tracking.uri=https://me:pw@host"], "tracking.uri: an address holds a password or key"),
        (["edit", "out=/x", "tracking.uri=https://token@host"], "tracking.uri: an address holds a password or key"),
        (["tune", "--out=s3://b/x?secret_key=pw"], "the command: an address holds a password or key"),
        (["edit", "out=/x", "--config", "none.yaml"], "--config: 'none.yaml' cannot be read (No such file"),
    ],
)  # fmt: skip
def test_what_would_not_arrive_or_be_lost_is_refused(here: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(packing.JobError, match=".*") as caught:
        packed(here, *arguments)
    assert expected in str(caught.value)


def test_a_password_in_the_file_is_refused_and_a_user_without_one_is_not(here: Path) -> None:
    with pytest.raises(
        packing.JobError, match="^storage: an address holds a password.*--env PGPASSWORD for PostgreSQL"
    ):
        packed(here, "tune", "--out=/x", values={"storage": "postgresql+psycopg://me:pw@host/name"})
    shutil.rmtree(here.parent / "parcel")
    packed(here, "tune", "--out=s3://b/x?region=y", values={"storage": "postgresql+psycopg://me@host/name"})


def test_too_much_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_BYTES", 1000)
    with pytest.raises(packing.JobError, match=r"more than 0 \(the largest file: odedit/"):
        packed(here, "edit", "out=/shared/x")


def test_dependencies_are_the_projects_without_ray_and_development() -> None:
    names = packing.requirements()
    assert any(line.startswith("torch") for line in names) and any(line.startswith("optuna") for line in names)
    assert not any(line.startswith(("ray", "pytest", "mypy")) for line in names)


def test_submitting_loads_no_model_library() -> None:
    code = "import sys, odedit.__main__, cluster.submit; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_cluster_that_is_not_there_and_mistakes_are_a_sentence() -> None:
    for arguments, expected in (
        (["edit", "out=/x"], "--address: no cluster takes jobs at http://127.0.0.1:9"),
        (["--stop", "job"], "--address: no cluster takes jobs"),
        ([], "Give a command"),
        (["--env", "ODEDIT_NOT_SET", "edit", "out=/x"], "--env: ODEDIT_NOT_SET not set here"),
        (["--stop", "job", "edit", "out=/x"], "Give a command"),
    ):
        result = CliRunner().invoke(app, ["submit", "--address", "http://127.0.0.1:9", *arguments])
        assert result.exit_code == 2 and expected in result.stderr, (arguments, result.output, result.exception)
