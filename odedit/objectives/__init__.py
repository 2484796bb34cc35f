"""Objectives, one file each, found by file name.

The settings of all objectives share one section of a configuration, so that a study or a search sets them once for all
its runs. Settings that the named objective does not have are checked and ignored.
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
"""Objective of a run without `objective.name`."""


def names() -> tuple[str, ...]:
    """Names of the objectives in this package."""
    return plugins.names(sys.modules[__name__])


def find(name: str) -> type[base.Objective]:
    """Class of an objective. Raises InputError for an unknown name."""
    objective: type[base.Objective] = plugins.find(sys.modules[__name__], "objective", name, "OBJECTIVE")
    return objective


def configs() -> tuple[type[base.BaseConfig], ...]:
    """Config classes of the objectives in this package, in the order of `names`."""
    return tuple(find(name).Config for name in names())


def ObjectiveConfig(name: str = DEFAULT, **settings: Any) -> Any:
    """Settings of an objective; those not given have their defaults.

    Args:
        name: File name in `odedit/objectives`, or a dotted module outside of it.
        settings: Settings of this objective. Settings of other objectives are checked and ignored.

    Returns:
        Instance of the objective's own `Config`.

    Raises:
        InputError: Unknown objective, or a setting that no objective has.
        ValueError: Value that its setting refuses.
    """
    own = find(name).Config
    parts, unknown = plugins.by_config(settings, own, configs())
    if unknown:
        known = [item.name for part in parts for item in dataclasses.fields(part)]
        raise unknown_name(f"setting of objective {name!r}", unknown[0], known)
    return {config_class: config_class(**part) for config_class, part in parts.items()}[own]


def Objective(config: base.BaseConfig, sigma2_0: float | None = None) -> base.Objective:
    """Objective with these settings.

    Args:
        config: Settings made by `ObjectiveConfig`.
        sigma2_0: Bandwidth measured by `calibrate`; read if `config.needs_bandwidth`.

    Raises:
        ValueError: The objective needs a bandwidth and `sigma2_0` is None.
    """
    return find(config.name)(config, sigma2_0)
