"""Tiny models of many families through `auto`, against the library's own processor and `generate`."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image

from odedit import (
    EditRequest,
    InputError,
    Objective,
    ObjectiveConfig,
    Picture,
    Probe,
    Stopping,
    edit,
    load_backbone,
    load_editor,
    stack_params,
    world,
)
from odedit.backbones import encode_requests, inspect_backbone, is_connector
from odedit.backbones.common.decoders import FUSED
from odedit.backbones.common.feature_cache import with_feature_cache
from odedit.backbones.common.feature_store import FeatureStore
from odedit.backbones.common.generation import EXTRA_TOKENS, generate, until_end
from odedit.backbones.common.traced_decoder import TracedDecoder
from odedit.editing.merging import export
from odedit.runtime.kv_cache import KVCache
from odedit.runtime.lru import LRU
from odedit.ways.common.sequences import about
from tests.support import reading, tiny_current
from tests.support.requests import TEMPLATE

SERVED = (
    "llava", "blip2", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl", "gemma3",
    "paligemma", "idefics3", "vipllava", "glm4v", "llava_phi3", "llava_persimmon",
)  # fmt: skip
REFUSED = {
    "instructblip": "features depend on the prompt's text (qformer_input_ids)",
    "blip2_t5": "an encoder with a decoder",
    "mllama": "it has no get_image_features",
    "aya": "layers.0 is not an attention half followed by a feed-forward half",
    "qwen3_vl_moe": "routed experts",
}
SIZES = ((60, 80), (200, 300), (96, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=SERVED)
def model(request, folder):
    return load_backbone("auto", str(tiny_current.write(request.param, folder / request.param)))


def picture(number: int) -> Picture:
    """A picture of one of three unlike sizes."""
    shape = (*SIZES[number % len(SIZES)], 3)
    return Picture(f"unlike-{number}", np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def requests():
    def one(number: int) -> EditRequest:
        edit = Probe("who owns this digit?", ("anna hill", "leo stone", "ruby")[number], picture(number))
        probes = {
            "m_gen": Probe("whose is it?", edit.target, picture(10 + number)),
            "t_loc": Probe("which language do they speak in belland?", "belish"),
        }
        return EditRequest(f"edit-{number}", edit, probes=probes)

    return [one(number) for number in range(3)]


@pytest.fixture(scope="module")
def batch(model, requests):
    return encode_requests(model, requests, TEMPLATE)[1]


def asked(model, probe):
    """The model and inputs with which the library generates an answer, without a step of odedit's."""
    library, prompt = model.processor.library, TEMPLATE.render(probe)[0]
    text = prompt
    if library.chat_template:
        content = [{"type": "image"}] * (probe.picture is not None) + [{"type": "text", "text": prompt}]
        text = library.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = library.tokenizer.bos_token
    settings = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    if probe.picture is not None:
        inputs = library(images=[Image.fromarray(probe.picture.pixels)], text=[text], return_tensors="pt", **settings)
        inputs.pop("labels", None)
        return model.model, inputs
    if type(library).__name__ == "PaliGemmaProcessor":  # takes no text without a picture
        inputs = library.tokenizer(f"{bos}{text}\n", return_tensors="pt", add_special_tokens=False)
        return model.model, {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    if type(library).__name__ == "Blip2Processor":
        return model.model.language_model, library.tokenizer(text, return_tensors="pt")
    return model.model, library(text=[text], return_tensors="pt", **settings)


@torch.no_grad()
def library_logits(model, probe, answer):
    """The library's logits before each token of a given answer, which it generates step by step."""
    told, inputs = asked(model, probe)
    start = inputs["input_ids"].shape[1]
    made = told.generate(
        **inputs, max_new_tokens=len(answer), do_sample=False, output_logits=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, ids: [answer[min(len(ids) - start, len(answer) - 1)]],
        eos_token_id=None,
    )  # fmt: skip
    return torch.stack([step[0] for step in made.logits])


def test_logits_are_the_librarys_in_a_batch_of_unlike_sizes(model, requests, batch):
    sites = ["layers.0.attention.out", "layers.1.ffn.out"]
    found = [model.head(model.suffix(model.prefix(batch, site), batch.predict_EKT)) for site in sites]
    lengths = set()
    for e, request in enumerate(requests):
        for k, slot in enumerate(batch.slots):
            probe = {"rel": request.edit, **request.probes}[slot]
            mask = batch.target_mask_EKT[e, k]
            expected = library_logits(model, probe, batch.target_EKT[e, k][mask].tolist())
            lengths.add(int(batch.real_EKS[e, k].sum()))
            for logits in found:
                torch.testing.assert_close(logits[e, k][mask], expected, rtol=1e-4, atol=1e-4)
    assert len(lengths) > 2, "no sequence is padded"


@torch.no_grad()
def test_greedy_answers_are_those_of_generate(model, requests, batch):
    kv_cache = KVCache()
    prefix = model.prefix(batch, "layers.1.ffn.out", kv_cache=kv_cache)
    read_EKT = batch.with_room(1, 0, model.max_positions).predict_EKT
    first = model.head(model.suffix(prefix, read_EKT, kv_cache)).argmax(-1)
    made = generate(model, batch, prefix, kv_cache, first)
    for e, request in enumerate(requests):
        for k, slot in enumerate(batch.slots):
            probe = {"rel": request.edit, **request.probes}[slot]
            count = int(batch.target_mask_EKT[e, k].sum()) + EXTRA_TOKENS
            told, inputs = asked(model, probe)
            tokens = told.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=sorted(model.ends))
            expected = tokens[0, -count:] if tokens.shape[1] == count else tokens[0, inputs["input_ids"].shape[1] :]
            assert until_end(made[e, k].tolist(), model.ends)[0] == until_end(expected.tolist(), model.ends)[0]


def test_pictures_of_a_known_size_have_the_pixels_of_the_whole_processor(model):
    """The second and third picture go to the image processor alone; of each model and size."""
    known, fresh = (type(model.processor)(model.checkpoint) for _ in range(2))
    fresh._calls = LRU(0)
    for number in range(3):
        made = [known.process(picture(number + 3 * turn)).pixels for turn in range(3)]
        for turn, pixels in enumerate(made):
            expected = fresh.process(picture(number + 3 * turn)).pixels
            assert pixels.shape == expected.shape and np.array_equal(pixels, expected)
    assert all(known._calls.get(size[::-1]) is not None for size in SIZES)


@pytest.mark.parametrize("site", reading.SITES)
def test_the_positions_that_are_read_are_those_of_the_whole(model, batch, site):
    for positionwise in (True, False):
        reading.check(model, batch, site, positionwise)


def test_every_linear_of_the_connector_is_a_site_that_runs(model, requests):
    """From the connector on the states are those from the features on; refused where sizes differ."""
    sites = model.connector_sites()
    if not sites:
        assert model.family == "auto" and not any(
            isinstance(module, torch.nn.Linear) for module in model.model.model.multi_modal_projector.modules()
        )
        return
    if model.fixed_size is None:
        with pytest.raises(InputError, match=r"set backbone\.image_size"):
            encode_requests(model, requests, TEMPLATE, sites)
        model = load_backbone("auto", model.checkpoint, image_size=64)
    assert all(map(is_connector, sites))
    before = encode_requests(model, requests, TEMPLATE, sites)[1]
    after = encode_requests(model, requests, TEMPLATE)[1]
    seen = []
    handles = [model.site(site).register_forward_hook(lambda *_, site=site: seen.append(site)) for site in sites]
    states = model.suffix(model.prefix(before, *sites), before.predict_EKT)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(sites)
    expected = model.suffix(model.prefix(after, "layers.0.attention.out"), after.predict_EKT)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_split_is_refused_in_a_sentence(name, folder):
    directory = str(tiny_current.write(name, folder / name))
    with pytest.raises(InputError, match=f"cannot be split .*{re.escape(REFUSED[name])}") as refusal:
        inspect_backbone("auto", directory)
    assert str(refusal.value).count("\n") == 0 and str(refusal.value).endswith(".")


@pytest.mark.parametrize("family", ["blip2", "minigpt4", "llava"])
def test_the_named_families_are_the_same_through_auto(family, requests):
    """Tokens, states, an edit's figures: from the text model or the connector on."""
    named, auto = (load_backbone(name, str(world.checkpoint_path(family))) for name in (family, "auto"))
    assert auto.fingerprint == named.fingerprint and auto.connector_sites() == named.connector_sites()
    asked_few = [dataclasses.replace(request, probes=dict(list(request.probes.items())[:2])) for request in requests]
    for site in ("layers.-1.ffn.out", named.connector_sites()[-1]):
        rows, states = [], []
        for model in (named, auto):
            name = "ftv" if is_connector(site) else "ftl"
            editor = load_editor(name, {"sites": (site,), "learning_rate": 1e-3})
            supervision, evaluation = encode_requests(model, asked_few, TEMPLATE, editor.sites)
            states.append(model.suffix(model.prefix(evaluation, site), evaluation.predict_EKT))
            results = edit(model, editor, Objective(ObjectiveConfig(name="native")), supervision, Stopping(max_steps=3))
            rows.append([result.curves["rel"] for result in results])
            if model is named:
                tokens = evaluation.tokens_EKS
        assert torch.equal(evaluation.tokens_EKS, tokens)
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*map(torch.tensor, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "gemma3", "glm4v", "llava_phi3"])
def test_an_exported_edit_answers_in_plain_transformers(name, folder, requests, tmp_path):
    """At the size at which the model is served, with and without a picture."""
    from transformers import AutoModelForImageTextToText

    model = load_backbone("auto", str(tiny_current.write(name, folder / name)))
    rate = {"learning_rate": 1e-2}
    editor = load_editor("ftl", {**rate, **load_editor("ftl", rate).fitted(model)})
    supervision, evaluation = encode_requests(model, requests, TEMPLATE, editor.sites)
    (result, *_) = edit(model, editor, Objective(ObjectiveConfig(name="native")), supervision, Stopping(max_steps=4))
    export(model, editor, result.params, tmp_path / "edited")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "edited").eval()
    params = stack_params([result.params] * len(requests))
    with editor.applied(model, params, evaluation):
        found = model.head(model.suffix(model.prefix(evaluation, *editor.sites), evaluation.predict_EKT))
    for k, slot in enumerate(evaluation.slots):
        probe = {"rel": requests[1].edit, **requests[1].probes}[slot]
        mask = evaluation.target_mask_EKT[1, k]
        tokens = evaluation.target_EKT[1, k][mask].tolist()
        before, after = (library_logits(told, probe, tokens) for told in (model, Told(plain, model.processor)))
        torch.testing.assert_close(found[1, k][mask], after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, after, atol=1e-2)


def test_the_text_for_plain_use_is_begun_once(model):
    tokenizer, use = model.processor.tokenizer, model.plain_use()
    for text in (use.with_picture, use.without_picture):
        assert tokenizer(text.replace("{text}", "what is this?")).input_ids[:2] != [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("name", ["gemma3", "llava_phi3"])
def test_half_precision_hides_no_order_of_heads(name, folder):
    model = load_backbone("auto", str(tiny_current.write(name, folder / name)), dtype="bfloat16")
    assert model.decoder.grouped is False and model.decoder.partly is False


@dataclasses.dataclass(frozen=True)
class Told:
    """A plain model with the processor that asks it."""

    model: object
    processor: object


def test_one_matrix_for_gate_and_input_feeds_the_models_own_activation(folder):
    model = load_backbone("auto", str(tiny_current.write("glm4v", folder / "glm4v")))
    entering = torch.randn(2, 3, model.hidden_size)
    site = "layers.1.ffn.gate_in"
    gate, into = model.activation(site)(model.site(site)(entering)).chunk(2, dim=-1)
    whole = model.decoder.structure.stack.layers[1].mlp(entering)
    torch.testing.assert_close(model.site("layers.1.ffn.out")(gate * into), whole)
    with pytest.raises(
        InputError, match=r"'layers\.1\.ffn\.in': .* attention\.v, attention\.out, ffn\.gate_in, ffn\.out\."
    ):
        model.site("layers.1.ffn.in")


FUSED_ROWS = {"qkv_proj": {"q_proj": 32, "k_proj": 16, "v_proj": 16}, "gate_up_proj": {"gate_proj": 48, "up_proj": 48}}
"""Rows of the parts of Phi-3's matrices, by their names in LLaMA."""


@pytest.fixture(scope="module")
def fused_and_parts(folder):
    """A model with fused matrices, and the same model with a matrix for each part."""
    from transformers import AutoModelForImageTextToText

    fused = load_backbone("auto", str(tiny_current.write("llava_phi3", folder / "llava_phi3")))
    plain = AutoModelForImageTextToText.from_pretrained(tiny_current.write("llava_of_llama", folder / "parts"))
    weights = {}
    for name, value in fused.model.state_dict().items():
        module = name.split(".")[-2]
        parts = FUSED_ROWS.get(module, {module: len(value)})
        named = zip(parts, value.split(list(parts.values())), strict=True)
        weights |= {name.replace(module, part): rows for part, rows in named}
    plain.load_state_dict(weights)
    plain.save_pretrained(folder / "parts")
    return fused, load_backbone("auto", str(folder / "parts"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tpatcher", {"layer": 0}),
        ("ftl", {"sites": ("layers.0.attention.qkv", "layers.1.attention.qkv", "layers.1.ffn.gate_in")}),
        ("ftl", {"sites": ("layers.1.attention.qkv",)}),
    ],
)
def test_an_edit_of_a_fused_matrix_is_that_of_its_parts(fused_and_parts, requests, name, settings):
    """Phi-3's layers are LLaMA's with fused matrices."""
    found = []
    for model in fused_and_parts:
        if model is fused_and_parts[1] and "sites" in settings:
            parts = {whole: [part for part in FUSED if FUSED[part] == whole] for whole in set(FUSED.values())}
            named = [site.split(".", 2) for site in settings["sites"]]
            settings = {"sites": [f"layers.{layer}.{part}" for _, layer, whole in named for part in parts[whole]]}
        editor = load_editor(name, settings)
        supervision, evaluation = encode_requests(model, requests, TEMPLATE, editor.sites)
        results = edit(model, editor, Objective(ObjectiveConfig(name="native")), supervision, Stopping(max_steps=4))
        params = stack_params([result.params for result in results])
        with torch.no_grad():
            prefix = model.prefix(evaluation, *editor.sites)
            before = model.suffix(prefix, evaluation.predict_EKT)
            with editor.applied(model, params, evaluation):
                change = model.suffix(prefix, evaluation.predict_EKT) - before
        found.append((change, torch.tensor([result.curves["rel"] for result in results])))
    (change, curves), (expected, expected_curves) = found
    torch.testing.assert_close(curves, expected_curves, rtol=1e-3, atol=1e-3)
    # Adam amplifies gradients that consist of rounding errors.
    assert (change - expected).norm() < 1e-2 * expected.norm()


@torch.no_grad()
def test_one_matrix_for_queries_keys_and_values_is_split_as_attention_splits_it(folder, monkeypatch):
    """In turns for each head of the keys, it is the matrix with all queries first in another order."""
    directory = str(tiny_current.write("llava_phi3", folder / "llava_phi3"))
    decoder = load_backbone("auto", directory).decoder
    hidden, every = torch.randn(1, 5, decoder.hidden_size), torch.arange(5)[None]
    inputs, weight = decoder.rotary(hidden, None), decoder.site("layers.0.attention.qkv").weight
    expected = decoder.attention_half(0, hidden, inputs, every)
    torch.testing.assert_close(decoder.attention_half(0, hidden, inputs), expected)
    blocks = [rows.unflatten(0, (2, -1)) for rows in weight.split([32, 16, 16])]  # 4 heads share the keys of 2
    weight.copy_(torch.cat(blocks, dim=1).flatten(0, 1))
    assert not decoder.grouped
    decoder.grouped = True
    torch.testing.assert_close(decoder.attention_half(0, hidden, inputs, every), expected)
    split = TracedDecoder._split
    monkeypatch.setattr(TracedDecoder, "_split", lambda *given: [part.flip(-1) for part in split(*given)])
    with pytest.raises(InputError, match=r"layers\.0 is not what its matrices \(self_attn\.qkv_proj, "):
        load_backbone("auto", directory)


def test_a_question_about_a_picture_of_another_size_has_its_positions(folder):
    """A sequence whose picture is exchanged, a picture without its pixels, and features from a store."""
    model = load_backbone("auto", str(tiny_current.write("idefics3", folder / "idefics3")))
    first, second = (Probe("whose is it?", "ruby", picture(number)) for number in (0, 2))
    features = model.image_features([first.picture, second.picture])
    swapped = about(model.sequence(first, TEMPLATE), second.picture.key)
    wanted = model.sequence(second, TEMPLATE)
    assert len(wanted.image) != len(model.sequence(first, TEMPLATE).image)
    batches = [model.assemble(["e"], ["rel"], [[cell]], features) for cell in (swapped, wanted)]
    assert torch.equal(batches[0].tokens_EKS, batches[1].tokens_EKS)
    assert torch.equal(batches[0].predict_EKT, batches[1].predict_EKT)
    bare = dataclasses.replace(second, picture=second.picture.without_its_pixels())
    assert model.sequence(bare, TEMPLATE) == wanted


def test_features_of_unlike_sizes_are_cached_and_stored(folder, tmp_path):
    model = load_backbone("auto", str(tiny_current.write("qwen2_vl", folder / "qwen2_vl")))
    pictures = [picture(number) for number in range(3)]
    expected = model.image_features(pictures)
    for _ in range(2):
        cached = with_feature_cache(model, FeatureStore.at(str(tmp_path)))
        for _ in range(2):
            made = cached.image_features(pictures)
            assert all(torch.equal(made[key], expected[key]) for key in expected)
    fresh = with_feature_cache(load_backbone("auto", model.checkpoint), FeatureStore.at(str(tmp_path)))
    made = fresh.image_features(pictures)
    cells = [[model.sequence(Probe("w?", "ruby", one), TEMPLATE) for one in pictures]]
    batches = [one.assemble(["e"], ["a", "b", "c"], cells, made) for one in (model, fresh)]
    states = [
        one.suffix(one.prefix(batch, "layers.1.ffn.in")) for one, batch in zip((model, fresh), batches, strict=True)
    ]
    torch.testing.assert_close(*states)


def test_a_deviation_is_refused_with_the_point_where_it_begins(folder, monkeypatch):
    directory = str(tiny_current.write("llava", folder / "llava"))
    half = TracedDecoder.ffn_half
    with monkeypatch.context() as patch:
        patch.setattr(
            TracedDecoder, "ffn_half", lambda self, layer, x: half(self, layer, x) + (x.tanh() if layer == 0 else 0)
        )
        with pytest.raises(InputError, match=r"its logits with a picture differ .* layers\.0 is the first"):
            load_backbone("auto", directory)
    monkeypatch.setattr(TracedDecoder, "embed_positions", lambda self, x, _=None: x + 1)
    with pytest.raises(InputError, match="the states that enter layer 0 are not the embedded tokens"):
        load_backbone("auto", directory)


def test_a_family_with_an_image_size_of_its_own_takes_no_other():
    with pytest.raises(InputError, match=r"backbone\.image_size: got 64, but the family 'blip2' has an image size"):
        load_backbone("blip2", "embedded", image_size=64)


def test_all_pictures_can_have_one_size(folder, requests):
    model = load_backbone("auto", str(tiny_current.write("internvl", folder / "internvl")), image_size=64)
    features = model.image_features([picture(number) for number in range(3)])
    assert len({feature.shape for feature in features.values()}) == 1 and model.fixed_size is not None
    assert model.plain_use().side == 64
