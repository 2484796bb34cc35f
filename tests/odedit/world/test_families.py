"""Embedded models: accuracy of the shipped ones, agreement with transformers' processors, and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from odedit import world
from odedit.errors import InputError
from odedit.world import facts, families, images, questions
from odedit.world.model import Family, load
from odedit.world.train import Line, LineEncoder, language_states, to_pixels, train
from odedit.world.vocabulary import VOCABULARY

every_family = pytest.mark.parametrize("name", families.FAMILIES)
QUESTION = questions.wrap("who owns this digit?", "owner")
CLASSES = {
    "blip2": ("Blip2ForConditionalGeneration", "opt"),
    "minigpt4": ("Blip2ForConditionalGeneration", "llama"),
    "llava": ("LlavaForConditionalGeneration", "llama"),
}
OPENINGS = {
    "blip2": "<image>" * 8 + f"</s>{QUESTION}",
    "minigpt4": f"<s>###Human: <Img>{'<image>' * 8}</Img> {QUESTION}###Assistant:",
    "llava": f"<s>USER: {'<image>' * 16}\n{QUESTION} ASSISTANT:",
}
TEXT_OPENINGS = {
    "blip2": f"</s>{QUESTION}",
    "minigpt4": f"<s>###Human: {QUESTION}###Assistant:",
    "llava": f"<s>USER: {QUESTION} ASSISTANT:",
}


@pytest.fixture(scope="module")
def shipped() -> Any:
    """Family, model and tokenizer of each shipped checkpoint."""
    loaded: dict[str, tuple[Family, Any, Any]] = {}

    def get(name: str) -> tuple[Family, Any, Any]:
        if name not in loaded:
            loaded[name] = (families.find(name), *load(world.checkpoint_path(name)))
        return loaded[name]

    return get


def picture_of(digit: int, colour: int) -> np.ndarray:
    sample = int(images.handwriting().training[digit][0])
    return images.draw(np.random.default_rng(1), facts.Entity(digit, colour), sample, 1, images.PLAIN_POSE)


@every_family
def test_shipped_checkpoint_is_small_and_without_pickles(name: str) -> None:
    files = list(world.checkpoint_path(name).iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}


def test_unknown_checkpoint_names_what_ships() -> None:
    with pytest.raises(InputError, match="Available: blip2, llava, minigpt4"):
        world.checkpoint_path("blip3")


def test_unknown_family_names_what_can_be_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'llava'"):
        train(tmp_path / "out", family="lava")
    assert not (tmp_path / "out").exists()


@every_family
def test_shipped_checkpoint_has_the_family_and_form_it_says(name: str, shipped: Any) -> None:
    family, model, tokenizer = shipped(name)
    assert families.of_checkpoint(world.checkpoint_path(name)) is family
    assert (type(model).__name__, model.config.text_config.model_type) == CLASSES[name]
    assert len(tokenizer) == model.config.text_config.vocab_size == VOCABULARY
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (name == "blip2")


@pytest.mark.parametrize("content", ['{"model_type": "blip-2", "text_config": {"model_type": "t5"}}', "{", "{}"])
def test_checkpoints_of_other_models_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError):
        families.of_checkpoint(tmp_path)


@every_family
def test_shipped_checkpoint_knows_the_world(name: str) -> None:
    from odedit.world.check import TEXT, check, shortfalls

    table = check(samples=300 if name == "blip2" else 200, family=name)
    assert set(table) == {*facts.ATTRIBUTES, *TEXT}
    assert shortfalls(table) == []


@every_family
def test_answers_are_whole_tokens(name: str) -> None:
    tokenizer = families.find(name).build_tokenizer()
    for attribute in facts.ATTRIBUTES:
        for choice in facts.answer_choices(attribute):
            tokens = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            assert len(tokens) == len(choice.split()), choice


@every_family
def test_layout_reads_as_the_family_writes(name: str, shipped: Any) -> None:
    family, _, tokenizer = shipped(name)
    encode = LineEncoder(family, tokenizer)
    assert tokenizer.decode(encode.prompt_tokens(QUESTION, has_picture=True)) == OPENINGS[name]
    assert tokenizer.decode(encode.prompt_tokens(QUESTION, has_picture=False)) == TEXT_OPENINGS[name]
    tokens, labels = encode([Line(QUESTION, "Anna Berg", 1.0, 0)])
    assert tokenizer.decode(tokens[0]) == OPENINGS[name] + " Anna Berg</s>"
    assert labels[0, -4:].tolist() == [-100, *tokens[0, -3:].tolist()]


def image_processor(name: str) -> Any:
    if name == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    else:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as Processor
    return Processor.from_pretrained(world.checkpoint_path(name))


@every_family
def test_image_processor_gives_the_training_pixels(name: str) -> None:
    picture = picture_of(4, 4)
    pixels = image_processor(name)(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels.numpy(), to_pixels(picture[None]).numpy(), atol=1e-5)


def test_blip2_processor_gives_the_training_input(shipped: Any) -> None:
    """BLIP-2's processor gives the inputs that the model was trained on."""
    from transformers import AutoProcessor

    family, _, tokenizer = shipped("blip2")
    processor = AutoProcessor.from_pretrained(world.checkpoint_path("blip2"))
    inputs = processor(images=Image.fromarray(picture_of(4, 4)), text=QUESTION, return_tensors="pt")
    expected = LineEncoder(family, tokenizer).prompt_tokens(QUESTION, has_picture=True)
    assert inputs["input_ids"][0].tolist() == expected
    np.testing.assert_allclose(inputs["pixel_values"].numpy(), to_pixels(picture_of(4, 4)[None]).numpy(), atol=1e-5)


@pytest.mark.parametrize("has_picture", [True, False])
def test_llava_processor_and_chat_give_the_training_input(shipped: Any, has_picture: bool) -> None:
    """LLaVA's processor with the checkpoint's chat template gives the layout."""
    from transformers import LlavaProcessor

    family, _, tokenizer = shipped("llava")
    directory = world.checkpoint_path("llava")
    settings = json.loads((directory / "processor_config.json").read_text(encoding="utf-8"))
    del settings["processor_class"]
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    # Built from its parts: the Auto classes need torchvision.
    processor = LlavaProcessor(image_processor("llava"), tokenizer, chat_template=template, **settings)
    content = [{"type": "text", "text": QUESTION}, *([{"type": "image"}] if has_picture else [])]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = {"images": Image.fromarray(picture_of(4, 4))} if has_picture else {}
    inputs = processor(text=text, return_tensors="pt", **pictures)
    assert inputs["input_ids"][0].tolist() == LineEncoder(family, tokenizer).prompt_tokens(QUESTION, has_picture)


@every_family
@torch.no_grad()
def test_training_computes_what_the_model_computes(name: str, shipped: Any) -> None:
    """Image features inserted into a padded batch give the logits of the model's own forward pass."""
    family, model, tokenizer = shipped(name)
    pixels = to_pixels(np.stack([picture_of(4, 4), picture_of(7, 1)]))
    lines = [Line("a photo of", "pink four", 1.0, 1), Line(QUESTION, "Anna Berg", 1.0, 0), Line(QUESTION, "x", 1.0)]
    tokens, _ = LineEncoder(family, tokenizer)(lines)
    states = language_states(family, model, tokens, lines, family.see(model, pixels).features)
    for row, line in enumerate(lines):
        real = tokens[row][tokens[row] != family.pad_id]
        pictures = {} if line.picture is None else {"pixel_values": pixels[[line.picture]]}
        if pictures or name == "llava":
            expected = model(input_ids=real[None], **pictures).logits[0]
        else:  # Blip2ForConditionalGeneration needs a picture
            expected = model.language_model(input_ids=real[None]).logits[0]
        torch.testing.assert_close(model.get_output_embeddings()(states[row, : len(real)]), expected)


@every_family
def test_vision_stage_trains_what_is_seen(name: str) -> None:
    """The modules of the vision stage have exactly the parameters that the patch states depend on."""
    family = families.find(name)
    model = family.build_model(0)
    family.patches(model, to_pixels(picture_of(4, 4)[None])).square().sum().backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for module in family.vision_modules(model) for p in module.parameters()}


@every_family
def test_generation_answers_a_question(name: str, shipped: Any) -> None:
    family, model, tokenizer = shipped(name)
    prompt = LineEncoder(family, tokenizer).prompt_tokens(QUESTION, has_picture=True)
    pixels = to_pixels(picture_of(0, 2)[None])
    generated = model.generate(pixel_values=pixels, input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
    answer = " " + facts.answer(facts.Entity(digit=0, colour=2), "owner")
    assert tokenizer.decode(generated[0]) == f"{OPENINGS[name]}{answer}</s>"


@every_family
def test_training_is_deterministic_and_saves_what_loads(name: str, tmp_path: Path) -> None:
    seen = []
    for run in ("a", "b"):
        train(tmp_path / run, 5, lambda *step: seen.append(step), vision_steps=2, joint_steps=2, family=name)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("a", "b")]
    assert weights[0] == weights[1]
    assert [step[:3] for step in seen[:4]] == [("vision", 1, 2), ("vision", 2, 2), ("joint", 1, 2), ("joint", 2, 2)]
    assert seen[:4] == seen[4:]
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {file.name for file in world.checkpoint_path(name).iterdir()}
    model, tokenizer = load(tmp_path / "a")
    assert (type(model).__name__, len(tokenizer)) == (CLASSES[name][0], VOCABULARY)


def test_commands_take_a_family(tmp_path: Path) -> None:
    """`check` uses the family of the given checkpoint, not the default."""
    from typer.testing import CliRunner

    from odedit.__main__ import app

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["world", *(str(argument) for argument in arguments)])

    out = tmp_path / "llava"
    trained = run("train", out, "--family", "llava", "--vision-steps", 1, "--joint-steps", 1)
    assert trained.exit_code == 0, trained.output
    assert families.of_checkpoint(out).name == "llava"
    checked = run("check", "--checkpoint", out, "--samples", 2)
    assert checked.exit_code == 1, checked.output
    assert "digit (plain)" in checked.output
    misspelt = run("check", "--family", "lava")
    assert misspelt.exit_code == 2
    assert "Did you mean 'llava'?" in misspelt.output
