"""The embedded BLIP-2 against the forward of transformers on single whole sequences."""

from __future__ import annotations

import pytest
import torch

from odedit import InputError, load_backbone
from odedit.backbones import current, encode_requests
from odedit.inputs.prompts import tokenize
from tests.support import reading
from tests.support.requests import TEMPLATE, make_request


@pytest.mark.parametrize("site", ["layers.0.ffn.in", "layers.2.ffn.out", "layers.3.attention.out", "layers.-1.ffn.in"])
def test_prefix_and_suffix_equal_the_full_model(backbone, batches, requests_8, site):
    _, evaluation = batches
    with torch.no_grad():
        logits = backbone.head(backbone.suffix(backbone.prefix(evaluation, site)))
    for e, request in enumerate(requests_8):
        probes = {"rel": request.edit, **request.probes}
        for k, slot in enumerate(evaluation.slots):
            if not evaluation.present_EK[e, k]:
                continue
            length = int(evaluation.real_EKS[e, k].sum())
            ids = evaluation.tokens_EKS[e, k, :length][None]
            picture = probes[slot].picture
            if picture is None:
                full = backbone.model.language_model(input_ids=ids).logits
            else:
                pixels = torch.from_numpy(backbone.processor.process(picture).pixels)[None]
                full = backbone.model(pixel_values=pixels, input_ids=ids).logits
            assert (full[0] - logits[e, k, :length]).abs().max() < 1e-5


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("site", reading.SITES)
def test_the_positions_that_are_read_are_those_of_the_whole(backbone, batches, site, positionwise):
    reading.check(backbone, batches[1], site, positionwise)


def test_tokens_are_those_of_the_library_processor(backbone, batches, requests_8):
    """The layout `[image tokens | </s> | text]`, tokenised in one call."""
    from transformers import AutoTokenizer, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from odedit import world

    path = world.checkpoint_path("blip2")
    library = Blip2Processor(
        BlipImageProcessorPil.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        num_query_tokens=backbone.model.config.num_query_tokens,
    )
    from PIL import Image

    _, evaluation = batches
    for e, request in enumerate(requests_8):
        prompt, target = TEMPLATE.render(request.edit)
        picture = Image.fromarray(request.edit.picture.pixels)
        inputs = library(images=picture, text=prompt + target, return_tensors="pt")
        length = int(evaluation.real_EKS[e, 0].sum())
        assert evaluation.tokens_EKS[e, 0, :length].tolist() == inputs["input_ids"][0].tolist()
        processed = backbone.processor.process(request.edit.picture)
        assert torch.equal(torch.from_numpy(processed.pixels), inputs["pixel_values"][0])
        assert backbone.processor.process(processed) is processed


def test_target_positions_decode_to_the_target(backbone, batches, requests_8):
    tokenizer = backbone.processor.tokenizer
    _, evaluation = batches
    for e, request in enumerate(requests_8):
        for k, slot in enumerate(evaluation.slots):
            if not evaluation.present_EK[e, k]:
                continue
            probe = request.edit if slot == "rel" else request.probes[slot]
            mask = evaluation.target_mask_EKT[e, k]
            assert tokenizer.decode(evaluation.target_EKT[e, k][mask]).strip() == probe.target
            predict = evaluation.predict_EKT[e, k][mask]
            assert evaluation.tokens_EKS[e, k, predict + 1].tolist() == evaluation.target_EKT[e, k][mask].tolist()
            assert evaluation.prompt_EKS[e, k].sum() == predict[0] + 1


def test_a_target_without_a_token_is_refused(backbone):
    from odedit import Probe

    with pytest.raises(ValueError, match="has no token"):
        tokenize(backbone.processor.tokenizer, TEMPLATE, Probe("who owns this?", " "))


def test_a_picture_used_twice_is_encoded_once(backbone, monkeypatch):
    seen = []
    original = backbone.tower
    monkeypatch.setattr(backbone, "tower", lambda pixels: seen.append(len(pixels)) or original(pixels))
    request = make_request(0)
    encode_requests(backbone, [request], TEMPLATE)
    assert seen == [len({picture.key for picture in request.pictures()})]
    assert len(request.pictures()) > seen[0]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("layers.9.ffn.in", r"layers\.<0\.\.3>"),
        ("layers.1.ffn.middle", "ffn.in, ffn.out"),
        ("decoder.fc1", "Unknown site"),
    ],
)
def test_the_error_for_an_unknown_site_lists_the_valid_ones(backbone, site, message):
    with pytest.raises(InputError, match=message):
        backbone.site(site)


def test_edits_of_a_replaced_family_are_read_at_its_picture_size():
    assert current("qwen2_5_vl", None) == ("auto", 448) and current("qwen2_5_vl", 224) == ("auto", 224)
    assert current("llava", None) == ("llava", None)


def test_unknown_family_and_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"set backbone\.family=auto, or leave it out, and backbone\.image_size=448"):
        load_backbone("qwen2_5_vl", "embedded")
    with pytest.raises(InputError, match=r"Unknown backbone 'blip3'. Did you mean 'blip2'\?"):
        load_backbone("blip3", "embedded")
    with pytest.raises(InputError, match="does not exist"):
        load_backbone("blip2", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="dtype: got 'float8'"):
        load_backbone("blip2", "embedded", dtype="float8")


def test_a_checkpoint_of_another_class_is_named(tmp_path):
    from transformers import OPTConfig

    OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is model_type 'opt' with text model None; family 'blip2' takes"):
        load_backbone("blip2", str(tmp_path))


def test_half_precision_follows_float32(backbone, batches):
    half = load_backbone("blip2", "embedded", dtype="bfloat16")
    requests = [make_request(0)]
    _, evaluation = encode_requests(half, requests, TEMPLATE)
    _, reference = encode_requests(backbone, requests, TEMPLATE)
    with torch.no_grad():
        a = half.head(half.suffix(half.prefix(evaluation, "layers.2.ffn.in")))
        b = backbone.head(backbone.suffix(backbone.prefix(reference, "layers.2.ffn.in")))
    assert a.dtype == torch.float32
    mask = reference.real_EKS
    assert (a - b)[mask].abs().mean() < 0.05 * b[mask].abs().mean() + 0.05
