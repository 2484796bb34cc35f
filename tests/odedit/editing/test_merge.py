"""`odedit merge` and `odedit apply` of several edits: the merged checkpoint, and whether the edits hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from odedit import InputError, Probe, backbones, load_backbone, world
from odedit.__main__ import app
from odedit.backbones import Backbone
from odedit.backbones.common.generation import until_end
from odedit.data.images import ImageReader
from odedit.editing.files import load_edit, read_info, save_edit
from odedit.evaluation.scores import decoded
from odedit.inputs.prompts import find_template
from pipeline.edits import files, held
from pipeline.edits.answers import Questions
from tests.support import inline_pipeline, plain_answers, tiny_current, tiny_models
from tests.support.mmedit_files import record, write_array, write_images
from tests.support.plain_answers import MAX_TOKENS

TARGETS = ("Clara Lund", "Lower Ford", "yellow zero")  # answers in the vocabulary of the embedded models
FTL = {"name": "ftl", "learning_rate": 3e-3, "max_steps": 60}


def odedit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@dataclass(frozen=True)
class Run:
    """Three edits with their pictures.

    Attributes:
        folder: `out` of the run.
        checkpoint: Folder of the model.
        images: Folder of the edits' pictures.
    """

    family: str
    folder: Path
    checkpoint: Path
    images: Path

    @property
    def edits(self) -> list[Path]:
        return sorted((self.folder / "edits").glob("*.safetensors"))

    def merged(self, out: Path, *edits: Path) -> Result:
        result = odedit("merge", *(edits or [self.folder]), "--out", out)
        assert result.exit_code == 0, (result.output, result.exception)
        assert result.stdout.strip() == str(out)
        return result


def run(family: str, folder: Path, checkpoint: Path | None = None, **settings: Any) -> Run:
    """Edits three records with an embedded model, or with another one."""
    records = [record(number, src=f"who owns digit {number}?", alt=TARGETS[number]) for number in range(3)]
    folder.mkdir(parents=True, exist_ok=True)
    image_root, rephrase_root = write_images(folder, records)
    values = {
        "data": {
            "path": str(write_array(folder / "vqa_eval.json", records)),
            "image_root": str(image_root),
            "rephrase_root": str(rephrase_root),
        },
        "backbone": {"family": family, "checkpoint": str(checkpoint) if checkpoint else "embedded"},
        "supervision": {"locality_source": "record"},
        "editor": FTL,
        "stopping": {"worst_token_nll": 0.1},
        "evaluation": {"generate": False, "mmedit": False},
        "tracking": {"enabled": False},
        "out": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values | settings))
    with pytest.MonkeyPatch.context() as patch:
        inline_pipeline.install(patch)
        result = odedit("edit", "--config", folder / "run.yaml")
    assert result.exit_code == 0, (result.output, result.exception)
    return Run(family, folder / "out", checkpoint or world.checkpoint_path(family), image_root)


def answers_of(questions: Questions, backbone: Backbone) -> list[str]:
    return [decoded(backbone, until_end(tokens, backbone.ends)[0]) for tokens in questions.answers()]


def in_shards(folder: Path) -> Path:
    """A tiny model's checkpoint, changed to the published form: two shards, several dtypes, many other files."""
    with safe_open(folder / "model.safetensors", framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {
            name: tensors[name].to(torch.bfloat16 if "norm" in name else torch.float16) for name in names[number::2]
        }
        save_file(part, folder / file, metadata={"format": "pt", "part": str(number)})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("special_tokens_map.json", "chat_template.jinja", "merges.txt", "LICENSE", "README.md", "modeling.py"):
        if not (folder / name).exists():
            (folder / name).write_text("{}" if name.endswith("json") else name)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of every family, with its embedded model or else a tiny one."""
    made = {}
    for family in backbones.names():
        folder = tmp_path_factory.mktemp(family)
        is_embedded = family == "auto" or (world.CHECKPOINTS / family).is_dir()
        made[family] = run(family, folder, None if is_embedded else tiny_models.write(family, folder / "model"))
    return made


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of families whose tensors transformers renames when it loads them."""
    made = {}
    for family in ("llava", "auto"):
        folder = tmp_path_factory.mktemp(f"sharded-{family}")
        made[family] = run(family, folder, in_shards(tiny_current.write_family(family, folder / "model")))
    return made


def test_a_process_without_odedit_answers_as_odedit_does(runs: dict[str, Run], tmp_path: Path) -> None:
    tasks, expected = [], []
    for family, made in runs.items():
        made.merged(tmp_path / family, made.edits[0])
        infos = [read_info(path) for path in made.edits]
        questions = [(info.prompt, str(made.images / info.image)) for info in infos]
        tasks.append({"family": family, "checkpoint": str(tmp_path / family), "questions": questions})
        probes = [Probe(info.prompt, "", ImageReader(str(made.images)).read(info.image)) for info in infos]
        template, sites = find_template("mmedit"), ("layers.-1.ffn.in",)
        model = load_backbone(family, str(tmp_path / family))
        expected.append(answers_of(Questions(model, sites, probes, [MAX_TOKENS] * 3, template), model))
        source = load_backbone(family, str(made.checkpoint))
        assert answers_of(Questions(source, sites, probes, [MAX_TOKENS] * 3, template), source) != expected[-1]
    program = Path(plain_answers.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, program], input=json.dumps(tasks), capture_output=True, text=True, cwd=tmp_path,
        env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert dict(zip(runs, json.loads(done.stdout), strict=True)) == dict(zip(runs, expected, strict=True))
    ends = [answers[0] for family, answers in zip(runs, expected, strict=True) if family in ("blip2", "llava")]
    assert ends == [TARGETS[0]] * 2, "an answer and its end"


@pytest.mark.parametrize("family", backbones.names())
def test_the_files_are_the_sources(runs: dict[str, Run], family: str, tmp_path: Path) -> None:
    made = runs[family]
    made.merged(tmp_path / "merged", made.edits[0])
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {p.name for p in made.checkpoint.iterdir()}
    for path in made.checkpoint.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", ["llava", "auto"])
def test_shards_names_and_dtypes_are_the_sources(sharded: dict[str, Run], family: str, tmp_path: Path) -> None:
    made, merged = sharded[family], tmp_path / "merged"
    made.merged(merged, made.edits[0])
    left_out = {"README.md", "modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert {path.name for path in merged.iterdir()} == {p.name for p in made.checkpoint.iterdir()} - left_out
    assert (merged / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    params, _ = load_edit(made.edits[0])
    changed = {}
    for path in made.checkpoint.glob("*.safetensors"):
        assert (merged / path.name).stat().st_size == path.stat().st_size
        with safe_open(path, "pt") as before, safe_open(merged / path.name, "pt") as after:
            assert after.metadata() == before.metadata()
            assert list(after.keys()) == list(before.keys())
            for name in before.keys():  # noqa: SIM118
                old, new = before.get_tensor(name), after.get_tensor(name)
                assert new.dtype == old.dtype
                if not torch.equal(old, new):
                    changed[name] = (old, new)
    last = {"llava": 1, "auto": 2}[family]
    assert sorted(name.split(f".layers.{last}.")[1] for name in changed) == [
        "mlp.down_proj.weight",
        "mlp.up_proj.weight",
    ]
    for name, (old, new) in changed.items():
        delta = params["layers.-1.ffn.in" if "up_proj" in name else "layers.-1.ffn.out"][0]
        assert torch.equal(new, (old.float() + delta).half())


def test_a_checkpoint_of_the_hub_is_merged_from_the_cache(
    sharded: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot's files are links to blobs; merged files are not links."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some--llava" / "snapshots" / commit
    shutil.copytree(sharded["llava"].checkpoint, snapshot.with_name("files"))
    snapshot.mkdir()
    for path in snapshot.with_name("files").iterdir():
        (snapshot / path.name).symlink_to(path)
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = run("llava", tmp_path / "run", Path("some/llava"))
    made.merged(tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    sharded["llava"].merged(tmp_path / "other")
    for path in (tmp_path / "other").glob("*.safetensors"):
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def test_a_refused_merge_leaves_no_folder(runs: dict[str, Run], tmp_path: Path, capfd: Any) -> None:
    made = runs["blip2"]
    made.merged(tmp_path / "merged", made.edits[0])
    again = odedit("merge", made.edits[0], "--out", tmp_path / "merged")
    assert again.exit_code == 2 and "is there already" in again.output

    wise = run("blip2", tmp_path / "wise", editor={"name": "wise", "site": "layers.2.ffn.in", "max_steps": 1})
    for arguments, expected in (
        ([wise.folder], "cannot be merged into plain weights"),
        ([made.edits[0], wise.edits[0]], "must share editor and settings"),
        ([made.images], "the folder holds no edits"),
        ([tmp_path / "*.safetensors"], "the pattern matches no edit file"),
        (["none.safetensors"], "no such file"),
    ):
        result = odedit("merge", *arguments, "--out", tmp_path / "a" / "b")
        assert result.exit_code == 2 and expected in result.output, result.output
        assert not (tmp_path / "a").exists()

    too_large, info = load_edit(made.edits[0])
    save_edit(tmp_path / "large.safetensors", {name: value + 1e6 for name, value in too_large.items()}, info)
    result = odedit("merge", tmp_path / "large.safetensors", "--out", tmp_path / "a" / "b")
    assert result.exit_code == 2 and "not finite in the checkpoint's dtype, torch.float16" in result.output
    assert not (tmp_path / "a").exists()


def test_edits_are_files_folders_runs_and_patterns(runs: dict[str, Run], tmp_path: Path) -> None:
    made = runs["blip2"]
    (made.folder / "edits" / ".e.safetensors.host.01234567.tmp").touch()
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in made.edits:
        shutil.copy(path, copies / path.name)
    address = f"file://{made.folder}"
    for argument in (made.folder, made.folder / "edits", copies, f"{made.folder}/edits/*", f"{made.folder.parent}/o?t",
                     f"{tmp_path}/*/*[0-9].safetensors", address, f"{address}/edits/*.safetensors"):  # fmt: skip
        given = files.find([str(argument)])
        assert [file.name for file in given.files] == [path.name for path in made.edits], argument
        assert not given.notes
    with pytest.raises(InputError, match="no edit given"):
        files.find([])


def test_the_same_edit_given_twice_counts_once(runs: dict[str, Run], tmp_path: Path) -> None:
    made = runs["blip2"]
    shutil.copy(made.edits[0], tmp_path / "copy.safetensors")
    result = made.merged(tmp_path / "twice", made.edits[0], tmp_path / "copy.safetensors", made.edits[0])
    assert f"{made.edits[0].stem}: given more than once; counts once." in result.stderr
    assert "1 of 1 edit holds" in result.stderr and "Warning" not in result.stderr
    made.merged(tmp_path / "once", made.edits[0])
    weights = [tmp_path / name / "model.safetensors" for name in ("once", "twice")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    params, info = load_edit(made.edits[0])
    save_edit(tmp_path / "other.safetensors", {name: 2 * value for name, value in params.items()}, info)
    assert len(files.find([str(made.edits[0]), str(tmp_path / "other.safetensors")]).files) == 2


def test_edits_that_destroy_each_other_are_counted(runs: dict[str, Run], tmp_path: Path) -> None:
    """Two edits with opposite weights cancel, and neither holds."""
    made = runs["blip2"]
    params, info = load_edit(made.edits[0])
    opposite, rival = tmp_path / "opposite.safetensors", replace(info, edit_id="rival", target=TARGETS[1])
    save_edit(opposite, {name: -value for name, value in params.items()}, rival)
    result = made.merged(tmp_path / "merged", made.edits[0], opposite)
    contradiction = (
        f"Contradiction: 'who owns digit 0?', asked about the same picture, has different answers: 'Clara Lund' "
        f"({info.edit_id}), 'Lower Ford' (rival). At most one of these edits can hold."
    )
    assert contradiction in result.stderr
    assert "0 of 2 edits hold" in result.stderr
    assert "Warning: fewer than 95% hold." in result.stderr and f"{info.edit_id} says '" in result.stderr

    asked = odedit("apply", made.edits[0], opposite, "--prompt", "who owns this?")
    assert asked.exit_code == 0 and asked.stdout.startswith("before: ")
    assert contradiction in asked.stderr and "0 of 2 edits hold" in asked.stderr


def test_edits_are_asked_in_the_template_that_each_was_made_with(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = runs["blip2"], []

    class Watched(Questions):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            *_, probes, _, template = arguments
            asked.extend((probe.prompt, template.name) for probe in probes)

    monkeypatch.setattr(held, "Questions", Watched)
    expected = set()
    (tmp_path / "edits").mkdir()
    for number, template in enumerate(("raw", "mmedit", "raw")):
        params, info = load_edit(made.edits[number])
        save_edit(tmp_path / "edits" / f"{number}.safetensors", params, replace(info, template=template))
        expected.add((info.prompt, template))
    result = odedit("apply", tmp_path / "edits", "--prompt", "who owns this?")
    assert result.exit_code == 0 and set(asked) == expected and len(asked) == 3, (result.output, result.exception)
    assert "different prompt templates (mmedit, raw). The question was asked with the first edit's" in result.stderr


def test_an_edit_whose_answer_goes_on_does_not_hold(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the metrics, the first line of an answer is not enough."""
    made = runs["blip2"]
    answers = Questions.answers

    def with_another_line(self: Questions) -> Any:
        tokenizer, end = self._backbone.processor.tokenizer, min(self._backbone.ends)
        more = tokenizer("\nleo", add_special_tokens=False)["input_ids"]
        return [[*tokens[: tokens.index(end)], *more, end] for tokens in answers(self)]

    assert "2 of 2 edits hold" in odedit("apply", *made.edits[:2], "--prompt", "who owns this?").stderr
    monkeypatch.setattr(Questions, "answers", with_another_line)
    result = odedit("apply", *made.edits[:2], "--prompt", "who owns this?")
    assert "0 of 2 edits hold" in result.stderr and "leo' instead of 'Clara Lund'" in result.stderr, result.stderr


def test_edits_whose_picture_is_gone_cannot_be_asked(runs: dict[str, Run], tmp_path: Path) -> None:
    made = runs["blip2"]
    params, info = load_edit(made.edits[0])
    for name, changes in {
        "old": {"picture": None, "image": "", "image_root": ""},
        "moved": {"image_root": str(tmp_path / "nowhere")},
        "changed": {"picture": "another"},
    }.items():
        save_edit(tmp_path / f"{name}.safetensors", params, replace(info, edit_id=name, **changes))
    result = made.merged(tmp_path / "merged", *tmp_path.glob("*.safetensors"))
    assert "hold (whole" not in result.stderr and "Warning" not in result.stderr
    assert "Whether 3 edits hold is not known: the question cannot be asked. First reason: " in result.stderr

    text_only = replace(info, edit_id="text", picture="", image="", image_root="")
    save_edit(tmp_path / "text.safetensors", params, text_only)
    assert " of 1 edit holds" in made.merged(tmp_path / "text", tmp_path / "text.safetensors").stderr


@pytest.mark.parametrize("editor", [
    {"name": "wise", "site": "layers.2.ffn.in", "margin_out": 1.1, "margin_in": 4.5, "margin_gap": 2.2},
    {"name": "tpatcher"},
    {"name": "ftv", "learning_rate": 1e-3},
], ids=lambda editor: editor["name"])  # fmt: skip
def test_every_kind_of_edit_is_asked_when_it_is_applied(editor: dict[str, Any], tmp_path: Path) -> None:
    made = run("blip2", tmp_path, editor=editor, stopping={"worst_token_nll": 0.1, "max_steps": 60})
    result = odedit("apply", made.folder, "--prompt", "who owns this?")
    assert result.exit_code == 0, result.output
    assert " of 3 edits hold (whole answers, generated greedily)." in result.stderr
    assert "is not known" not in result.stderr


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_modes_are_what_the_umask_leaves(umask: int, file: int, folder: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        made = run("blip2", tmp_path / "run", editor={**FTL, "max_steps": 1})
        made.merged(tmp_path / "merged", made.edits[0])
    finally:
        os.umask(before)
    written = [made.folder, *made.folder.rglob("*"), tmp_path / "merged", *(tmp_path / "merged").rglob("*")]
    assert len(written) > 15
    wrong = {path: oct(path.stat().st_mode & 0o777) for path in written
             if path.stat().st_mode & 0o777 != (folder if path.is_dir() else file)}  # fmt: skip
    assert not wrong
