"""Objectives, one file each, found by file name.

The settings of all objectives share one section: a study or a search sets them once, and each of its runs names its
objective. The settings that the named objective does not have are checked and not read.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from odedit import plugins
from odedit.errors import unknown_name
from odedit.objectives import base
from odedit.objectives.common.calibration import CALIBRATION_STATES, calibrate

__all__ = ["CALIBRATION_STATES", "DEFAULT", "Objective", "ObjectiveConfig", "calibrate", "configs", "find", "names"]

DEFAULT = "odedit"
"""Objective of a run that names none."""


def names() -> tuple[str, ...]:
    """Objectives in this package."""
    return plugins.names(sys.modules[__name__])


def find(name: str) -> type[base.Objective]:
    """The class of an objective. Raises InputError for an unknown name."""
    found: type[base.Objective] = plugins.find(sys.modules[__name__], "objective", name, "OBJECTIVE")
    return found


def configs() -> tuple[type[base.BaseConfig], ...]:
    """The settings' classes of the objectives in this package, in the order of `names`."""
    return tuple(find(name).Config for name in names())


def ObjectiveConfig(name: str = DEFAULT, **settings: Any) -> Any:
    """The settings of an objective, from its name and what differs from the defaults.

    Args:
        name: File name in `odedit/objectives`, or a dotted module outside of it.
        settings: Settings of this objective. Those of other objectives are accepted, checked and not read.

    Returns:
        The objective's own `Config`.

    Raises:
        InputError: No such objective, or a setting that no objective has.
        ValueError: A value that its setting refuses.
    """
    own = find(name).Config
    parts, unknown = plugins.by_config(settings, own, configs())
    if unknown:
        known = [item.name for part in parts for item in dataclasses.fields(part)]
        raise unknown_name(f"setting of objective {name!r}", unknown[0], known)
    return {config_class: config_class(**part) for config_class, part in parts.items()}[own]


def Objective(config: base.BaseConfig, sigma2_0: float | None = None) -> base.Objective:
    """The objective with these settings.

    Args:
        config: What `ObjectiveConfig` returned.
        sigma2_0: Bandwidth as `calibrate` measured it; read where `config.needs_bandwidth`.

    Raises:
        ValueError: The objective needs a bandwidth and got none.
    """
    return find(config.name)(config, sigma2_0)
