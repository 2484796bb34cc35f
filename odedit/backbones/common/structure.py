"""Structure of a text model, found by watching one forward: halves of layers, their matrices, norms and rotary tables.

No name of a model is looked at. A layer is a chain of modules from the residual stream to attention and back, and a
second one through the feed-forward network; a chain ends where a module's input is not its predecessor's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from odedit.errors import InputError, in_words
from odedit.runtime.brief import brief

_LENGTH = 4


class Unsupported(Exception):
    """A text model that cannot be run in halves of layers; the message says at what point."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its name, its first tensor, its further arguments, and its first output."""

    name: str
    module: nn.Module
    read: Tensor | None
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    made: Any

    __repr__ = brief

    @property
    def output(self) -> Any:
        return self.made[0] if isinstance(self.made, tuple) else self.made


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Calls of modules, in the order in which they end."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], made: Any) -> None:
            tensors = (value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
            calls.append(Call(name, module, next(tensors, None), arguments, named, made))

        return record

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Layer:
    """A layer's modules, by their path in it.

    Attributes:
        before, after: Modules of the attention half before attention and after it, before the sum.
        attention: Attention.
        accepts: Names of the arguments that attention is called with.
        projections: Queries, keys, values and output of attention, by part: `q`, `k`, `v` or one for all, `qkv`; `out`.
        norms: Norms of queries, keys and values, by part, each with whether it reads single heads.
        ffn: Modules of the feed-forward half, in order.
        sites: Path of every linear module, by part of a layer as sites name it.
        nonlinearity: Path of the feed-forward nonlinearity.
        before_nonlinearity: Part whose output it reads.
        gate: First column of that output that it reads, and the one after the last; None: it reads all.
        table: Which rotary table attention reads; None: none.
        in_tuple: Whether the layer returns its states in a tuple.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    attention: str
    accepts: frozenset[str]
    projections: Mapping[str, str]
    norms: Mapping[str, tuple[str, bool]]
    ffn: tuple[str, ...]
    sites: Mapping[str, str]
    nonlinearity: str
    before_nonlinearity: str
    gate: tuple[int, int] | None
    table: int | None
    in_tuple: bool


@dataclass(frozen=True)
class Structure:
    """A text model's parts.

    Attributes:
        stack: Module that holds the layers.
        layers: The layers' structure.
        last: Modules of the stack after the last layer.
        tables: Rotary modules, each with the arguments after hidden states and positions, one for each kind of layer.
    """

    stack: Any
    layers: tuple[Layer, ...]
    last: tuple[nn.Module, ...]
    tables: tuple[tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]], ...]

    @classmethod
    def of(cls, model: Any) -> Self:
        """The structure of a model's text model, which may be on the meta device. Raises Unsupported."""
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise Unsupported(f"its text model ({config.model_type}) is an encoder with a decoder, not one stack")
        stack = stack_of(model, int(config.num_hidden_layers))
        inside = {name: module for name, module in stack.named_modules() if name}
        width = int(config.hidden_size)
        for name, parameter in stack.layers.named_parameters():
            if parameter.dim() > 2:
                raise Unsupported(f"layers.{name} has {parameter.dim()} axes: routed experts are no site of an edit")
        embedded = torch.zeros(1, _LENGTH, width, device=model.device, dtype=model.dtype)
        # Given a mask of four axes, the library makes none, for which it would read values.
        mask = torch.ones(1, 1, _LENGTH, _LENGTH, device=model.device, dtype=torch.bool)
        with watched(inside) as calls, torch.no_grad():
            try:
                stack(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
            except Exception:  # OPT takes no such mask; what the library raises depends on the model
                calls.clear()
                try:
                    stack(inputs_embeds=embedded, use_cache=False)
                except Exception as error:
                    raise Unsupported(f"its stack of layers does not run by itself: {in_words(error)}") from error
        tables: list[Call] = []
        for call in calls:
            if isinstance(call.made, tuple) and len(call.made) == 2 and "rotary" in type(call.module).__name__.lower():
                tables.append(call)
        of_tables = [table.made[0] for table in tables]
        layers = tuple(_layer(f"layers.{index}", module, calls, of_tables) for index, module in enumerate(stack.layers))
        if len({tuple(layer.sites) for layer in layers}) != 1:
            raise Unsupported("its layers do not all have the same matrices")
        ended = next(index for index, call in enumerate(calls) if call.module is stack.layers[-1])
        last = tuple(call.module for call in calls[ended + 1 :] if "." not in call.name)
        made = tuple((call.module, tuple(call.arguments[2:]), _rest(call.named)) for call in tables)
        return cls(stack, layers, last, made)


def stack_of(model: Any, count: int) -> Any:
    """The module of a model's text model whose `layers` are that many. Raises Unsupported."""
    decoder = model.get_decoder()
    for module in decoder.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return module
    raise Unsupported(f"its text model ({type(decoder).__name__}) has no list of {count} layers")


def _rest(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not isinstance(value, Tensor)}


def _layer(name: str, layer: nn.Module, calls: Sequence[Call], tables: Sequence[Any]) -> Layer:
    """Raises Unsupported for a layer that is no attention half and feed-forward half."""
    inside = [call for call in calls if call.name.startswith(f"{name}.")]
    own = [call for call in inside if "." not in call.name.removeprefix(f"{name}.")]
    whole = next((call for call in calls if call.module is layer), None)
    if whole is None:
        raise Unsupported(f"{name} does not run for a text: it attends to pictures (cross attention)")
    chains: list[list[Call]] = []
    for call in own:
        if chains and call.read is chains[-1][-1].output:
            chains[-1].append(call)
        else:
            chains.append([call])
    made = [call.output for call in own]
    parallel = any(any(chain[0].read is output for output in made) for chain in chains[1:])
    if len(chains) != 2 or parallel or chains[0][0].read is not whole.read:
        kinds = " | ".join(", ".join(call.name.rsplit(".", 1)[1] for call in chain) for chain in chains)
        raise Unsupported(f"{name} is not an attention half followed by a feed-forward half (its chains: {kinds})")
    attention = [call for call in chains[0] if _linears(call.module)]
    if len(attention) != 1:
        raise Unsupported(f"{name} has {len(attention)} modules with matrices in its attention half, not one")
    at = chains[0].index(attention[0])
    paths = [[call.name.removeprefix(f"{name}.") for call in chain] for chain in chains]
    projections, norms = _projections(name, attention[0], inside)
    sites = {f"attention.{part}": f"{paths[0][at]}.{path}" for part, path in projections.items()}
    ffn, nonlinearity, before, gate = _feed_forward(name, chains[1], inside)
    given = attention[0].named.get("position_embeddings")
    table = None
    if isinstance(given, tuple):
        table = next((index for index, own in enumerate(tables) if _is_same(given[0], own)), None)
        if table is None:
            raise Unsupported(f"{name} reads rotary embeddings that no rotary module makes")
    return Layer(
        tuple(paths[0][:at]),
        tuple(paths[0][at + 1 :]),
        paths[0][at],
        frozenset(attention[0].named),
        projections,
        norms,
        tuple(paths[1]),
        sites | ffn,
        nonlinearity,
        before,
        gate,
        table,
        isinstance(whole.made, tuple),
    )


def _is_same(given: Any, made: Any) -> bool:
    """Whether a table is another one, perhaps handed to another device."""
    return given is made or (given.device != made.device and torch.equal(given.to(made.device), made))


def _projections(
    name: str, attention: Call, inside: Sequence[Call]
) -> tuple[dict[str, str], dict[str, tuple[str, bool]]]:
    """Paths in attention of its projections, and of norms of queries, keys and values."""
    below = [call for call in inside if call.name.startswith(f"{attention.name}.")]
    path = {id(call): call.name.removeprefix(f"{attention.name}.") for call in below}
    linears = [call for call in below if isinstance(call.module, nn.Linear)]
    first = [call for call in linears if call.read is attention.read]
    last = [call for call in linears if call.output is attention.output]
    if len(first) not in (1, 3) or len(last) != 1 or len(linears) != len(first) + 1:
        words = ", ".join(path[id(call)] for call in linears) or "none"
        raise Unsupported(
            f"{name}.{attention.name.rsplit('.', 1)[1]} has not one matrix for queries, keys and values, or one each, "
            f"and one for its output (its matrices: {words})"
        )
    is_fused = len(first) == 1
    projections = {part: path[id(call)] for part, call in zip(["qkv"] if is_fused else "qkv", first, strict=True)}
    if is_fused:
        (into,), (out,) = _linears(first[0].module), _linears(last[0].module)
        shared = into.out_features - out.in_features
        if shared <= 0 or shared % 2:
            raise Unsupported(f"{first[0].name} does not hold queries, keys and values")
    elif first[1].output.shape != first[2].output.shape:
        raise Unsupported(f"{attention.name} has keys and values of different widths")
    norms: dict[str, tuple[str, bool]] = {}
    for call in below:
        if call in linears or not isinstance(call.read, Tensor):
            continue
        part = path[id(call)][0]
        if part not in "qkv" or part in norms:
            raise Unsupported(f"{call.name} inside attention is neither a projection nor a norm of its heads")
        by_head = call.read.dim() == 4
        if not is_fused:
            by_head = by_head or call.read.shape[-1] != first["qkv".index(part)].output.shape[-1]
        norms[part] = path[id(call)], by_head
    return {**projections, "out": path[id(last[0])]}, norms


def _feed_forward(
    name: str, chain: Sequence[Call], inside: Sequence[Call]
) -> tuple[dict[str, str], str, str, tuple[int, int] | None]:
    """Sites of the feed-forward half, its nonlinearity, and the part that it reads, with the columns of a fused one."""
    names = {call.name for call in chain}
    own = [call for call in inside if any(call.name == part or call.name.startswith(f"{part}.") for part in names)]
    linears = [call for call in own if isinstance(call.module, nn.Linear)]
    acts = [call for call in own if _is_nonlinearity(call.module)]
    first = [call for call in linears if call.read is linears[0].read] if linears else []
    if len(acts) != 1 or len(linears) - len(first) != 1 or len(first) not in (1, 2):
        words = ", ".join(call.name.removeprefix(f"{name}.") for call in linears) or "none"
        raise Unsupported(
            f"{name} has no feed-forward network of one input matrix, perhaps a gate, a nonlinearity and one output "
            f"matrix (its matrices: {words}); routed experts cannot be edited"
        )
    read = acts[0].read
    gate = next((call for call in first if read is call.output), None)
    columns = _half(read, first[0].output) if len(first) == 1 else None
    if gate is None and columns is None:
        raise Unsupported(f"{name}: its nonlinearity reads neither one matrix's output nor a half of it")
    before = "ffn.gate" if len(first) == 2 else "ffn.in" if columns is None else "ffn.gate_in"
    ordered = sorted(first, key=lambda call: call is not gate)
    last = next(call for call in linears if call not in first)
    parts = dict(zip((before, "ffn.in"), ordered, strict=False)) | {"ffn.out": last}
    sites = {part: call.name.removeprefix(f"{name}.") for part, call in parts.items()}
    return sites, acts[0].name.removeprefix(f"{name}."), before, columns


def _half(part: Tensor | None, whole: Tensor) -> tuple[int, int] | None:
    """First column of a half of a matrix's output, and the one after the last; None if it is no half."""
    origin = whole if whole._base is None else whole._base
    if part is None or part._base is not origin or part.stride() != whole.stride():
        return None
    start, width = int(part.storage_offset() - whole.storage_offset()), int(part.shape[-1])
    is_half = part.shape[:-1] == whole.shape[:-1] and 2 * width == whole.shape[-1] and start in (0, width)
    return (start, start + width) if is_half else None


def _is_nonlinearity(module: nn.Module) -> bool:
    """Whether a module is a function without weights that has an effect."""
    plain = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
    return plain and not isinstance(module, nn.Dropout | nn.Identity)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def refusal(checkpoint: str, error: Unsupported) -> InputError:
    """The error of a model that cannot be run in halves, with its checkpoint."""
    return InputError(
        f"backbone.checkpoint {checkpoint!r} cannot be split into a frozen part and an edited one: {error}."
    )
