"""Language models in halves of layers: what a backbone's prefix and suffix are made of.

One class per architecture of text model. Sites are named here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odedit.errors import InputError

_SITE = re.compile(r"layers\.(-?\d+)\.([a-z.]+)")


class OPTDecoder:
    """`OPTForCausalLM` (arXiv 2205.01068) with layer norm before each half, as in every size but 350m.

    Attention is causal without a padding mask: sequences are right-padded, so no real position ever sees padding.
    """

    MODULES = {  # noqa: RUF012
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
        "ffn.in": "fc1",
        "ffn.out": "fc2",
    }

    def __init__(self, model: Any) -> None:
        if model.config.model_type != "opt" or not model.config.do_layer_norm_before:
            raise InputError(
                f"text model: got {model.config.model_type!r} with do_layer_norm_before="
                f"{getattr(model.config, 'do_layer_norm_before', None)}, expected an OPT model that normalises first."
            )
        self._decoder = model.model.decoder
        self._head = model.lm_head
        self._max_positions = int(model.config.max_position_embeddings)
        self.num_layers = len(self._decoder.layers)
        self.hidden_size = int(model.config.hidden_size)

    def site(self, name: str) -> nn.Linear:
        layer, part = self.locate(name)
        module = self._decoder.layers[layer].get_submodule(self.MODULES[part])
        assert isinstance(module, nn.Linear)
        return module

    def locate(self, name: str) -> tuple[int, str]:
        """Splits `layers.<number>.<part>` into a checked layer and part; negative layers count from the end."""
        match = _SITE.fullmatch(name)
        layer = int(match[1]) if match else 0
        layer = layer + self.num_layers if layer < 0 else layer
        if match is None or match[2] not in self.MODULES or not 0 <= layer < self.num_layers:
            raise InputError(
                f"Unknown site {name!r}: expected layers.<0..{self.num_layers - 1}>.<part> with part one of "
                f"{', '.join(self.MODULES)}."
            )
        return layer, match[2]

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        layer, part = self.locate(name)
        if part != "ffn.in":
            raise InputError(f"site {name!r} feeds no activation: choose an 'ffn.in' site.")
        activation: Callable[[Tensor], Tensor] = self._decoder.layers[layer].activation_fn
        return activation

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self._decoder.embed_tokens(tokens)
        return embedded

    def embed_positions(self, embedded_RSD: Tensor) -> Tensor:
        """The residual stream that enters layer 0."""
        length = embedded_RSD.shape[1]
        if length > self._max_positions:
            raise ValueError(f"sequence of {length} positions, the text model takes {self._max_positions}.")
        positions = torch.arange(length, device=embedded_RSD.device)
        if self._decoder.project_in is not None:
            embedded_RSD = self._decoder.project_in(embedded_RSD)
        # OPT's table has two unused rows in front, which its `offset` skips.
        table = self._decoder.embed_positions
        return embedded_RSD + nn.functional.embedding(positions + table.offset, table.weight)

    def block(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        out = self._decoder.layers[layer](hidden_RSD, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    def attention_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._decoder.layers[layer]
        attended, _ = block.self_attn(hidden_states=block.self_attn_layer_norm(hidden_RSD), attention_mask=None)
        out: Tensor = hidden_RSD + attended
        return out

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._decoder.layers[layer]
        inner = block.activation_fn(block.fc1(block.final_layer_norm(hidden_RSD)))
        out: Tensor = hidden_RSD + block.fc2(inner)
        return out

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        """Final norm, and the projection that small OPT models have behind it."""
        if self._decoder.final_layer_norm is not None:
            hidden_RSD = self._decoder.final_layer_norm(hidden_RSD)
        if self._decoder.project_out is not None:
            hidden_RSD = self._decoder.project_out(hidden_RSD)
        return hidden_RSD

    def head(self, hidden: Tensor) -> Tensor:
        # OPT's head has no bias, which the closed forms of `risks` rely on; logits in float32 for the losses.
        return nn.functional.linear(hidden, self._head.weight).float()
