"""LoRA parameters as a PEFT adapter, loaded in a process without odedit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odedit import InputError, load_backbone, load_editor, world
from odedit.backbones import Backbone
from odedit.editing.adapters import write_adapter
from odedit.editing.merging import export
from odedit.editors.base import Editor
from odedit.inputs.batch import EditParams
from tests.support import committed, tiny_current, tiny_models

LOGITS = """
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
source, merged, adapter, inputs, out = sys.argv[1:]
from safetensors.torch import load_file
given = load_file(inputs)
load = AutoModelForImageTextToText.from_pretrained
made = {}
with torch.no_grad():
    made["source"] = load(source).eval()(**given).logits
    made["merged"] = load(merged).eval()(**given).logits
    made["adapter"] = PeftModel.from_pretrained(load(source), adapter).eval()(**given).logits
save_file(made, out)
"""
SITES = {
    "blip2": ["layers.*.attention.q", "layers.-1.ffn.in", "layers.0.ffn.out", "connector.language_projection"],
    "minigpt4": ["layers.*.attention.v", "connector.qformer.*query", "layers.1.ffn.gate"],
    "llava": ["layers.*.attention.q", "layers.*.attention.v", "layers.*.ffn.gate", "connector.*"],
    "auto": ["layers.*.attention.k", "layers.*.attention.v", "layers.1.ffn.out", "connector.*"],
}
"""Sites of attention, with fewer key than query heads in the tiny models, of all three matrices of feed-forward halves,
and of the connector."""


def random_edits(backbone: Backbone, sites: list[str], count: int) -> tuple[Editor, EditParams]:
    """LoRA parameters that are not zero."""
    from odedit.editors.common.fine_tuning import resolve

    editor = load_editor("lora", {"sites": sites, "rank": 3, "alpha": 5.0})
    torch.manual_seed(0)
    params: EditParams = {}
    for site in resolve(backbone, sites):
        width_out, width_in = backbone.site(site).weight.shape
        params[f"{site}.lora_A"] = torch.randn(count, 3, width_in) / width_in**0.5
        params[f"{site}.lora_B"] = torch.randn(count, width_out, 3) * 0.05
    return editor, params


def inputs_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    """A text with a picture, for the forward pass of the library's model."""
    from odedit.inputs.batch import Probe
    from odedit.inputs.prompts import find_template
    from tests.support.requests import make_picture

    picture = backbone.processor.process(make_picture(0))
    tokens = backbone.sequence(Probe("who is this?", "a", picture), find_template("mmedit")).tokens
    return {"input_ids": torch.tensor([tokens]), "pixel_values": torch.from_numpy(picture.pixels)[None]}


@pytest.mark.parametrize(
    ("family", "count"), [("blip2", 1), ("llava", 1), ("minigpt4", 1), ("tiny llava", 1), ("blip2", 2)]
)
def test_peft_computes_what_the_merged_checkpoint_does(family: str, count: int, tmp_path: Path) -> None:
    if family.startswith("tiny "):
        family = family.removeprefix("tiny ")
        source = tiny_models.write(family, tmp_path / "source")
    else:
        embedded = load_backbone(family, "embedded")
        source = committed.in_single_precision(embedded, world.checkpoint_path(family), tmp_path / "source")
    backbone = load_backbone(family, str(source))
    editor, params = random_edits(backbone, SITES[family], count)
    export(backbone, editor, params, tmp_path / "merged")
    write_adapter(backbone, editor, params, tmp_path / "adapter")
    from safetensors.torch import save_file

    save_file(inputs_of(backbone), tmp_path / "inputs")
    folders = [tmp_path / name for name in ("source", "merged", "adapter", "inputs", "logits")]
    committed.without_odedit(LOGITS, *folders, cwd=tmp_path)
    logits = load_file(tmp_path / "logits")
    torch.testing.assert_close(logits["adapter"], logits["merged"], rtol=1e-4, atol=1e-4)
    assert (logits["merged"] - logits["source"]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["auto", "llava"])
def test_target_modules_are_exactly_those_of_the_sites(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = tiny_current.write_family(family, tmp_path / "source")
    backbone = load_backbone(family, str(source))
    editor, params = random_edits(backbone, SITES[family], 1)
    write_adapter(backbone, editor, params, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "source" and (settings["r"], settings["lora_alpha"]) == (3, 5)
    assert str(tmp_path) not in json.dumps(settings)
    model = get_peft_model(backbone.model, LoraConfig.from_pretrained(tmp_path / "adapter"))
    expected = {name for name in model.state_dict() if ".lora_" in name}
    stored = {
        name.replace(".weight", ".default.weight") for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    }
    assert expected == stored and len(stored) == len(params)


def test_another_editor_has_no_adapter(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(InputError, match="only those of the editor lora"):
        write_adapter(backbone, load_editor("ftl", {}), {}, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
