"""Committed models loaded from their folder: answers and the library's `generate` against the evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from PIL import Image

from odedit import EvaluationConfig, InputError, encode_requests, evaluate, load_backbone, load_edited, load_editor
from odedit.ways.common import folder as folders
from odedit.ways.common.files import CommittedInfo
from odedit.ways.common.serving import _at_end_of
from odedit.ways.routed import Routed, RoutedConfig
from odedit.world import CHECKPOINTS
from tests.support.committing import Whole, finish, requests_of, task_of
from tests.support.requests import TEMPLATE

WAY = Routed(RoutedConfig(steps=60, batch_size=24, negatives=3))
EDITOR = {"rank": 4, "sites": Routed.defaults["editor"]["sites"], "learning_rate": 2e-3}
NUM_EDITS = 4
FRAMES = {"blip2": "{}", "llava": "USER: <image>\n{} ASSISTANT:"}


@pytest.fixture(scope="module")
def committed(worlds, tmp_path_factory):
    """By family: requests, rows of the evaluation, and the folder."""

    @cache
    def commit(family: str):
        backbone, editor = load_backbone(family, "embedded"), load_editor("lora", EDITOR)
        requests = requests_of(worlds[0], "validation", NUM_EDITS)
        task = task_of(backbone, editor, requests, requests_of(worlds[0], "train", 24))
        params = finish(WAY, task)[0].params
        info = CommittedInfo(
            way="routed", way_config=asdict(WAY.config), editor="lora", editor_config=asdict(editor.config),
            family=family, checkpoint="embedded", fingerprint=str(backbone.fingerprint), dtype="float32",
            template="mmedit", edit_ids=tuple(request.edit_id for request in requests),
            details={"edits": [{"edit_id": r.edit_id, "prompt": r.edit.prompt} for r in requests], "note": "x"},
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(family) / "model"
        folder.mkdir()
        folders.write(folder, params, info)
        serving = WAY.serving(editor)
        _, evaluation = encode_requests(backbone, requests, TEMPLATE, serving.sites)
        rows = evaluate(backbone, Whole(serving, params), {}, evaluation, EvaluationConfig(mmedit=False))
        return requests, rows, folder, params, info

    return commit


def picture_of(request):
    return Image.fromarray(request.edit.picture.pixels)


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_answers_are_those_of_the_evaluation(family, committed, tmp_path):
    requests, rows, folder, params, info = committed(family)
    model = load_edited(folder)
    assert [row["answer_after"] for row in rows] == [request.edit.target for request in requests]
    for request, row in zip(requests, rows, strict=True):
        is_caption = request.edit.is_caption
        assert model.answer(picture_of(request), request.edit.prompt, is_caption=is_caption) == row["answer_after"]
    picture_of(requests[0]).save(tmp_path / "one.png")
    assert model.answer(tmp_path / "one.png", requests[0].edit.prompt) == requests[0].edit.target
    assert model.answer(None, requests[0].edit.prompt) != requests[0].edit.target
    read, read_info = folders.read(folder)
    assert read.keys() == params.keys() and all(torch.equal(value, read[name]) for name, value in params.items())
    assert read_info.edit_ids == info.edit_ids and read_info.details == {"note": "x"}
    assert [edit["prompt"] for edit in folders.read_edits(folder)[1]] == [r.edit.prompt for r in requests]


@pytest.mark.parametrize("family", ["blip2", "llava"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_the_library_generates_the_same_answers(family, settings, committed):
    """A batch of prompts of different lengths, with what the library's processor makes of them."""
    from transformers import AutoProcessor

    requests, _, folder, _, _ = committed(family)
    model, processor = load_edited(folder), AutoProcessor.from_pretrained(CHECKPOINTS / family)
    processor.tokenizer.padding_side = "left"
    texts = [FRAMES[family].format(TEMPLATE.render(request.edit)[0]) for request in requests]
    inputs = processor(images=[picture_of(r) for r in requests], text=texts, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()

    def answers(generate):
        made = generate(**inputs, do_sample=False, max_new_tokens=8, **settings)
        words = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in words]

    assert answers(model.generate) == [request.edit.target for request in requests]
    assert answers(model.model.generate) == [request.replaced for request in requests]  # no hook is left


@pytest.mark.parametrize(
    ("mask", "rows", "expected"),
    [
        (None, 2, [5, 5]),
        ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], 2, [5, 5]),
        ([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], 2, [2, 4]),
        ([[1, 1, 0, 0], [1, 1, 1, 1]], 4, [3, 3, 5, 5]),  # two beams each, and two image positions before the text
    ],
)
def test_the_router_reads_the_last_token_of_the_prompt(mask, rows, expected):
    positions = _at_end_of(None if mask is None else torch.tensor(mask))
    assert positions(torch.zeros(rows, 6, 1)).flatten().tolist() == expected
    assert positions(torch.zeros(rows, 1, 1)) is None  # a later token keeps the choice


def test_a_plain_folder_is_served_without_hooks(tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(CHECKPOINTS / "blip2", folder)
    model = load_edited(folder)
    assert model.params is None and model.template.name == "mmedit"
    assert model.answer(None, "what is the capital of arland?") == load_edited(str(folder)).answer(
        None, "what is the capital of arland?", max_tokens=5
    )
    assert model.answer(None, "what is the capital of arland?")


def test_what_cannot_be_loaded_is_refused(committed, tmp_path):
    _, _, folder, _, info = committed("blip2")
    with pytest.raises(InputError, match="no such folder; `odedit commit` writes one"):
        load_edited(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a routed model"):
        load_edited(tmp_path)
    with pytest.raises(InputError, match="assistant_model does not; leave it out"):
        load_edited(folder).generate(assistant_model=object())

    def changed(**values):
        copied = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copied)
        folders.write_edits(copied, replace(info, **values))
        return copied

    with pytest.raises(InputError, match="was committed to 'embedded' and not to 'embedded': it was made for another"):
        load_edited(changed(fingerprint="0" * 24))
    with pytest.raises(InputError, match=r"unknown model family 'os.path'"):
        load_edited(changed(family="os.path"))
    with pytest.raises(InputError, match="made by the way 'os.path', which is not in the package"):
        load_edited(changed(way="os.path"))
    with pytest.raises(InputError, match=r"files are of different models \(1 edits in edits.json, 4 in the others\)"):
        load_edited(changed(edit_ids=("one",)))
    broken = changed()
    (broken / folders.EDITS).write_text(json.dumps({"format": folders.FORMAT}))
    with pytest.raises(InputError, match=r"edits.json' is damaged"):
        load_edited(broken)
    shutil.copy(folder / folders.EDITS, broken / folders.EDITS)
    (broken / folders.ADAPTERS).write_bytes(b"")
    with pytest.raises(InputError, match=r"adapters.safetensors' cannot be read as safetensors"):
        load_edited(broken)
