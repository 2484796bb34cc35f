"""Editors with settings that move small models within a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odedit import load_editor
from odedit.backbones import Backbone
from odedit.editors.base import Trainable
from odedit.editors.common.weights import save_weights

# An editor without an entry runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "wise": {"site": "layers.2.ffn.in", "learning_rate": 1.0, "margin_in": 2.0, "margin_out": 0.5, "margin_gap": 1.0},
    "ftl": {"learning_rate": 3e-3},
    "mend": {"rank": 8, "edit_rate": 1e-2},
    "unike": {"num_layers": 2, "learning_rate": 0.5, "encoder_width": 32, "code_width": 16},
    "ftv": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-2},
}


def settings_for(name: str, backbone: Backbone) -> dict[str, Any]:
    """Settings from `SMALL`, with sites that the model has."""
    depth = backbone.num_layers
    if name == "wise":
        # As published: the matrix before the nonlinearity in OPT, the one after it in a gated layer.
        part = (
            "ffn.in" if backbone.family == "blip2" else "ffn.gate_in" if "ffn.gate_in" in backbone.parts else "ffn.out"
        )
        return {**SMALL[name], "site": f"layers.{depth // 2}.{part}"}
    if name == "mend" and depth < 3:
        return {**SMALL[name], "sites": ("layers.-1.ffn.in", "layers.-1.ffn.out")}
    return SMALL.get(name, {})


def ready_editor(name: str, backbone: Backbone, folder: Path, **settings: Any) -> Any:
    """A loaded editor; a trainable one gets its initial weights, which must satisfy the contract too."""
    settings = {**settings_for(name, backbone), **settings}
    settings |= load_editor(name, settings).fitted(backbone)
    editor = load_editor(name, settings)
    if not isinstance(editor, Trainable):
        return editor
    path = folder / f"{name}.safetensors"
    weights = editor.initial_weights(backbone, 0)
    save_weights(path, weights, name, editor.weight_settings, backbone.fingerprint)
    return load_editor(name, {**settings, "checkpoint": str(path)})
