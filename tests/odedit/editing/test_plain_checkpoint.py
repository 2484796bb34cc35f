"""The written checkpoint as another user of the machine and another program find it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from odedit import load_backbone, load_editor
from odedit.editing.merging import export
from odedit.storage.atomic import folder_written_atomically
from odedit.storage.location import at
from odedit.storage.tensors import write_tensors
from tests.support import committed, tiny_models
from tests.support.committed import TARGETS

ANSWERS = """
import json
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, layout, questions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
dtype = model.get_output_embeddings().weight.dtype
answers = [str(dtype)]
for question, path in questions:
    text = layout.replace("{text}", f"Question: {question} Short answer:")
    inputs = processor(images=Image.open(path), text=text, return_tensors="pt").to(dtype)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    answers.append(processor.decode(made, skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_are_what_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    source = tiny_models.write("llava", tmp_path / "source")
    for path in source.iterdir():
        path.chmod(0o600)
    (source / "additional_chat_templates").mkdir(mode=0o700)
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    backbone, editor = load_backbone("llava", str(source)), load_editor("ftl", {})
    before = os.umask(umask)
    try:
        export(backbone, editor, {"layers.-1.ffn.in": torch.ones(1, 48, 32)}, tmp_path / "above" / "merged")
        with folder_written_atomically(tmp_path / "above" / "adapter") as folder:
            write_tensors(at(folder / "weights"), {"w": torch.ones(2)}, {})
    finally:
        os.umask(before)
    paths = [tmp_path / "above", *(tmp_path / "above").rglob("*")]
    assert len(paths) > 8
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_half_precision_source_stays_half(tmp_path: Path) -> None:
    source = tiny_models.write("llava", tmp_path / "source")
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            tensors[name] = stream.get_tensor(name).half()
    write_tensors(at(source / "model.safetensors"), tensors, {"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | {"dtype": "float16"}
    (source / "config.json").write_text(json.dumps(settings))
    backbone, editor = load_backbone("llava", str(source)), load_editor("ftl", {})
    export(backbone, editor, {"layers.-1.ffn.in": torch.full((1, 48, 32), 0.5)}, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_text() == (source / "config.json").read_text()
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as after:
        assert list(after.keys()) == sorted(tensors)
        changed = [name for name in tensors if not torch.equal(after.get_tensor(name), tensors[name])]
        assert {after.get_tensor(name).dtype for name in tensors} == {torch.float16}
    (name,) = changed
    assert name.endswith("layers.1.mlp.up_proj.weight")
    assert load_backbone("llava", str(tmp_path / "merged"), dtype="float16").model.dtype == torch.float16


LAYOUTS = {
    "blip2": "{text}",
    "minigpt4": "###Human: <Img><image></Img> {text}###Assistant:",
    "llava": "USER: <image>\n{text} ASSISTANT:",
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_automatic_classes_answer_in_the_stored_type(family: str, tmp_path: Path) -> None:
    """`AutoProcessor` and `AutoModelForImageTextToText` without arguments: weights in float16, as they are stored."""
    made = committed.make(tmp_path, family)
    assert made.backbone.plain_use().with_picture == LAYOUTS[family]  # type: ignore[union-attr]
    questions = [(question, str(made.images / image)) for question, image in made.questions]
    output = committed.without_odedit(ANSWERS, made.out / "model", LAYOUTS[family], json.dumps(questions), cwd=tmp_path)
    dtype, *answers = json.loads(output)
    assert dtype == "torch.float16"
    assert answers[0] == TARGETS[0] and answers == committed.answers(made)


def test_the_chat_of_minigpt4_is_its_layout(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from odedit import world

    processor = AutoProcessor.from_pretrained(world.checkpoint_path("minigpt4"))
    content = [{"type": "image"}, {"type": "text", "text": "who?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == LAYOUTS["minigpt4"].replace("{text}", "who?")
