"""Language models in halves of layers: what a backbone's prefix and suffix are made of.

One class per architecture of text model. Sites are named here and nowhere else.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from odedit.errors import InputError
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KeyValues

_SITE = re.compile(r"layers\.(-?\d+)\.([a-z.]+)")

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines `(1 or R, S, head width)`."""


class Decoder(Protocol):
    """A text model, run from any half of a layer on.

    Attributes:
        max_positions: Of its longest sequence.
    """

    num_layers: int
    hidden_size: int
    max_positions: int
    vocabulary_size: int

    def site(self, name: str) -> nn.Linear:
        """The linear module of `layers.<n>.<part>`; InputError names the parts there are."""
        ...

    def locate(self, name: str) -> tuple[int, str]:
        """Splits `layers.<number>.<part>` into a checked layer and part; negative layers count from the end."""
        ...

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """What the output of a feed-forward site passes through; InputError for a site of attention."""
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor: ...

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> Rotary | None:
        """Rotary embeddings of given positions, or of 0, 1, 2, ...; None for a model that adds its positions."""
        ...

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        """The residual stream that enters layer 0; at positions 0, 1, 2, ... or at those given."""
        ...

    def attention_half(
        self,
        layer: int,
        hidden_RSD: Tensor,
        rotary: Rotary | None,
        read_RT: Tensor | None = None,
        memory: KeyValues | None = None,
    ) -> Tensor:
        """`(R, S, D)` behind attention; `(R, T, D)` at the positions `read_RT` alone, which attend to all before.

        Args:
            memory: Takes the layer's keys and values.
        """
        ...

    def attention_half_behind(
        self, layer: int, hidden_RTD: Tensor, rotary: Rotary | None, last_R: Tensor, memory: KeyValues, kept: int
    ) -> Tensor:
        """`(R, T, D)` behind attention, of T positions in order that follow position `last_R` of what `memory` holds.

        Args:
            rotary: Of these positions, `(R, T, head width)`.
            kept: So many others stand between, from an earlier call that began with them.
        """
        ...

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor: ...

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        """What the head reads."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32."""
        ...


class _Sites(ABC):
    """Names of the linear modules of a stack of layers, and attention in all of its forms.

    Attributes:
        MODULES: Part of a layer to its module in `transformers`.
        BEFORE_NONLINEARITY: The part whose output the nonlinearity reads.
    """

    MODULES: ClassVar[Mapping[str, str]]
    BEFORE_NONLINEARITY: ClassVar[str]
    num_layers: int
    _layers: Any

    def site(self, name: str) -> nn.Linear:
        layer, part = self.locate(name)
        module = self._layers[layer].get_submodule(self.MODULES[part])
        assert isinstance(module, nn.Linear)
        return module

    def locate(self, name: str) -> tuple[int, str]:
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
        if not part.startswith("ffn"):
            parts = ", ".join(part for part in self.MODULES if part.startswith("ffn"))
            raise InputError(f"site {name!r} feeds no activation: choose a feed-forward site ({parts}).")
        return self._nonlinearity(layer) if part == self.BEFORE_NONLINEARITY else nn.Identity()

    @abstractmethod
    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]: ...

    @abstractmethod
    def _norm_before_attention(self, layer: int) -> nn.Module: ...

    def attention_half(
        self,
        layer: int,
        hidden_RSD: Tensor,
        rotary: Rotary | None,
        read_RT: Tensor | None = None,
        memory: KeyValues | None = None,
    ) -> Tensor:
        normed_RSD = self._norm_before_attention(layer)(hidden_RSD)
        if read_RT is None:
            return hidden_RSD + self._whole(layer, normed_RSD, rotary, memory)
        return gather_positions(hidden_RSD, read_RT) + self._read(layer, normed_RSD, rotary, read_RT, memory)

    def attention_half_behind(
        self, layer: int, hidden_RTD: Tensor, rotary: Rotary | None, last_R: Tensor, memory: KeyValues, kept: int
    ) -> Tensor:
        normed_RTD = self._norm_before_attention(layer)(hidden_RTD)
        return hidden_RTD + self._behind(layer, normed_RTD, rotary, last_R, memory, kept)

    def _whole(self, layer: int, normed_RSD: Tensor, rotary: Rotary | None, memory: KeyValues | None) -> Tensor:
        """What causal attention adds at every position, as the library computes it."""
        attended, _ = self._layers[layer].self_attn(
            hidden_states=normed_RSD, position_embeddings=rotary, attention_mask=None, past_key_values=memory
        )
        return cast(Tensor, attended)

    def _read(
        self, layer: int, normed_RSD: Tensor, rotary: Rotary | None, read_RT: Tensor, memory: KeyValues | None
    ) -> Tensor:
        """What causal attention adds at the positions `read_RT`, `(R, T, D)`: their queries, everybody's keys."""
        if rotary is not None:
            cos, sin = (part.expand(len(normed_RSD), -1, -1) for part in rotary)
            rotary = cos, sin
        k, v = self._heads(layer, "k", normed_RSD, rotary), self._heads(layer, "v", normed_RSD)
        if memory is not None:
            memory.update(k, v, layer)
        at_them = (
            None if rotary is None else (gather_positions(rotary[0], read_RT), gather_positions(rotary[1], read_RT))
        )
        q = self._heads(layer, "q", gather_positions(normed_RSD, read_RT), at_them)
        before_RTS = torch.arange(normed_RSD.shape[1], device=read_RT.device) <= read_RT.unsqueeze(-1)
        return self._attended(layer, q, k, v, before_RTS)

    def _behind(
        self, layer: int, normed_RTD: Tensor, rotary: Rotary | None, last_R: Tensor, memory: KeyValues, kept: int
    ) -> Tensor:
        """What causal attention adds at T positions behind position `last_R` of others and `kept` more, `(R, T, D)`."""
        q, k = (self._heads(layer, part, normed_RTD, rotary) for part in "qk")
        k, v = memory.extended(layer, k, self._heads(layer, "v", normed_RTD), kept)
        num_rows, num_next = normed_RTD.shape[:2]
        num_before = k.shape[2] - num_next - kept
        seen_RS = torch.arange(num_before, device=last_R.device) <= last_R.unsqueeze(-1)
        among_TN = torch.ones(num_next, kept + num_next, dtype=torch.bool, device=last_R.device).tril(kept)
        mask_RTS = torch.cat([seen_RS.unsqueeze(1).expand(-1, num_next, -1), among_TN.expand(num_rows, -1, -1)], dim=-1)
        return self._attended(layer, q, k, v, mask_RTS)

    def _heads(self, layer: int, part: str, states: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Queries, keys or values `(R, heads, positions, head width)`, turned if there are rotary embeddings."""
        module = self._layers[layer].get_submodule(self.MODULES[f"attention.{part}"])
        width = self._layers[layer].self_attn.head_dim
        split: Tensor = module(states).unflatten(-1, (-1, width)).transpose(1, 2)
        return split if rotary is None else _rotated(split, *rotary)

    def _attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask_RTS: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_RTS.unsqueeze(1), enable_gqa=q.shape[1] != k.shape[1]
        )
        out = self._layers[layer].get_submodule(self.MODULES["attention.out"])
        return cast(Tensor, out(attended.transpose(1, 2).flatten(2)))


def _rotated(x_RHSd: Tensor, cos_RSd: Tensor, sin_RSd: Tensor) -> Tensor:
    """Rotary embedding of heads, as LLaMA pairs the dimensions: the first half with the second."""
    first, second = x_RHSd.chunk(2, dim=-1)
    return x_RHSd * cos_RSd.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_RSd.unsqueeze(1)


class OPTDecoder(_Sites):
    """`OPTForCausalLM` (arXiv 2205.01068) with layer norm before each half, as in every size but 350m.

    Attention is causal without a padding mask: sequences are right-padded, so no real position ever sees padding.
    """

    BEFORE_NONLINEARITY = "ffn.in"
    MODULES: ClassVar[Mapping[str, str]] = {
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
                f"backbone.checkpoint: text model: got {model.config.model_type!r} with do_layer_norm_before="
                f"{getattr(model.config, 'do_layer_norm_before', None)}, expected an OPT model that normalises first."
            )
        if model.model.decoder.project_in is not None:
            raise InputError(
                f"backbone.checkpoint: the text model's embeddings have the width {model.config.word_embed_proj_dim}, "
                f"its layers {model.config.hidden_size} (as opt-350m's). Image features have no place in front of the "
                "projection between them; choose an OPT whose word_embed_proj_dim is its hidden_size."
            )
        self._decoder: Any = model.model.decoder
        self._layers = self._decoder.layers
        self._head = model.lm_head
        self.max_positions = int(model.config.max_position_embeddings)
        self.num_layers = len(self._decoder.layers)
        self.hidden_size = int(model.config.hidden_size)
        self.vocabulary_size = len(model.lm_head.weight)

    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].activation_fn)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self._decoder.embed_tokens(tokens)
        return embedded

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> Rotary | None:
        return None

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        if positions_RS is None:
            positions_RS = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)
        # OPT's table has two unused rows in front, which its `offset` skips.
        table = self._decoder.embed_positions
        return embedded_RSD + nn.functional.embedding(positions_RS + table.offset, table.weight)

    def _norm_before_attention(self, layer: int) -> nn.Module:
        return cast(nn.Module, self._layers[layer].self_attn_layer_norm)

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._decoder.layers[layer]
        inner = block.activation_fn(block.fc1(block.final_layer_norm(hidden_RSD)))
        out: Tensor = hidden_RSD + block.fc2(inner)
        return out

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        if self._decoder.final_layer_norm is not None:
            hidden_RSD = self._decoder.final_layer_norm(hidden_RSD)
        return hidden_RSD

    def head(self, hidden: Tensor) -> Tensor:
        # OPT's head has no bias, which the closed forms of `risks` rely on; logits in float32 for the losses.
        return nn.functional.linear(hidden, self._head.weight).float()


class LlamaDecoder(_Sites):
    """LLaMA (arXiv 2302.13971) and what is built like it: rotary positions, RMS norms, a gated feed-forward half.

    The feed-forward half is `ffn.out(silu(ffn.gate(x)) * ffn.in(x))`. Queries, keys and values may have a bias (Qwen2),
    and share heads (Mistral). Attention is causal without a padding mask, as in `OPTDecoder`; a sliding window changes
    nothing for sequences that fit into it.
    """

    TYPES = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")
    BEFORE_NONLINEARITY = "ffn.gate"
    MODULES: ClassVar[Mapping[str, str]] = {
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "ffn.gate": "mlp.gate_proj",
        "ffn.in": "mlp.up_proj",
        "ffn.out": "mlp.down_proj",
    }

    def __init__(self, model: Any, head: nn.Linear) -> None:
        """Takes the stack of layers with its embeddings (`LlamaModel`) and the head."""
        config = model.config
        if config.model_type not in self.TYPES or head.bias is not None:
            bias = ", its head with a bias" if head.bias is not None else ""
            raise InputError(
                f"backbone.checkpoint: text model: got {config.model_type!r}{bias}, expected one of "
                f"{', '.join(self.TYPES)} without."
            )
        self._decoder: Any = model
        self._layers = model.layers
        self._head: nn.Linear = head
        self.max_positions = min(
            int(config.max_position_embeddings),
            int(getattr(config, "sliding_window", None) or config.max_position_embeddings),
        )
        self.num_layers = len(model.layers)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary_size = len(head.weight)

    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].mlp.act_fn)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self._decoder.embed_tokens(tokens)
        return embedded

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> Rotary | None:
        if positions is None:
            positions = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)[None]
        cos, sin = self._decoder.rotary_emb(embedded_RSD, positions)
        return cos, sin

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        return embedded_RSD

    def _norm_before_attention(self, layer: int) -> nn.Module:
        return cast(nn.Module, self._layers[layer].input_layernorm)

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._layers[layer]
        out: Tensor = hidden_RSD + block.mlp(block.post_attention_layernorm(hidden_RSD))
        return out

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        finished: Tensor = self._decoder.norm(hidden_RSD)
        return finished

    def head(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self._head.weight).float()
