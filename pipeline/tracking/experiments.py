"""Tags of an experiment: its kind, its description, and a saved view of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping

from odedit.evaluation.score import SCORE
from odedit.evaluation.statistics import MAIN, PARTS
from pipeline.tracking.names import METRICS

VIEW = "Best first"
VIEW_KEY = "odedit"
"""The view's address is that of the experiment's runs with `?viewStateShareKey=odedit`."""
MODEL_TRAINING = "workflowType=machine_learning"
"""Part of an address that opens MLflow's view for model training; it starts with that for language model agents."""
_SHOWN = [f"metrics.`{name}`" for name in (SCORE, *(METRICS + name for name in (*MAIN, *PARTS)))]
_STATE = {
    "orderByKey": _SHOWN[0],
    "orderByAsc": False,
    "selectedColumns": [*_SHOWN, "params.`editor.name`", "params.`objective.name`", "attributes.`Models`"],
}
_NOTE = (
    f"Runs of odedit. In the list of runs, *Views*, *{VIEW}* sorts them by `{SCORE}` and shows the main scores; the "
    "switch at the top left has to be on *Model training*."
)

TAGS: Mapping[str, str] = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": SCORE,
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    "mlflow.note.content": _NOTE,
    # Without it, MLflow shows no metric in its list of runs. The dates are obligatory, and shown nowhere.
    f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(
        {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(_STATE)}
    ),
}
