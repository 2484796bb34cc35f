"""A text model whose halves of layers were found by watching it run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from odedit.backbones.common.decoders import Decoder
from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.backbones.common.structure import Structure, Unsupported
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache


class TracedDecoder(Decoder):
    """Any text model of attention halves and feed-forward halves, run by the library's own modules.

    Attributes:
        structure: What was found.
        first_position: Position of the first token.
        axes: Number of axes of rotary positions; 1 for a number per token.
        scale: Factor of the logits, which the final states are multiplied by.
        grouped: Whether one matrix for queries, keys and values has them in turns, for each head of the keys, instead
            of all queries first, then all keys and all values.
        partly: Whether attention rotates only the first dimensions of a head, as many as the rotary tables have.
    """

    structure: Structure
    first_position: int
    axes: int
    scale: float
    grouped: bool
    partly: bool
    _embeddings: Any
    _added_positions: Any
    _width: list[int]
    _rotate: list[Callable[[Tensor, Tensor, Tensor], Tensor]]

    def __init__(self, model: Any) -> None:
        """Raises Unsupported for a text model that does not run in halves, or whose head is not linear."""
        self.structure = Structure.of(model)
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise Unsupported("its head is no linear module without bias")
        if getattr(config, "final_logit_softcapping", None):
            raise Unsupported("its head caps logits (final_logit_softcapping), so its gradients have no closed form")
        self._embeddings = model.get_input_embeddings()
        self.MODULES = self.structure.layers[0].sites
        self.BEFORE_NONLINEARITY = self.structure.layers[0].before_nonlinearity
        super().__init__(self.structure.stack, head, _longest(config))
        self.hidden_size = int(config.hidden_size)
        self.first_position, self.axes, self.scale = 0, 1, 1.0
        self.grouped = self.partly = False
        self._rotate = [self._rotation(layer) for layer in range(self.num_layers)]
        self._width = [self._head_width(layer) for layer in range(self.num_layers)]
        self._added_positions = self._position_table()

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self._embeddings(tokens.clamp(max=len(self._embeddings.weight) - 1))
        return embedded

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> LayerInputs | None:
        if not self.structure.tables:
            return None
        if positions is None:
            positions = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)[None] + self.first_position
            positions = positions if self.axes == 1 else positions.expand(self.axes, 1, -1)
        tables = []
        for module, arguments, named in self.structure.tables:
            cos, sin = module(embedded_RSD, positions, *arguments, **named)
            tables.append((cos, sin))
        return LayerInputs(tuple(tables))

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        table = self._added_positions
        if table is None:
            return embedded_RSD
        if positions_RS is None:
            positions_RS = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)
        return embedded_RSD + nn.functional.embedding(positions_RS + table.offset, table.weight)

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        return hidden_RSD + self._run(layer, self.structure.layers[layer].ffn, hidden_RSD)

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        for module in self.structure.last:
            hidden_RSD = module(hidden_RSD)
        return hidden_RSD if self.scale == 1.0 else hidden_RSD * self.scale

    def attention(self, layer: int) -> Any:
        """The attention module of a layer."""
        return self._layers[layer].get_submodule(self.structure.layers[layer].attention)

    def _run(self, layer: int, paths: Sequence[str], states: Tensor) -> Tensor:
        for path in paths:
            states = self._layers[layer].get_submodule(path)(states)
        return states

    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]:
        found = self.structure.layers[layer]
        function = cast(Callable[[Tensor], Tensor], self._layers[layer].get_submodule(found.nonlinearity))
        if found.gate is None:
            return function
        start, end = found.gate
        return lambda x: torch.cat([x[..., :start], function(x[..., start:end]), x[..., end:]], dim=-1)

    def _norm_before_attention(self, layer: int) -> Callable[[Tensor], Tensor]:
        return partial(self._run, layer, self.structure.layers[layer].before)

    def _after_attention(self, layer: int, attended: Tensor) -> Tensor:
        return self._run(layer, self.structure.layers[layer].after, attended)

    def _attention(
        self, layer: int, normed_RSD: Tensor, rotary: LayerInputs | None, kv_cache: KVCache | None
    ) -> Tensor:
        mask = None if rotary is None or rotary.mask_RSS is None else rotary.mask_RSS.unsqueeze(1)
        named: dict[str, Any] = {"attention_mask": mask, "past_key_values": kv_cache}
        table = self.structure.layers[layer].table
        if rotary is not None and table is not None:
            named["position_embeddings"] = rotary.rotary[table]
        attended = self.attention(layer)(hidden_states=normed_RSD, **named)
        return cast(Tensor, attended[0] if isinstance(attended, tuple) else attended)

    def _projected(
        self, layer: int, states: Tensor, rotary: LayerInputs | None, read_RT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        projections = self.structure.layers[layer].projections
        if "qkv" not in projections:
            return super()._projected(layer, states, rotary, read_RT)
        # One call at all positions: an editor that rewrites the matrix's output sees it as in the library's attention.
        q, k, v = self._split(layer, self.attention(layer).get_submodule(projections["qkv"])(states))
        k, v = self._as_heads(layer, "k", k, rotary), self._as_heads(layer, "v", v)
        if read_RT is not None:
            q, rotary = gather_positions(q, read_RT), None if rotary is None else rotary.at(read_RT)
        return self._as_heads(layer, "q", q, rotary), k, v

    def _split(self, layer: int, projected: Tensor) -> list[Tensor]:
        """Queries, keys and values of one matrix's output, each `(..., heads x head width)`."""
        out = self.attention(layer).get_submodule(self.structure.layers[layer].projections["out"])
        queries = out.in_features
        shared = (projected.shape[-1] - queries) // 2
        if not self.grouped:
            return list(projected.split([queries, shared, shared], dim=-1))
        width = self._width[layer]
        by_group = projected.unflatten(-1, (shared // width, -1))
        return [part.flatten(-2) for part in by_group.split([queries * width // shared, width, width], dim=-1)]

    def _heads(self, layer: int, part: str, states: Tensor, rotary: LayerInputs | None = None) -> Tensor:
        path = self.structure.layers[layer].projections[part]
        return self._as_heads(layer, part, self.attention(layer).get_submodule(path)(states), rotary)

    def _as_heads(self, layer: int, part: str, projected: Tensor, rotary: LayerInputs | None = None) -> Tensor:
        found, attention = self.structure.layers[layer], self.attention(layer)
        path, by_head = found.norms.get(part, ("", False))
        if path and not by_head:
            projected = attention.get_submodule(path)(projected)
        split = projected.unflatten(-1, (-1, self._width[layer]))
        if path and by_head:
            split = attention.get_submodule(path)(split)
        heads: Tensor = split.transpose(1, 2)
        if rotary is None or found.table is None:
            return heads
        return self._rotate[layer](heads, *rotary.rotary[found.table])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask_RTS: Tensor) -> Tensor:
        attention = self.attention(layer)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_RTS.unsqueeze(1), scale=getattr(attention, "scaling", None),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        out = attention.get_submodule(self.structure.layers[layer].projections["out"])
        return cast(Tensor, out(attended.transpose(1, 2).flatten(2)))

    def _rotation(self, layer: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function beside the attention's class that applies rotary embeddings."""
        module = sys.modules[type(self.attention(layer)).__module__]
        apply: Any = getattr(module, "apply_rotary_pos_emb", None)
        if apply is None and self.structure.layers[layer].table is not None:
            raise Unsupported(f"{module.__name__} has no apply_rotary_pos_emb")

        def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            # The function rotates queries and keys: here one of them, and no head of the other.
            turned, kept = heads, heads[..., :0]
            if self.partly:
                turned, kept = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
            turned = cast(Tensor, apply(turned, turned[:, :0], cos, sin)[0])
            return torch.cat([turned, kept], dim=-1) if self.partly else turned

        return rotated

    def _head_width(self, layer: int) -> int:
        width = getattr(self.attention(layer), "head_dim", None)
        if width is None:
            raise Unsupported(f"layers.{layer}: its attention does not name the width of its heads (head_dim)")
        return int(width)

    def _position_table(self) -> Any:
        """The table of learned positions that the stack adds; None for rotary positions."""
        if self.structure.tables:
            return None
        table = getattr(self._stack, "embed_positions", None)
        if not hasattr(table, "offset") or getattr(self._stack, "project_in", None) is not None:
            raise Unsupported("its positions are neither rotary nor a table that is added to embeddings (project_in)")
        return table


def _longest(config: Any) -> int:
    """Length of the longest sequence, in which no layer's window ends."""
    kinds: Mapping[str, None] = dict.fromkeys(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return min(longest, int(window)) if window and "sliding_attention" in kinds else longest
