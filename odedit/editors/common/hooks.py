"""Context managers that change a module's output and always let go of it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""From a module's input and output to the output that the rest of the model sees."""


@contextmanager
def rewritten(rewrites: Mapping[nn.Module, Rewrite]) -> Iterator[None]:
    """Inside, each module's output is passed through its function; undone on any exit.

    The weights are never touched, so the model after the block is bit for bit the model before it.
    """

    def hook_of(rewrite: Rewrite) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, args, output: rewrite(args[0], output)

    with ExitStack() as stack:
        for module, rewrite in rewrites.items():
            handle = module.register_forward_hook(hook_of(rewrite))
            stack.callback(handle.remove)
        yield
