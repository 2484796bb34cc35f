"""Text models as halves of layers, which a backbone's prefix and suffix run; one class per architecture.

Names of sites inside the layers are defined here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from odedit.backbones.common.layer_inputs import LayerInputs
from odedit.errors import InputError
from odedit.runtime.gather import gather_positions
from odedit.runtime.kv_cache import KVCache

FUSED: Mapping[str, str] = {
    **{f"attention.{part}": "attention.qkv" for part in "qkv"},
    **{f"ffn.{part}": "ffn.gate_in" for part in ("gate", "in")},
}
"""Part that holds another one where the model has one matrix for both."""
_SITE = re.compile(r"layers\.(?:(-?\d+)|(\d{1,2})%)\.([a-z_.]+)")


class Decoder(ABC):
    """A stack of layers, each an attention half and a feed-forward half, with its embeddings and its head.

    Attention is causal without a padding mask: sequences are right-padded, so no real position sees padding.

    Attributes:
        MODULES: Names of modules in `transformers` by part of a layer, as sites name it.
        BEFORE_NONLINEARITY: Part whose output the nonlinearity reads.
        num_layers: Number of layers.
        hidden_size: Width of the residual stream.
        max_positions: Length of the longest sequence.
        vocabulary_size: Number of logits.
        devices: Device of each layer, if they lie on several; else empty.
    """

    devices: tuple[torch.device, ...] = ()
    MODULES: ClassVar[Mapping[str, str]]
    BEFORE_NONLINEARITY: ClassVar[str]

    def __init__(self, stack: Any, head: nn.Linear, max_positions: int) -> None:
        """Takes the stack of layers with its embeddings, and the head, which has no bias."""
        self._stack = stack
        self._layers = stack.layers
        self._head = head
        self.num_layers = len(stack.layers)
        self.hidden_size = int(stack.config.hidden_size)
        self.max_positions = max_positions
        self.vocabulary_size = len(head.weight)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self._layers)

    def handed_to(
        self, layer: int, hidden: Tensor, inputs: LayerInputs | None, read: Tensor | None = None
    ) -> tuple[Tensor, LayerInputs | None, Any]:
        """States, inputs of the layers, and positions, on the device of a layer."""
        if not self.devices:
            return hidden, inputs, read
        device = self.devices[layer]
        return (
            hidden.to(device),
            None if inputs is None else inputs.to(device),
            None if read is None else read.to(device),
        )

    def handed_home(self, hidden: Tensor) -> Tensor:
        """States on the device of embeddings and head."""
        return hidden.to(self._head.weight.device) if self.devices else hidden

    def layer_values(self) -> Iterator[Tensor]:
        """Weights and buffers of all layers."""
        yield from self._layers.parameters()
        yield from self._layers.buffers()

    def site(self, name: str) -> nn.Linear:
        """The linear module of `layers.<n>.<part>`. Raises InputError as `locate`."""
        layer, part = self.locate(name)
        module = self._layers[layer].get_submodule(self.MODULES[part])
        assert isinstance(module, nn.Linear)
        return module

    def locate(self, name: str) -> tuple[int, str]:
        """Layer and part of `layers.<n>.<part>`; a negative n counts from the end, `25%` is at a quarter of the depth.

        Raises:
            InputError: No such layer or part; the message lists them.
        """
        match = _SITE.fullmatch(name)
        layer = int(match[1] or int(match[2]) * self.num_layers // 100) if match else 0
        layer = layer + self.num_layers if layer < 0 else layer
        if match is None or match[3] not in self.MODULES or not 0 <= layer < self.num_layers:
            raise InputError(
                f"Unknown site {name!r}: expected layers.<0..{self.num_layers - 1}>.<part> with part one of "
                f"{', '.join(self.MODULES)}."
            )
        return layer, match[3]

    def activation(self, name: str) -> Callable[[Tensor], Tensor]:
        """The nonlinearity that reads the output of a feed-forward site; the identity if none does.

        Raises:
            InputError: The site belongs to attention.
        """
        layer, part = self.locate(name)
        if not part.startswith("ffn"):
            parts = ", ".join(part for part in self.MODULES if part.startswith("ffn"))
            raise InputError(f"site {name!r} feeds no activation: choose a feed-forward site ({parts}).")
        return self._nonlinearity(layer) if part == self.BEFORE_NONLINEARITY else nn.Identity()

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings `(..., D)` of token ids, without positions."""
        embedded: Tensor = self._stack.embed_tokens(tokens)
        return embedded

    @abstractmethod
    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> LayerInputs | None:
        """Rotary embeddings of given positions, or of 0, 1, 2, ...; None for a model that adds its positions."""

    @abstractmethod
    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        """The residual stream that enters layer 0, at given positions or at 0, 1, 2, ..."""

    def attention_half(
        self,
        layer: int,
        hidden_RSD: Tensor,
        rotary: LayerInputs | None,
        read_RT: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """The residual stream after attention, `(R, S, D)`.

        Args:
            read_RT: Positions to compute, each attending to all before it; the result is then `(R, T, D)`.
            kv_cache: Stores the layer's keys and values.
        """
        normed_RSD = self._norm_before_attention(layer)(hidden_RSD)
        if read_RT is None:
            attended = self._attention(layer, normed_RSD, rotary, kv_cache)
            return hidden_RSD + self._after_attention(layer, attended)
        attended = self._attention_at(layer, normed_RSD, rotary, read_RT, kv_cache)
        return gather_positions(hidden_RSD, read_RT) + self._after_attention(layer, attended)

    def attention_half_cached(
        self, layer: int, hidden_RTD: Tensor, rotary: LayerInputs | None, last_R: Tensor, kv_cache: KVCache, kept: int
    ) -> Tensor:
        """The residual stream after attention, `(R, T, D)`, of T positions that continue cached sequences.

        Args:
            rotary: Rotary embeddings of the T positions, `(R, T, head width)`.
            last_R: Last position of each cached sequence to attend to.
            kept: Number of positions of earlier calls between `last_R` and the T new positions.
        """
        normed_RTD = self._norm_before_attention(layer)(hidden_RTD)
        attended = self._attention_cached(layer, normed_RTD, rotary, last_R, kv_cache, kept)
        return hidden_RTD + self._after_attention(layer, attended)

    @abstractmethod
    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        """The residual stream after the feed-forward half."""

    @abstractmethod
    def finish(self, hidden_RSD: Tensor) -> Tensor:
        """The final norm; its output is what the head reads."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32, for the losses. The closed forms of `risks` rely on a head without bias."""
        return nn.functional.linear(hidden, self._head.weight).float()

    @abstractmethod
    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]: ...

    @abstractmethod
    def _norm_before_attention(self, layer: int) -> Callable[[Tensor], Tensor]: ...

    def _after_attention(self, layer: int, attended: Tensor) -> Tensor:
        """What is added to the residual stream, from attention's output."""
        return attended

    def _attention(
        self, layer: int, normed_RSD: Tensor, rotary: LayerInputs | None, kv_cache: KVCache | None
    ) -> Tensor:
        """Causal attention at every position, `(R, S, D)`, by the library's own module."""
        tables = None if rotary is None else rotary.rotary[0]
        attended, _ = self._layers[layer].self_attn(
            hidden_states=normed_RSD, position_embeddings=tables, attention_mask=None, past_key_values=kv_cache
        )
        return cast(Tensor, attended)

    def _attention_at(
        self, layer: int, normed_RSD: Tensor, rotary: LayerInputs | None, read_RT: Tensor, kv_cache: KVCache | None
    ) -> Tensor:
        """Causal attention at the positions `read_RT`, `(R, T, D)`: their queries, the keys of all positions."""
        q, k, v = self._projected(layer, normed_RSD, rotary, read_RT)
        if kv_cache is not None:
            kv_cache.update(k, v, layer)
        if rotary is not None and rotary.mask_RSS is not None:
            return self._attend(layer, q, k, v, rotary.mask_at(read_RT))
        before_RTS = torch.arange(normed_RSD.shape[1], device=read_RT.device) <= read_RT.unsqueeze(-1)
        return self._attend(layer, q, k, v, before_RTS)

    def _attention_cached(
        self, layer: int, normed_RTD: Tensor, rotary: LayerInputs | None, last_R: Tensor, kv_cache: KVCache, kept: int
    ) -> Tensor:
        """Causal attention at T positions that follow cached position `last_R` and `kept` more, `(R, T, D)`."""
        q, k, v = self._projected(layer, normed_RTD, rotary)
        k, v = kv_cache.extended(layer, k, v, kept)
        num_rows, num_next = normed_RTD.shape[:2]
        num_before = k.shape[2] - num_next - kept
        seen_RS = torch.arange(num_before, device=last_R.device) <= last_R.unsqueeze(-1)
        among_TN = torch.ones(num_next, kept + num_next, dtype=torch.bool, device=last_R.device).tril(kept)
        mask_RTS = torch.cat([seen_RS.unsqueeze(1).expand(-1, num_next, -1), among_TN.expand(num_rows, -1, -1)], dim=-1)
        return self._attend(layer, q, k, v, mask_RTS)

    def _projected(
        self, layer: int, states: Tensor, rotary: LayerInputs | None, read_RT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, at the positions `read_RT` if these are given, keys and values, as `_heads`."""
        k, v = self._heads(layer, "k", states, rotary), self._heads(layer, "v", states)
        if read_RT is not None:
            states, rotary = gather_positions(states, read_RT), None if rotary is None else rotary.at(read_RT)
        return self._heads(layer, "q", states, rotary), k, v

    def _heads(self, layer: int, part: str, states: Tensor, rotary: LayerInputs | None = None) -> Tensor:
        """Queries, keys or values `(R, heads, positions, head width)`, rotated if there are rotary embeddings."""
        module = self._layers[layer].get_submodule(self.MODULES[f"attention.{part}"])
        width = self._layers[layer].self_attn.head_dim
        split: Tensor = module(states).unflatten(-1, (-1, width)).transpose(1, 2)
        return split if rotary is None else _rotated(split, *rotary.rotary[0])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask_RTS: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_RTS.unsqueeze(1), enable_gqa=q.shape[1] != k.shape[1]
        )
        out = self._layers[layer].get_submodule(self.MODULES["attention.out"])
        return cast(Tensor, out(attended.transpose(1, 2).flatten(2)))


def _rotated(x_RHSd: Tensor, cos_RSd: Tensor, sin_RSd: Tensor) -> Tensor:
    """Heads with rotary embeddings applied; LLaMA pairs the first half of the dimensions with the second."""
    first, second = x_RHSd.chunk(2, dim=-1)
    return x_RHSd * cos_RSd.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_RSd.unsqueeze(1)


class OPTDecoder(Decoder):
    """`OPTForCausalLM` (arXiv 2205.01068) with layer norm before each half, as in every size but 350m."""

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
        """Raises InputError for another model, a norm after each half, or projected embeddings."""
        if model.config.model_type != "opt" or not model.config.do_layer_norm_before:
            raise InputError(
                f"backbone.checkpoint: text model: got {model.config.model_type!r} with do_layer_norm_before="
                f"{getattr(model.config, 'do_layer_norm_before', None)}, expected an OPT model that normalises first."
            )
        if model.model.decoder.project_in is not None:
            raise InputError(
                f"backbone.checkpoint: the text model's embeddings have the width {model.config.word_embed_proj_dim}, "
                f"its layers {model.config.hidden_size} (as opt-350m's). Image features cannot enter before the "
                "projection between them; choose an OPT whose word_embed_proj_dim is its hidden_size."
            )
        super().__init__(model.model.decoder, model.lm_head, int(model.config.max_position_embeddings))

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> LayerInputs | None:
        return None

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        if positions_RS is None:
            positions_RS = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)
        # OPT's table has two unused rows in front, which its `offset` skips.
        table = self._stack.embed_positions
        return embedded_RSD + nn.functional.embedding(positions_RS + table.offset, table.weight)

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._layers[layer]
        inner = block.activation_fn(block.fc1(block.final_layer_norm(hidden_RSD)))
        out: Tensor = hidden_RSD + block.fc2(inner)
        return out

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        if self._stack.final_layer_norm is not None:
            hidden_RSD = self._stack.final_layer_norm(hidden_RSD)
        return hidden_RSD

    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].activation_fn)

    def _norm_before_attention(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].self_attn_layer_norm)


class LlamaDecoder(Decoder):
    """LLaMA (arXiv 2302.13971) and relatives: rotary positions, RMS norms, a gated feed-forward half.

    The feed-forward half is `ffn.out(silu(ffn.gate(x)) * ffn.in(x))`. Queries, keys and values may have a bias (Qwen2),
    and share heads (Mistral). A sliding window limits the length of sequences, so that all of them fit into it.
    """

    TYPES = ("llama", "mistral", "qwen2")
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
        """Takes a `LlamaModel` and its head. Raises InputError for another type, or a head with a bias."""
        config = model.config
        if config.model_type not in self.TYPES or head.bias is not None:
            bias = ", its head with a bias" if head.bias is not None else ""
            raise InputError(
                f"backbone.checkpoint: text model: got {config.model_type!r}{bias}, expected one of "
                f"{', '.join(self.TYPES)} with a head without bias."
            )
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        super().__init__(model, head, min(int(config.max_position_embeddings), int(window)))

    def rotary(self, embedded_RSD: Tensor, positions: Tensor | None) -> LayerInputs | None:
        if positions is None:
            positions = torch.arange(embedded_RSD.shape[1], device=embedded_RSD.device)[None]
        cos, sin = self._stack.rotary_emb(embedded_RSD, positions)
        return LayerInputs(((cos, sin),))

    def embed_positions(self, embedded_RSD: Tensor, positions_RS: Tensor | None = None) -> Tensor:
        return embedded_RSD

    def ffn_half(self, layer: int, hidden_RSD: Tensor) -> Tensor:
        block = self._layers[layer]
        out: Tensor = hidden_RSD + block.mlp(block.post_attention_layernorm(hidden_RSD))
        return out

    def finish(self, hidden_RSD: Tensor) -> Tensor:
        finished: Tensor = self._stack.norm(hidden_RSD)
        return finished

    def _nonlinearity(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].mlp.act_fn)

    def _norm_before_attention(self, layer: int) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], self._layers[layer].input_layernorm)
