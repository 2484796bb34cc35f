"""Every family on tiny random weights, against the forward of the library's class on single sequences."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from odedit import InputError, Picture, Probe, load_backbone
from odedit.backbones import encode_requests, fingerprint, load_processor
from odedit.backbones.common.decoders import LlamaDecoder
from odedit.backbones.common.generation import EXTRA_TOKENS, NO_TOKEN, generate, until_end
from odedit.runtime.kv_cache import KVCache
from tests.support import reading, tiny_models
from tests.support.limits import set_limits
from tests.support.requests import TEMPLATE, make_picture, make_request
from tests.support.tiny_current import FAMILIES, SIDES, write_family


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    return write_family(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def model(directory):
    return load_backbone(directory.name, str(directory), image_size=SIDES.get(directory.name))


@pytest.fixture(scope="module")
def requests():
    return [make_request(number, full=number != 1) for number in range(3)]


@pytest.fixture(scope="module")
def batch(model, requests):
    return encode_requests(model, requests, TEMPLATE)[1]


def probes_of(request):
    return {"rel": request.edit, **request.probes}


@torch.no_grad()
def library_logits(model, ids, picture):
    """Logits of the library's forward, `(length, V)`."""
    if picture is None:
        text = model.model.language_model if model.family == "minigpt4" else model.model
        return text(input_ids=ids).logits[0]
    if model.family == "auto":
        image = Image.fromarray(picture.pixels).resize((SIDES["auto"],) * 2, Image.Resampling.BICUBIC)
        seen = model.processor._images(image, return_tensors="pt")
        types = (ids == model.model.config.image_token_id).int()
        return model.model(input_ids=ids, **seen, mm_token_type_ids=types).logits[0]
    pixels = model.processor._images(Image.fromarray(picture.pixels), return_tensors="pt")["pixel_values"]
    return model.model(input_ids=ids, pixel_values=pixels).logits[0]


@pytest.mark.parametrize("site", ["layers.0.ffn.gate", "layers.1.attention.out", "layers.-1.ffn.out", "connector"])
def test_prefix_and_suffix_equal_the_full_model(model, requests, batch, site):
    """In a right-padded batch, with and without pictures, from a layer or from the connector on."""
    if site == "connector":
        site = model.connector_sites()[-1]
        batch = encode_requests(model, requests, TEMPLATE, (site,))[1]
    with torch.no_grad():
        logits = model.head(model.suffix(model.prefix(batch, site)))
    pictures = set()
    for e, request in enumerate(requests):
        for k, slot in enumerate(batch.slots):
            if not batch.present_EK[e, k]:
                continue
            length = int(batch.real_EKS[e, k].sum())
            picture = probes_of(request)[slot].picture
            pictures.add(picture is None)
            expected = library_logits(model, batch.tokens_EKS[e, k, :length][None], picture)
            torch.testing.assert_close(logits[e, k, :length], expected, rtol=1e-4, atol=1e-4)
    assert pictures == {True, False}
    assert len(set(batch.real_EKS.sum(dim=-1).flatten().tolist())) > 2, "no sequence is padded"


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("site", reading.SITES)
def test_the_positions_that_are_read_are_those_of_the_whole(model, batch, site, positionwise):
    reading.check(model, batch, site, positionwise)


def test_a_prefix_in_parts_is_that_of_the_whole(model, batch, monkeypatch):
    site, real_RS = "layers.-1.ffn.in", batch.real_EKS.flatten(0, 1)
    whole = model.prefix(replace(batch, lengths=()), site).hidden_RSD
    shapes = []
    below = model._layers_below

    def watched(*arguments):
        part_RSD = below(*arguments)
        shapes.append(tuple(part_RSD.shape[:2]))
        return part_RSD

    monkeypatch.setattr(model, "_layers_below", watched)
    set_limits(monkeypatch, prefix_positions=2 * batch.tokens_EKS.shape[2])
    parts = model.prefix(batch, site).hidden_RSD
    torch.testing.assert_close(parts[real_RS], whole[real_RS], rtol=1e-4, atol=1e-4)
    rows, lengths = zip(*shapes, strict=True)
    assert sum(rows) == len(whole) and all(n * length <= 2 * max(lengths) for n, length in shapes)
    assert len(rows) > 2 and len(set(lengths)) == 2


def test_padding_and_batch_mates_change_nothing(model, requests, batch):
    together = model.suffix(model.prefix(batch, "layers.1.ffn.in"))
    for e, request in enumerate(requests):
        alone = encode_requests(model, [request], TEMPLATE)[1]
        states = model.suffix(model.prefix(alone, "layers.1.ffn.in"))
        for k, slot in enumerate(alone.slots):
            length = int(alone.real_EKS[0, k].sum())
            expected = together[e, batch.slots.index(slot), :length]
            torch.testing.assert_close(states[0, k, :length], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generated_answers_go_on_behind_the_longest_sequence(model, requests, batch):
    """Equal to token-by-token decoding with the library's forward, for every kind of position ids."""
    kv_cache = KVCache()
    prefix = model.prefix(batch, "layers.1.ffn.in", kv_cache=kv_cache)
    first = model.head(model.suffix(prefix, batch.with_room(1, 0, 640).predict_EKT, kv_cache)).argmax(-1)
    made = generate(model, batch, prefix, kv_cache, first)
    lengths_EK = batch.real_EKS.sum(-1)
    longest, at = int(lengths_EK.max()), divmod(int(lengths_EK.argmax()), len(batch.slots))
    beyond = 0
    for e, k in (at, (0, batch.slots.index("t_loc")), (2, batch.slots.index("m_loc_near"))):
        probe = probes_of(requests[e])[batch.slots[k]]
        cell = model.sequence(probe, TEMPLATE)
        tokens, count = cell.tokens[: cell.first_target], len(cell.tokens) - cell.first_target
        for _ in range(count + EXTRA_TOKENS):
            tokens.append(int(library_logits(model, torch.tensor([tokens]), probe.picture)[-1].argmax()))
        expected = until_end(tokens[cell.first_target :], model.ends)
        assert until_end(made[e, k, : count + EXTRA_TOKENS].tolist(), model.ends) == expected
        beyond = max(beyond, cell.first_target + len(expected[0]) - longest)
    assert beyond > 1, "no answer goes on behind the longest sequence"


def test_an_answer_is_cut_off_at_the_last_position(model, requests, batch, monkeypatch):
    length = batch.tokens_EKS.shape[-1]
    monkeypatch.setattr(model, "max_positions", length + 2)
    kv_cache = KVCache()
    prefix = model.prefix(batch, "layers.1.ffn.in", kv_cache=kv_cache)
    first = model.head(model.suffix(prefix, batch.with_room(1, 0, length + 2).predict_EKT, kv_cache)).argmax(-1)
    made = generate(model, batch, prefix, kv_cache, first)
    roomy = batch.with_room(EXTRA_TOKENS, 0, length + 2)
    assert torch.equal(made == NO_TOKEN, ~roomy.target_mask_EKT), "tokens beyond the last position are NO_TOKEN"
    for row, count in zip(made.flatten(0, 1).tolist(), roomy.target_mask_EKT.sum(-1).flatten().tolist(), strict=True):
        answer, has_ended = until_end(row, model.ends)
        assert has_ended or len(answer) == count
    assert int(roomy.predict_EKT.max()) == length + 1
    assert int((roomy.target_mask_EKT.sum(-1) - batch.target_mask_EKT.sum(-1)).min()) < EXTRA_TOKENS


def test_end_tokens_are_those_of_the_checkpoint_and_the_family(model, monkeypatch):
    tokenizer = model.processor.tokenizer
    assert tokenizer.eos_token_id in model.ends
    words = {tokenizer.decode([token]) for token in model.ends}
    assert ("###" in words) == (model.family == "minigpt4"), words
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [7, 9])
    assert {7, 9, tokenizer.eos_token_id} <= model._ends()


LAYOUT = {
    "minigpt4": ("<s>###Human: <Img>", "</Img> {}###Assistant:", "<s>###Human: {}###Assistant:", " "),
    "llava": ("<s>USER: ", "\n{} ASSISTANT:", "<s>USER: {} ASSISTANT:", " "),
    "auto": (
        "<|im_start|>user\n<|vision_start|>",
        "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "",
    ),
}
POSITIONS = {"minigpt4": 3, "llava": 16, "auto": 16}


@pytest.mark.parametrize("is_caption", [False, True])
def test_the_layout_is_the_familys(model, is_caption):
    before, after, alone, space = LAYOUT[model.family]
    prompt = "who is it?" if is_caption else "Question: who is it? Short answer:"
    decode = model.processor.tokenizer.decode
    seen = model.sequence(Probe("who is it?", "anna", make_picture(0), is_caption), TEMPLATE)
    assert list(seen.image) == list(range(seen.image[0], seen.image[0] + POSITIONS[model.family]))
    assert decode(seen.tokens[: seen.image[0]]) == before
    assert decode(seen.tokens[seen.image[-1] + 1 :]) == after.format(prompt) + space + "anna"
    assert decode(seen.tokens[seen.first_target :]) == space + "anna"
    text = model.sequence(Probe("who is it?", "anna", None, is_caption), TEMPLATE)
    assert decode(text.tokens) == alone.format(prompt) + space + "anna"
    assert decode(text.tokens[text.first_target :]) == space + "anna" and not len(text.image)


def test_llava_builds_what_its_own_processor_builds(tmp_path):
    from transformers import LlavaProcessor

    model = load_backbone("llava", str(tiny_models.write("llava", tmp_path)))
    library = LlavaProcessor(
        model.processor._images, model.processor.tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    pixels = np.random.default_rng(5).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    text = "USER: <image>\nQuestion: who is it? Short answer: ASSISTANT: anna"
    inputs = library(images=Image.fromarray(pixels), text=text, return_tensors="pt")
    made = model.sequence(Probe("who is it?", "anna", Picture("wide", pixels)), TEMPLATE)
    assert made.tokens == inputs["input_ids"][0].tolist()
    processed = model.processor.process(Picture("wide", pixels))
    assert torch.equal(torch.from_numpy(processed.pixels), inputs["pixel_values"][0])
    assert model.processor.process(processed) is processed


def test_every_linear_of_the_connector_is_a_site_that_runs(model, requests):
    sites = model.connector_sites()
    before = encode_requests(model, requests, TEMPLATE, sites)[0]
    rows = before.present_EK.numel()
    seen = {}
    handles = [
        model.site(site).register_forward_hook(lambda _, args, out, site=site: seen.__setitem__(site, args[0]))
        for site in sites
    ]
    model.suffix(model.prefix(before, *sites))
    for handle in handles:
        handle.remove()
    assert set(seen) == set(sites) and len(sites) == len(set(sites)) >= 2
    assert all(value.reshape(rows, -1, value.shape[-1]).shape[0] == rows for value in seen.values())


def test_sites_and_activations(model):
    x = torch.randn(4, 5)
    assert model.site("layers.1.ffn.in").out_features == model.site("layers.1.ffn.gate").out_features == 48
    assert model.site("layers.1.ffn.out").in_features == 48
    torch.testing.assert_close(model.activation("layers.0.ffn.gate")(x), x * torch.sigmoid(x))
    assert torch.equal(model.activation("layers.0.ffn.in")(x), x)
    assert torch.equal(model.activation("layers.0.ffn.out")(x), x)
    with pytest.raises(InputError, match=r"feeds no activation: .*ffn\.gate, ffn\.in, ffn\.out"):
        model.activation("layers.0.attention.q")


def test_saved_again_the_processor_is_the_same(model, directory, tmp_path):
    model.processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    again = load_processor(directory.name, str(tmp_path), image_size=SIDES.get(directory.name))
    picture, text = make_picture(3), "who owns this digit?"
    assert np.array_equal(again.process(picture).pixels, model.processor.process(picture).pixels)
    assert again.tokenizer(text)["input_ids"] == model.processor.tokenizer(text)["input_ids"]


def test_weights_and_wrong_classes_are_told_apart(model, directory, tmp_path):
    assert fingerprint(directory.name, str(directory)) == model.fingerprint
    other = write_family(directory.name, tmp_path / "other", seed=1)
    assert fingerprint(directory.name, str(other)) != model.fingerprint
    if model.family != "auto":
        with pytest.raises(InputError, match=f"family '{directory.name}' takes {type(model.model).__name__}"):
            load_backbone(directory.name, str(tmp_path_of_blip2()))
    with pytest.raises(InputError, match="family 'blip2' takes Blip2ForConditionalGeneration with an OPT text model"):
        load_backbone("blip2", str(directory))


def tmp_path_of_blip2():
    from odedit import world

    return world.checkpoint_path("blip2")


def test_another_image_tower_is_named(tmp_path):
    directory = tiny_models.write("llava", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"] = {"model_type": "siglip_vision_model"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="image tower 'siglip_vision_model'; family 'llava' takes clip_vision_model"):
        load_processor("llava", str(directory))


def test_llava_with_all_tokens_of_two_layers(tmp_path):
    """The class token is kept, and the states of two layers are concatenated."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    directory = tiny_models.write("llava", tmp_path)
    config = LlavaConfig(
        text_config=LlamaConfig(**tiny_models._TEXT), vision_config=CLIPVisionConfig(**tiny_models._VISION),
        image_token_index=tiny_models.IMAGE, vision_feature_layer=[-2, 1], vision_feature_select_strategy="full",
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    model = load_backbone("llava", str(directory))
    request = make_request(0)
    batch = encode_requests(model, [request], TEMPLATE, (model.connector_sites()[0],))[0]
    assert batch.features_NLD.shape[1:] == (17, model.vision_width) and model.vision_width == 48
    logits = model.head(model.suffix(model.prefix(batch, "layers.0.attention.q")))[0, 0]
    length = int(batch.real_EKS[0, 0].sum())
    expected = library_logits(model, batch.tokens_EKS[0, 0, :length][None], request.edit.picture)
    torch.testing.assert_close(logits[:length], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_relatives_of_llama(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**tiny_models._TEXT, sliding_window=16)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    decoder = LlamaDecoder(model.model, model.lm_head)
    ids = torch.randint(5, 200, (2, 12))
    with torch.no_grad():
        hidden = decoder.embed_positions(decoder.embed_tokens(ids))
        rotary = decoder.rotary(hidden, None)
        for layer in range(decoder.num_layers):
            hidden = decoder.ffn_half(layer, decoder.attention_half(layer, hidden, rotary))
        torch.testing.assert_close(decoder.head(decoder.finish(hidden)), model(ids).logits, rtol=1e-4, atol=1e-5)
    if kind == "Mistral":
        assert decoder.max_positions == 16
    with pytest.raises(InputError, match="its head with a bias"):
        LlamaDecoder(model.model, nn.Linear(32, 8))


def test_a_family_from_outside_the_package(tmp_path):
    """A module given by its dotted name, without registration: it encodes, edits and is scored."""
    from odedit import Objective, ObjectiveConfig, Stopping, edit, evaluate, load_editor, stack_params

    directory = str(tiny_models.write("llava", tmp_path))
    model = load_backbone("outside.terse_llava", directory)
    assert fingerprint("outside.terse_llava", directory) == model.fingerprint
    editor = load_editor("ftl", {"learning_rate": 3e-2, "sites": ("layers.0.ffn.in", "layers.0.ffn.gate")})
    supervision, evaluation = encode_requests(model, [make_request(0), make_request(1)], TEMPLATE, editor.sites)
    length = int(supervision.real_EKS[0, 0].sum())
    ids = supervision.tokens_EKS[0, 0, :length]
    assert model.processor.tokenizer.decode(ids[17:]) == "Question: who owns this digit? Short answer: anna hill"
    logits = model.head(model.suffix(model.prefix(supervision, "layers.0.ffn.in")))[0, 0, :length]
    expected = library_logits(model, ids[None], make_request(0).edit.picture)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    results = edit(model, editor, Objective(ObjectiveConfig(name="native")), supervision, Stopping(max_steps=60))
    rows = evaluate(model, editor, stack_params([result.params for result in results]), evaluation)
    assert [row["rel"] for row in rows] == [1.0, 1.0] and min(row["rel_before"] for row in rows) < 1.0


def test_half_precision_follows_float32(model, directory, requests):
    """Every family takes float32 pixels and computes in the model's type, from the connector on too."""
    half = load_backbone(directory.name, str(directory), dtype="bfloat16", image_size=SIDES.get(directory.name))
    site = model.connector_sites()[-1]
    logits = []
    for backbone in (model, half):
        batch = encode_requests(backbone, requests, TEMPLATE, (site,))[1]
        with torch.no_grad():
            logits.append(backbone.head(backbone.suffix(backbone.prefix(batch, site)))[batch.real_EKS])
    assert batch.features_NLD.dtype == torch.bfloat16 and logits[1].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().mean() < 0.1 * logits[0].abs().mean()
