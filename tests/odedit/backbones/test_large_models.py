"""Loading of models that are large for a machine: main memory while loading, and layers on several devices."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from odedit import EditRequest, InputError, Probe, load_backbone, load_editor
from odedit.backbones import encode_requests, inspect_backbone
from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.backbones.common.placement import Placement, devices_of
from odedit.runtime.kv_cache import KVCache
from tests.support import tiny_current
from tests.support.requests import TEMPLATE

MIB = 2**20
GPUS = [torch.device("cuda", index) for index in range(3)]
TWO = [torch.device("cpu"), torch.device("meta")]
"""Two kinds of device that fake tensors can lie on without any GPU."""

MEASURE = """
import json, resource, sys
import torch
from odedit.backbones import load_backbone
load_backbone("auto", sys.argv[2], dtype="bfloat16")  # imports what a load and a forward need
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_backbone("auto", sys.argv[1], dtype="bfloat16")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = sum(value.numel() * value.element_size() for value in model.model.parameters())
print(json.dumps({"peak": (peak - before) * 1024, "weights": weights, "type": str(model.model.dtype)}))
"""


@pytest.fixture(scope="module")
def mid(tmp_path_factory):
    """A LLaVA of 88 million weights in float32, in six files."""
    text = dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12
    )
    return tiny_current.write("llava", tmp_path_factory.mktemp("mid"), text=text, shards="64MB")


def test_main_memory_holds_the_weights_once_in_their_final_type_while_they_are_loaded(mid, checkpoint):
    files = [file.stat().st_size for file in mid.glob("*.safetensors")]
    assert len(files) > 4
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(mid), checkpoint], capture_output=True, text=True, check=True
    )
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert measured["type"] == "torch.bfloat16" and 2 * measured["weights"] == pytest.approx(sum(files), rel=0.01)
    print({name: round(value / MIB) for name, value in measured.items() if name != "type"})
    # A float32 copy, or the pages of mapped files, would need three times the weights.
    assert measured["peak"] < measured["weights"] + max(files) + 48 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_current.write("llava", tmp_path_factory.mktemp("model"), text={"num_hidden_layers": 8}))


def test_layers_lie_in_order_and_the_last_ones_beside_the_head(checkpoint):
    model = inspect_backbone("auto", checkpoint)
    placement = Placement.of(model.model, model._decoder.layers, GPUS)
    devices = list(placement.layers.values())
    assert len(devices) == 8 and devices[-1] == GPUS[0] == placement.home
    away = [device for device in devices if device != GPUS[0]]
    assert away == devices[: len(away)] == sorted(away, key=lambda device: device.index)
    assert abs(away.count(GPUS[1]) - away.count(GPUS[2])) <= 1
    layers = [model.model.get_submodule(path) for path in placement.layers]
    assert layers == model._decoder.layers
    at_home, total, layer = 0, 0, sum(value.numel() for value in layers[0].parameters())
    for name, value in model.model.named_parameters():
        at_home += value.numel() if placement.of_values(name) == GPUS[0] else 0
        total += value.numel()
    assert at_home <= max(total / 3, total - 7 * layer)
    assert Placement.of(model.model, model._decoder.layers, GPUS[:1]) == Placement(GPUS[0], {})
    with pytest.raises(InputError, match="the text model has 8 layers"):
        Placement.of(model.model, model._decoder.layers, GPUS * 3)


def test_a_model_for_several_gpus_is_refused_where_there_are_fewer(checkpoint):
    with pytest.raises(InputError, match=r"backbone\.gpus: got 2, but from 'cpu' on there are 0 GPUs"):
        load_backbone("auto", checkpoint, gpus=2)
    assert devices_of("cuda:1", 1) == (torch.device("cuda:1"),)


def faked(mode: FakeTensorMode, model: nn.Module, placement: Placement) -> None:
    """Makes a model's values fake tensors on the devices of a placement, which need not exist."""
    for name, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for key, value in kind.items():
                if value is not None:
                    kind[key] = mode.from_tensor(value).to(placement.of_values(f"{name}.{key}"))


@torch.no_grad()
@pytest.mark.parametrize("editor_name", ["ftl", "lora", "tpatcher"])
def test_states_are_handed_over_wherever_devices_change(checkpoint, editor_name):
    """Fake tensors refuse an operation on two devices. Prefix, edited suffix, head and continuation run."""
    model = load_backbone("auto", checkpoint)
    edit = Probe("who owns this digit?", "anna hill")
    batch = encode_requests(model, [EditRequest("one", edit)], TEMPLATE)[0].select(("edit",))
    editor = load_editor(editor_name)
    editor = type(editor)(dataclasses.replace(editor.config, **editor.fitted(model)))
    real_params = editor.init(model, batch)
    placement = Placement.of(model.model, model._decoder.layers, TWO)
    model._decoder.devices = tuple(placement.layers.values())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        faked(mode, model.model, placement)
        placement.connect(model.model)

        def at_home(values):
            return tree_map_only(torch.Tensor, lambda value: mode.from_tensor(value).to(TWO[0]), values)

        fields = {item.name: at_home(getattr(batch, item.name)) for item in dataclasses.fields(batch) if item.init}
        fake, params = dataclasses.replace(batch, **fields), at_home(real_params)
        kv_cache = KVCache()
        with editor.applied(model, params, fake):
            prefix = model.prefix(fake, *editor.sites, kv_cache=kv_cache)
            assert prefix.hidden_RSD.device == TWO[0] and isinstance(prefix.inputs, LayerInputs)
            states = model.suffix(prefix, fake.predict_EKT, kv_cache)
            assert {keys.device for keys, _ in kv_cache._layers.values()} == set(TWO)
            again = model.target_states(prefix, fake, fake.target_EKT, kv_cache)
        logits = model.head(states)
        assert {states.device, logits.device, again.device} == {TWO[0]}
        seen = model.model(input_ids=fake.tokens_EKS[0], use_cache=False).logits
        assert seen.device == TWO[0] and seen.shape[-1] == logits.shape[-1]
    with pytest.raises(RuntimeError, match="two devices"), mode:
        model._decoder.devices = ()
        model.suffix(model.prefix(fake, "layers.0.attention.q"), fake.predict_EKT)
