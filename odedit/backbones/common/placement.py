"""Layers of one model on several GPUs: which layer lies where, and the hand-over between them.

The first device, home, holds image tower, connector, embeddings, head and the last layers, where most edits train. The
layers before them lie on the other devices, in order. Batches and edits stay at home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odedit.errors import InputError

_HOME = "odedit_home"


@dataclass(frozen=True)
class Placement:
    """Devices of a model.

    Attributes:
        home: Device of everything but the layers.
        layers: Device of each layer by its path in the model; empty: the whole model is at home.
    """

    home: torch.device
    layers: Mapping[str, torch.device] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[nn.Module], devices: Sequence[torch.device]) -> Placement:
        """Shares of about equal bytes, of which the last layer is at home.

        Args:
            model: Model that may be on the meta device.
            layers: Layers of its text model.

        Raises:
            InputError: There are fewer layers than devices.
        """
        home, *others = devices
        if not others:
            return cls(home)
        if len(layers) < len(devices):
            raise InputError(
                f"backbone.gpus: got {len(devices)}, but the text model has {len(layers)} layers; give as many at most."
            )
        sizes = [_bytes(layer) for layer in layers]
        share, at_home, away = _bytes(model) / len(devices), _bytes(model) - sum(sizes[:-1]), len(layers) - 1
        while away > len(others) and at_home + sizes[away - 1] <= share:
            away -= 1
            at_home += sizes[away]
        paths = {id(module): path for path, module in model.named_modules()}
        return cls(
            home,
            {
                paths[id(layer)]: others[index * len(others) // away] if index < away else home
                for index, layer in enumerate(layers)
            },
        )

    def of_values(self, name: str) -> torch.device:
        """Device of the parameter or buffer of this name in the model."""
        return next((device for path, device in self.layers.items() if name.startswith(f"{path}.")), self.home)

    def spread(self, model: nn.Module) -> None:
        """Moves a model in main memory to its devices, one tensor at a time, and connects its layers."""
        for name, module in model.named_modules():
            for values in (module._parameters, module._buffers):
                for key, value in values.items():
                    if value is not None:
                        value.data = value.data.to(self.of_values(f"{name}.{key}"))
        self.connect(model)

    def connect(self, model: nn.Module) -> None:
        """Makes the library's own forward hand its states over from layer to layer."""
        for path, device in self.layers.items():
            layer = model.get_submodule(path)
            layer.register_forward_pre_hook(_to(device), with_kwargs=True)
            if device != self.home:
                for module in layer.modules():
                    setattr(module, _HOME, self.home)


def devices_of(device: str, count: int) -> tuple[torch.device, ...]:
    """A device and those after it.

    Raises:
        InputError: There are not as many GPUs.
    """
    first = torch.device(device)
    if count == 1:
        return (first,)
    available = torch.cuda.device_count() if first.type == "cuda" else 0
    start = (torch.cuda.current_device() if first.index is None else first.index) if available else 0
    if start + count > available:
        raise InputError(
            f"backbone.gpus: got {count}, but from {device!r} on there are {max(0, available - start)} GPUs; leave it "
            "out, or run where there are as many."
        )
    return tuple(torch.device(first.type, start + number) for number in range(count))


def home_of(module: nn.Module) -> torch.device | None:
    """Device of batches and edits, for a module that lies elsewhere; None: the module's own."""
    home: torch.device | None = getattr(module, _HOME, None)
    return home


def moved(values: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and mappings on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


def _to(device: torch.device) -> Any:
    def hook(module: nn.Module, arguments: Any, named: Any) -> Any:
        return moved(arguments, device), moved(named, device)

    return hook


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.parameters())
