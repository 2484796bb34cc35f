"""Temporary replacement of module outputs, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from odedit.backbones.common.placement import home_of

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""Maps a module's input and output to its new output."""


@contextmanager
def rewritten(rewrites: Mapping[nn.Module, Rewrite]) -> Iterator[None]:
    """Passes each module's output through its function inside the block; hooks are removed on any exit.

    The functions run where batches and edits are, if the module lies on another device. Weights are not changed: after
    the block the model is bit for bit what it was before.
    """

    def hook_of(rewrite: Rewrite) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            home = home_of(module)
            if home is None:
                return rewrite(args[0], output)
            return rewrite(args[0].to(home), output.to(home)).to(output.device)

        return hook

    with ExitStack() as stack:
        for module, rewrite in rewrites.items():
            handle = module.register_forward_hook(hook_of(rewrite))
            stack.callback(handle.remove)
        yield
