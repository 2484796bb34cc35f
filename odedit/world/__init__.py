"""The embedded world: small trained multimodal models, and a benchmark of facts that they know.

Real weights cannot be downloaded without a network, and random weights know no facts to edit. The embedded models are
trained instances of transformers' classes (`Blip2ForConditionalGeneration` and others), load through the same code as
`Salesforce/blip2-opt-2.7b`, and answer, say, who owns the pink four. The benchmark has the format of MMEdit.
"""

from __future__ import annotations

from pathlib import Path

from odedit.errors import InputError, unknown_name
from odedit.world.facts import WORLD

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BENCHMARK_VERSION = "c56f86e5"
"""Version of the benchmark's content, part of its folder's name. A test compares the content with it."""


def checkpoint_path(family: str = "blip2") -> Path:
    """Directory of a shipped checkpoint.

    Args:
        family: Model family: `blip2`, `minigpt4` or `llava`; `auto` has the first one's.

    Raises:
        InputError: No checkpoint of that family is shipped, or `ODEDIT_WORLD` is not 0.
    """
    if WORLD:
        raise InputError(
            f"backbone.checkpoint: got 'embedded', but the models that ship know world 0, and ODEDIT_WORLD is {WORLD}. "
            "Train one with: odedit world train FOLDER."
        )
    family = "blip2" if family == "auto" else family
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    if family not in shipped:
        raise unknown_name("embedded checkpoint", family, shipped)
    return CHECKPOINTS / family


def build(directory: Path | str, seed: int = 0, rephrases: int = 1) -> dict[str, Path]:
    """Writes the benchmark; see `odedit.world.benchmark.build`."""
    from odedit.world import benchmark

    return benchmark.build(Path(directory), seed, rephrases)
