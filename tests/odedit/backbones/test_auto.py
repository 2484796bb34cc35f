"""Tiny models of many families through `auto`, against the library's own processor and `generate`."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from odedit import EditRequest, InputError, Picture, Probe, load_backbone
from odedit.backbones import encode_requests, inspect_backbone, is_connector
from odedit.backbones.common.generation import EXTRA_TOKENS, generate, until_end
from odedit.runtime.kv_cache import KVCache
from tests.support import reading, tiny_current
from tests.support.requests import TEMPLATE

SERVED = (
    "llava", "blip2", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_next", "llava_onevision", "internvl", "gemma3",
    "paligemma", "idefics3", "vipllava",
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
    sites = ["layers.0.attention.q", "layers.1.ffn.out"]
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
        return
    assert all(map(is_connector, sites))
    before = encode_requests(model, requests, TEMPLATE, sites)[1]
    after = encode_requests(model, requests, TEMPLATE)[1]
    seen = []
    handles = [model.site(site).register_forward_hook(lambda *_, site=site: seen.append(site)) for site in sites]
    states = model.suffix(model.prefix(before, *sites), before.predict_EKT)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(sites)
    expected = model.suffix(model.prefix(after, "layers.0.attention.q"), after.predict_EKT)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_split_is_refused_in_a_sentence(name, folder):
    directory = str(tiny_current.write(name, folder / name))
    with pytest.raises(InputError, match=f"cannot be split .*{re.escape(REFUSED[name])}") as refusal:
        inspect_backbone("auto", directory)
    assert str(refusal.value).count("\n") == 0 and str(refusal.value).endswith(".")
