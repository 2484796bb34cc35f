"""What the library's own forward hands to the layers of the text model, without running them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odedit.backbones.common.placement import moved
from odedit.backbones.common.structure import Structure, Unsupported
from odedit.runtime.brief import brief


@dataclass(frozen=True)
class HandedOver:
    """Inputs of the layers, as the library makes them.

    Attributes:
        hidden_RSD: Residual stream that enters layer 0.
        positions: Positions that the rotary modules read, `(R or 1, S)` or `(axes, R, S)`; None without any.
        masks: True where a layer attends to a position, `(R, S, S)`; None: to itself and all before it.
        added: What is added to the residual stream after a layer, by layer.
    """

    hidden_RSD: Tensor
    positions: Tensor | None
    masks: tuple[Tensor | None, ...]
    added: Mapping[int, Tensor]

    __repr__ = brief


class _Done(Exception):
    """Raised in the last layer: nothing above it is of interest."""


def owner_of(model: Any) -> Any:
    """The module that turns pictures into features inside a model's forward. Raises Unsupported without one."""
    for module in (getattr(model, "model", None), model):
        if hasattr(module, "get_image_features"):
            return module
    raise Unsupported("it has no get_image_features, so its pictures take another way into the text model")


def takes(function: Any, name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in inspect.signature(function).parameters


def requires_pictures(model: Any) -> bool:
    """Whether the model's forward takes no text without pixel values."""
    return inspect.signature(model.forward).parameters["pixel_values"].default is inspect.Parameter.empty


@torch.no_grad()
def handed_over(model: Any, structure: Structure, named: Mapping[str, Any], features: Any) -> HandedOver:
    """Runs the model's forward up to the last layer, every layer giving zeros.

    Args:
        named: Arguments of the forward.
        features: What `get_image_features` is to return.
    """
    layers = list(structure.stack.layers)
    hidden: list[Tensor] = []
    masks: list[Tensor | None] = []
    made: list[Tensor] = []
    positions: list[Tensor] = []

    def layer_of(index: int) -> Any:
        def forward(*arguments: Any, **others: Any) -> Any:
            states = arguments[0] if arguments else others["hidden_states"]
            hidden.append(states)
            masks.append(_as_bool(others.get("attention_mask")))
            if index == len(layers) - 1:
                raise _Done
            made.append(torch.zeros_like(states, device=next(layers[index + 1].parameters()).device))
            return (made[-1],) if structure.layers[index].in_tuple else made[-1]

        return forward

    def seen(module: nn.Module, arguments: tuple[Any, ...], others: Mapping[str, Any]) -> None:
        positions.append(others["position_ids"] if "position_ids" in others else arguments[1])

    handles = [
        module.register_forward_pre_hook(seen, with_kwargs=True)
        for module in {id(table[0]): table[0] for table in structure.tables}.values()
    ]
    holders = [module for module in (model, getattr(model, "model", None)) if hasattr(module, "get_image_features")]
    with replaced(
        [
            *((layer, "forward", layer_of(index)) for index, layer in enumerate(layers)),
            *((holder, "get_image_features", lambda *_, **__: features) for holder in holders),
        ]
    ):
        try:
            model(**named)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
    added = {index: hidden[index + 1] for index, zeros in enumerate(made) if hidden[index + 1] is not zeros}
    home = model.get_input_embeddings().weight.device
    return HandedOver(*moved((hidden[0], positions[0] if positions else None, tuple(masks), added), home))


def _as_bool(mask: Tensor | None) -> Tensor | None:
    """A mask of the library, `(R, 1, S, S)`, as bool `(R, S, S)`."""
    if mask is None:
        return None
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask == 0


@contextmanager
def replaced(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Context in which attributes of modules have other values."""
    before = [(module, name, vars(module).get(name, _Done)) for module, name, _ in attributes]
    try:
        for module, name, value in attributes:
            object.__setattr__(module, name, value)
        yield
    finally:
        for module, name, value in reversed(before):
            if value is _Done:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, value)


@dataclass(frozen=True)
class Features:
    """Output of `get_image_features`, as one tensor and back.

    Attributes:
        example: An output.
        size: Positions of each entry, for a tensor of three axes; None for a list or a tensor of two.
        parts: Number of tensors side by side: the features, and those that enter later layers.
    """

    example: Any
    size: int | None
    parts: int

    @classmethod
    def like(cls, output: Any) -> Features:
        main = output.pooler_output
        if main is None:
            raise Unsupported("its get_image_features gives no pooler_output")
        size = int(main.shape[1]) if isinstance(main, Tensor) and main.dim() == 3 else None
        later = getattr(output, "deepstack_features", None) or ()
        return cls(output, size, 1 + len(later))

    def flat(self, output: Any) -> Tensor:
        """Features `(positions of all pictures, parts x D)`."""
        later = getattr(output, "deepstack_features", None) or ()
        return torch.cat([_flat(part) for part in (output.pooler_output, *later)], dim=-1)  # side by side

    def whole(self, features: Tensor) -> Any:
        """The output that has these features `(positions, parts x D)`."""
        main, *later = features.chunk(self.parts, dim=-1)
        output = copy.copy(self.example)
        if isinstance(self.example.pooler_output, Tensor):
            output["pooler_output"] = main if self.size is None else main.unflatten(0, (-1, self.size))
        else:
            output["pooler_output"] = type(self.example.pooler_output)([main])
        if later:
            nested = [isinstance(part, Tensor) for part in self.example.deepstack_features]
            output["deepstack_features"] = [
                part if is_plain else [part] for part, is_plain in zip(later, nested, strict=True)
            ]
        return output


def _flat(part: Any) -> Tensor:
    tensors = [part] if isinstance(part, Tensor) else list(part)
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
