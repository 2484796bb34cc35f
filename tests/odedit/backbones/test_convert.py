"""MiniGPT-4 from small generated pieces, in the formats in which they are published."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from odedit import InputError, load_backbone
from odedit.__main__ import app
from odedit.backbones import encode_requests
from odedit.backbones.common import convert_minigpt4
from tests.support import tiny_models
from tests.support.requests import TEMPLATE, make_picture, make_request


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """BLIP-2 with T5, a LLaMA as pickled half-precision shards with old tables, and a `.pth` projection."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, T5Config
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    root = tmp_path_factory.mktemp("pieces")
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=64, d_model=20, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    config = Blip2Config(
        text_config=t5.to_dict(), vision_config=tiny_models._VISION, qformer_config=tiny_models._QFORMER,
        num_query_tokens=3,
    )  # fmt: skip
    blip2 = Blip2ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(blip2.query_tokens)
    blip2.save_pretrained(root / "blip2", max_shard_size="10KB")
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "blip2")

    vicuna = LlamaForCausalLM(LlamaConfig(**tiny_models._TEXT)).eval()
    for parameter in vicuna.parameters():
        parameter.data = parameter.data.half().float()
    vicuna.config.dtype = "float16"
    vicuna.config.save_pretrained(root / "vicuna")
    tiny_models.tokenizer(begins=True).save_pretrained(root / "vicuna")
    halves = {name: value.half() for name, value in vicuna.state_dict().items()}
    halves["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(halves, root / "vicuna" / "pytorch_model.bin")

    weight, bias = torch.randn(32, 16), torch.randn(32)
    state = {"llama_proj.weight": weight, "llama_proj.bias": bias}
    torch.save({"model": state, "config": {"run": {"max_epoch": 5}}, "epoch": 4}, root / "projection.pth")
    save_file(state, root / "projection.safetensors")
    return root, blip2, vicuna, weight, bias


def arguments(root, out, projection="projection.pth"):
    return root / "blip2", root / projection, root / "vicuna", out


def test_the_converted_model_computes_what_its_pieces_do(pieces, tmp_path):
    root, blip2, vicuna, weight, bias = pieces
    out = tmp_path / "minigpt4"
    options = zip(("--blip2", "--projection", "--vicuna", "--out"), map(str, arguments(root, out)), strict=True)
    result = CliRunner().invoke(app, ["convert", "minigpt4", *(word for pair in options for word in pair)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    model = load_backbone("minigpt4", str(out))

    pixels = torch.from_numpy(model.processor.process(make_picture(0)).pixels)[None]
    with torch.no_grad():
        gathered = blip2.get_image_features(pixels).qformer_outputs.last_hidden_state
        features = gathered @ weight.T + bias
        torch.testing.assert_close(model.image_features([make_picture(0)])["picture-0"][None], features)

        batch = encode_requests(model, [make_request(0)], TEMPLATE)[1]
        logits = model.head(model.suffix(model.prefix(batch, "layers.0.attention.q")))
        for slot, with_picture in (("rel", True), ("t_loc", False)):
            k = batch.slots.index(slot)
            length = int(batch.real_EKS[0, k].sum())
            embedded = vicuna.get_input_embeddings()(batch.tokens_EKS[0, k, :length])
            if with_picture:
                start = int(batch.image_EKS[0, k].nonzero()[0])
                embedded = torch.cat([embedded[:start], features[0], embedded[start + 3 :]])
            expected = vicuna(inputs_embeds=embedded[None]).logits[0]
            torch.testing.assert_close(logits[0, k, :length], expected, rtol=1e-4, atol=1e-4)


def test_shards_keep_every_type_and_need_no_pickle(pieces, tmp_path):
    root, *_ = pieces
    whole = convert_minigpt4.minigpt4(*arguments(root, tmp_path / "whole", "projection.safetensors"))
    cut = convert_minigpt4.minigpt4(*arguments(root, tmp_path / "cut"), shard_bytes=20_000)
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 3 and len(list(whole.glob("*.safetensors"))) == 1
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    with safe_open(whole / "model-00001.safetensors", framework="pt") as stream:
        assert set(tensors) == set(stream.keys())
        assert all(torch.equal(stream.get_tensor(name), value) for name, value in tensors.items())
    assert tensors["language_model.lm_head.weight"].dtype == torch.float16
    assert tensors["query_tokens"].dtype == torch.float32
    assert max(file.stat().st_size for file in files) < 20_000 + 512 * 32 * 2 + 20_000
    first, second = load_backbone("minigpt4", str(whole)), load_backbone("minigpt4", str(cut))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )


def spoiled(pieces, tmp_path, what):
    """Arguments of the conversion with one damaged piece."""
    root, out = tmp_path / "pieces", tmp_path / "out"
    shutil.copytree(pieces[0], root)
    weight, bias = pieces[3], pieces[4]
    projection = root / "projection.pth"
    if what == "no bias":
        torch.save({"model": {"llama_proj.weight": weight}}, projection)
    elif what == "another size":
        torch.save({"model": {"llama_proj.weight": weight[:, :8], "llama_proj.bias": bias}}, projection)
    elif what == "trained further":
        state = {"llama_proj.weight": weight, "llama_proj.bias": bias, "llama_model.lora_A.weight": bias}
        torch.save({"model": state}, projection)
    elif what == "not tensors":
        torch.save({"model": {"llama_proj.weight": 1}}, projection)
    elif what == "a program":
        torch.save({"model": shutil.rmtree}, projection)
    elif what == "no projection":
        projection.unlink()
    elif what == "a shard missing":
        next((root / "blip2").glob("model-00002-*")).unlink()
    elif what == "a layer missing":
        state = torch.load(root / "vicuna" / "pytorch_model.bin", weights_only=True)
        del state["model.layers.1.mlp.up_proj.weight"]
        torch.save(state, root / "vicuna" / "pytorch_model.bin")
    elif what == "swapped":
        return root / "vicuna", projection, root / "blip2", out
    elif what == "no weights":
        (root / "vicuna" / "pytorch_model.bin").unlink()
    elif what == "there already":
        out.mkdir()
        (out / "file").write_text("kept")
    return arguments(root, out)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no bias", r"--projection: .*projection\.pth lacks 'llama_proj\.bias'\."),
        ("another size", r"projection\.pth: 'llama_proj\.weight' has shape \(32, 8\), expected \(32, 16\)"),
        ("trained further", r"projection\.pth also holds 'llama_model\.lora_A\.weight'"),
        ("not tensors", r"projection\.pth is no table of tensors"),
        ("a program", r"projection\.pth cannot be read: .*Nothing but tensors is read"),
        ("no projection", r"--projection: file .*projection\.pth does not exist"),
        ("a shard missing", r"--blip2: file .*model-00002-of-\d+\.safetensors does not exist"),
        ("a layer missing", r"--vicuna: .*vicuna lacks 'model\.layers\.1\.mlp\.up_proj\.weight'\."),
        ("swapped", r"--blip2: .*vicuna is 'llama', expected 'blip-2'\."),
        ("no weights", r"--vicuna: .* has neither model\.safetensors nor pytorch_model\.bin"),
        ("there already", r"--out: .* is there already"),
    ],
)
def test_a_piece_that_does_not_fit_is_named(pieces, tmp_path, what, message):
    wrong = spoiled(pieces, tmp_path, what)
    with pytest.raises(InputError, match=rf"(?s){message}"):
        convert_minigpt4.minigpt4(*wrong)
    left = [path.name for path in tmp_path.iterdir() if path.name != "pieces"]
    assert left == (["out"] if what == "there already" else [])
