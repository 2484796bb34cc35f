"""A picture's way to the text model, split into the image tower and the connector behind it, for any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odedit.backbones.common.library_forward import replaced, takes


class _Done(Exception):
    """Raised when the connector is called: nothing above it is of interest."""


def connector_of(owner: Any, decoder: nn.Module) -> dict[str, nn.Module]:
    """Modules with matrices between image tower and text model, by their name in the model.

    They are beside the tower in most models, and inside it, beside its layers, in others.
    """
    inside = set(decoder.modules())
    children = {name: child for name, child in owner.named_children() if child not in inside and decoder is not child}
    children = {name: child for name, child in children.items() if decoder not in set(child.modules())}
    tower = tower_name(owner, decoder)
    beside = {name: child for name, child in children.items() if name != tower and not isinstance(child, nn.Embedding)}
    if not beside:
        layers = tower_layers(children[tower])
        beside = {f"{tower}.{name}": child for name, child in children[tower].named_children() if child is not layers}
    called: dict[str, nn.Module] = {}
    for name, child in beside.items():
        parts = {name: child} if not isinstance(child, nn.ModuleList) else {
            f"{name}.{index}": part for index, part in enumerate(child)
        }  # fmt: skip
        called |= {path: part for path, part in parts.items() if _has_linear(part)}
    return called


def tower_name(owner: Any, decoder: nn.Module) -> str:
    """Name of the image tower: the first child with a list of layers that is not the text model."""
    return next(
        name
        for name, child in owner.named_children()
        if decoder not in set(child.modules()) and any(isinstance(part, nn.ModuleList) for part in child.modules())
    )


def tower_layers(tower: nn.Module) -> nn.ModuleList:
    """The longest list of modules in a tower."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len)


class Vision:
    """`get_image_features` in two halves.

    Attributes:
        owner: Module that has `get_image_features`.
        connector: Modules of the connector by name.
    """

    def __init__(self, owner: Any, decoder: nn.Module) -> None:
        self.owner = owner
        self.connector = connector_of(owner, decoder)
        self._layers = tower_layers(owner.get_submodule(tower_name(owner, decoder)))
        self._fed: list[tuple[str, Any]] = []
        self._shapes: list[tuple[int, ...]] = []
        self._in_tuple = False

    def features(self, pixels: Tensor, inputs: Mapping[str, Tensor]) -> Any:
        """Output of the library's own `get_image_features`."""
        named = {name: value for name, value in inputs.items() if takes(self.owner.get_image_features, name)}
        return self.owner.get_image_features(pixels, **named)

    def find_split(self, pictures: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> bool:
        """Finds what the connector reads, from two unlike pictures of one size; False if it cannot be told.

        Sets which modules of the connector read the tower, and which only read each other.
        """
        first, second = (self._reads(*picture) for picture in pictures)
        self._fed = []
        kept: dict[str, Tensor] = {}
        for name in self.connector:
            differ = [
                at for at in first.get(name, {})
                if isinstance(first[name][at], Tensor) and not torch.equal(first[name][at], second[name][at])
            ]  # fmt: skip
            if not differ:
                continue
            if len(differ) > 1:
                return False
            if not self._follows(name, pictures[0], first[name][differ[0]]):
                self._fed.append((name, differ[0]))
                kept[name] = first[name][differ[0]]
        if not self._fed:
            return False
        self._shapes = [tuple(kept[name].shape) for name, _ in self._fed]
        counts = {tensor[..., 0].numel() for tensor in kept.values()}
        return len(counts) == 1

    @property
    def width(self) -> int:
        """Width of the result of `tower`."""
        return sum(shape[-1] for shape in self._shapes) or 1

    def tower(self, pixels: Tensor, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        """What the connector reads, `(pictures, patches, width)`."""
        reads = self._reads(pixels, inputs, stop=True)
        return torch.cat([_by_picture(reads[name][at], count) for name, at in self._fed], dim=-1)

    def connect(self, vision: Tensor, pixels: Tensor, inputs: Mapping[str, Tensor]) -> Any:
        """Output of `get_image_features` with the connector's input in place of the tower's output.

        Args:
            vision: Result of `tower`.
            pixels, inputs: Any pictures of the same shapes; the tower's layers do not run.
        """
        widths = [shape[-1] for shape in self._shapes]
        parts = dict(zip((name for name, _ in self._fed), vision.split(widths, dim=-1), strict=True))
        shapes = dict(zip((name for name, _ in self._fed), self._shapes, strict=True))

        def feed(name: str, at: Any) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
                value = parts[name].reshape(-1, *shapes[name][1:]).contiguous()
                if isinstance(at, str):
                    return arguments, named | {at: value}
                return (*arguments[:at], value, *arguments[at + 1 :]), named

            return hook

        handles = [
            self.connector[name].register_forward_pre_hook(feed(name, at), with_kwargs=True) for name, at in self._fed
        ]
        try:
            with replaced([(layer, "forward", self._passed_on) for layer in self._layers]):
                return self.features(pixels, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _passed_on(self, *arguments: Any, **named: Any) -> Any:
        states = arguments[0] if arguments else named["hidden_states"]
        return (states,) if self._in_tuple else states

    def _reads(
        self, pixels: Tensor, inputs: Mapping[str, Tensor], stop: bool = False
    ) -> dict[str, dict[int | str, Any]]:
        """Arguments of the connector's modules, by module."""
        reads: dict[str, dict[int | str, Any]] = {}
        wanted = {name for name, _ in self._fed}

        def hook(name: str) -> Any:
            def record(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                read: dict[int | str, Any] = dict(enumerate(arguments))
                read.update(named)
                reads[name] = read
                if stop and wanted <= reads.keys():  # not in the order in which they are defined
                    raise _Done

            return record

        def layer_hook(module: nn.Module, arguments: Any, made: Any) -> None:
            self._in_tuple = isinstance(made, tuple)

        handles = [
            module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in self.connector.items()
        ]
        handles.append(self._layers[0].register_forward_hook(layer_hook))
        try:
            self.features(pixels, inputs)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return reads

    def _follows(self, name: str, picture: tuple[Tensor, Mapping[str, Tensor]], read: Tensor) -> bool:
        """Whether a module reads another one of the connector: its input changes with that one's output."""

        def disturb(module: nn.Module, arguments: Any, made: Any) -> Any:
            if isinstance(made, Tensor):
                return made + 1
            if hasattr(made, "last_hidden_state"):
                made["last_hidden_state"] = made["last_hidden_state"] + 1
                return made
            return (made[0] + 1, *made[1:])

        others = [module for other, module in self.connector.items() if other != name]
        handles = [module.register_forward_hook(disturb) for module in others]
        try:
            reads = self._reads(*picture)
        finally:
            for handle in handles:
                handle.remove()
        changed = [value for value in reads[name].values() if isinstance(value, Tensor) and value.shape == read.shape]
        return not any(torch.equal(value, read) for value in changed)


def _by_picture(read: Tensor, count: int) -> Tensor:
    return read.reshape(count, -1, read.shape[-1])


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())
