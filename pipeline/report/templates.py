"""The templates of pages: texts are escaped, and a missing value is an error."""

from __future__ import annotations

from typing import Any

from pipeline.report.formatting import change, interval, number, p_value


def environment() -> Any:
    """A jinja2 environment of `pipeline/templates`, with the filters of figures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"interval": interval, "change": change, "p_value": p_value, "number": number}
    return made
