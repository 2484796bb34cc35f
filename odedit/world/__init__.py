"""The embedded world: small real multimodal models and a benchmark of facts that they know.

Weights of BLIP-2 and its relatives cannot be fetched without a network, and random weights know nothing that could be
edited. These are a real `Blip2ForConditionalGeneration` and its relatives that have learned who owns the pink four;
they load through the code that loads `Salesforce/blip2-opt-2.7b` and its kin, and the benchmark has MMEdit's schema.
"""

from __future__ import annotations

from pathlib import Path

from odedit.errors import InputError, unknown_name
from odedit.world.facts import WORLD

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def checkpoint_path(family: str = "blip2") -> Path:
    """Directory of the checkpoint that ships with the package.

    Args:
        family: Model family: `blip2`, `minigpt4` or `llava`.

    Raises:
        InputError: No checkpoint of that family ships, or none of this world.
    """
    if WORLD:
        raise InputError(
            f"backbone.checkpoint: got 'embedded', but the models that ship know world 0, and ODEDIT_WORLD is {WORLD}. "
            "Train one with: odedit world train FOLDER."
        )
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    if family not in shipped:
        raise unknown_name("embedded checkpoint", family, shipped)
    return CHECKPOINTS / family


def build(directory: Path | str, seed: int = 0) -> dict[str, Path]:
    """Writes the benchmark; see `odedit.world.benchmark.build`, which this calls."""
    from odedit.world import benchmark

    return benchmark.build(Path(directory), seed)
