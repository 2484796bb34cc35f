"""Committed models in MLflow: a logged model from code with signature and example, its scores, and its registration.

The weights are stored once more than in `out`: they are uploaded from its folder, without a copy on the way. Nothing
is pickled.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from odedit.errors import in_words
from odedit.inputs.batch import Probe
from odedit.inputs.plain import PlainUse
from odedit.inputs.prompts import find_template
from odedit.runtime.addresses import masked, shareable
from odedit.storage.location import Location
from odedit.ways.common.files import CommittedInfo, read_committed_info
from pipeline.config.run import RunConfig
from pipeline.run_folder.committed import MODEL, plain_use, read_edits
from pipeline.run_folder.rows import digest
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking import names
from pipeline.tracking.client import LONGEST_TAG, NOTE_TAG, Table, Tracker, TrackingError
from pipeline.tracking.locks import patiently
from pipeline.variables import environment

MODEL_NAME = "model"
"""Name of the logged model: `runs:/RUN/model`."""
TABLE = "committed_edits.json"
_ARTIFACTS = "artifacts/model"
_MAX_TOKENS = 16
_REQUIRED = ("torch", "transformers", "safetensors", "pillow")
_NEED = {True: _REQUIRED, False: ("odedit", *_REQUIRED)}
_TABLE_ROWS = 10_000
_COLUMNS = ("edit_id", "fact", "prompt", "image", "answer_before", "target", "answer_after", "holds", "status")


def is_committed(workspace: Workspace) -> bool:
    """Whether the run has written a model."""
    return (workspace.committed).exists() and (workspace.model).is_folder()


def log_committed(
    tracker: Tracker, config: RunConfig, workspace: Workspace, summary: Mapping[str, Any], description: str = ""
) -> str:
    """Logs the model of a run, and registers it if `tracking.register` names it; returns the logged model's id.

    Args:
        tracker: The run, which holds the results already.
        summary: Content of `summary.json`.
        description: Markdown, shown with the model and its version.

    Raises:
        TrackingError: The store refused; calling again is safe, and continues a model that is logged already.
    """
    try:
        info = read_committed_info(workspace.committed)
        facts = _facts(config, workspace, info, summary)
        tracker.log_tables({TABLE: _table(workspace)})
        model_id = log_model(tracker, workspace.model, info, MODEL_NAME, facts, names.of_scores(summary))
        if description:
            patiently(tracker.store.client.set_logged_model_tags, model_id, {NOTE_TAG: description[:LONGEST_TAG]})
        if config.tracking.register is not None:
            register(tracker, model_id, config.tracking.register, config.tracking.alias, facts, description)
        return model_id
    except Exception as error:
        raise TrackingError(
            f"MLflow at {masked(tracker.store.uri)} could not be written to ({in_words(error)}). The model is complete "
            f"in {workspace.model}; the same command, or `odedit mlflow sync {workspace.out}`, logs it once it "
            "can."
        ) from error


def log_model(
    run: Tracker,
    folder: Location,
    info: CommittedInfo,
    name: str,
    facts: Mapping[str, str],
    scores: Mapping[str, float],
) -> str:
    """Logs the folder of a model as a pyfunc from code, unless the run has it already; returns its id.

    Args:
        name: Name in `runs:/RUN/NAME`.
        facts: Parameters of the logged model.
        scores: Metrics of the run that are linked to the model.
    """
    client = run.store.client
    experiment = str(run.store.run(run.run_id).info.experiment_id)
    model_id = _ready(run, experiment, name)
    if model_id is None:
        model = patiently(
            client.create_logged_model, experiment, name=name, source_run_id=run.run_id, params=dict(facts),
            model_type="image-text-to-text",
        )  # fmt: skip
        model_id = str(model.model_id)
        _upload(client, model_id, run.run_id, folder, info)
        _link(run, model_id)
        patiently(client.finalize_logged_model, model_id, "READY")
    _log_scores(run, model_id, scores)
    return model_id


def register(
    run: Tracker, model_id: str, name: str, alias: str, facts: Mapping[str, str], description: str = ""
) -> str:
    """Registers a logged model as a new version, unless it is one already, and sets the alias; returns the version."""
    client = run.store.client
    try:
        patiently(client.create_registered_model, name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    known = [each for each in client.search_model_versions(f"name = '{name}'") if each.source == source]
    version = known[0] if known else None
    if version is None:
        # A registry in a database looks the model up in the store of the environment, whatever the client's is.
        with environment({"MLFLOW_TRACKING_URI": run.store.uri}):
            version = patiently(
                client.create_model_version, name, source, run_id=run.run_id, tags=dict(facts), model_id=model_id,
                description=description[:LONGEST_TAG],
            )  # fmt: skip
    patiently(client.set_registered_model_alias, name, alias, version.version)
    return str(version.version)


def _facts(config: RunConfig, workspace: Workspace, info: CommittedInfo, summary: Mapping[str, Any]) -> dict[str, str]:
    """What a logged model and its versions tell of themselves."""
    facts = {
        "way": info.way,
        "editor": info.editor,
        "objective": config.objective.name,
        "backbone": f"{info.family}:{shareable(info.checkpoint)}",
        "edits": len(info.edit_ids),
        "fingerprint": info.fingerprint,
        "records": digest(workspace.records),
        "code": summary.get("code", ""),
    }
    return {f"odedit.{name}": str(value) for name, value in facts.items()}


def _ready(run: Tracker, experiment: str, name: str) -> str | None:
    """Id of the run's logged model of that name; unfinished ones are deleted, so that the name stays unique."""
    client = run.store.client
    found = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run.run_id}'")
    ready = [model for model in found if str(model.status) == "READY"]
    for model in found:
        if model not in ready:
            patiently(client.delete_logged_model, model.model_id)
    return str(ready[0].model_id) if ready else None


def _upload(client: Any, model_id: str, run_id: str, folder: Location, info: CommittedInfo) -> None:
    """Writes the model's description and code, and then its files, to the store."""
    with tempfile.TemporaryDirectory(prefix="odedit-model-") as temporary, _on_this_machine(folder) as local:
        described = Path(temporary) / "model"
        _describe(described, model_id, run_id, local, info)
        patiently(client.log_model_artifacts, model_id, str(described))
        patiently(client.log_model_artifacts, model_id, str(local), _ARTIFACTS)


def _describe(path: Path, model_id: str, run_id: str, folder: Path, info: CommittedInfo) -> None:
    """Writes MLflow's description of the model, its code and its requirements to a new folder, without the weights."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    plain = (folder / "config.json").is_file()
    code = Path(__file__).with_name("served_plain.py" if plain else "served_routed.py")
    asked = Schema([ColSpec("string", "picture", required=False), ColSpec("string", "question")])
    # A project's lock file in the current folder is not the model's. The warnings ask for hints beside the signature.
    with environment({"MLFLOW_UV_AUTO_DETECT": "false"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyfunc.save_model(
            path=str(path),
            python_model=str(code),
            signature=ModelSignature(asked, Schema([ColSpec("string", "answer")])),
            input_example=pandas.DataFrame([{"picture": _example(), "question": "what is it?"}]),
            pip_requirements=_requirements(_NEED[plain]),
            model_config=_settings(info) if plain else None,
            mlflow_model=Model(run_id=run_id, model_id=model_id, artifact_path=MODEL_NAME),
        )
    # Named here, because `save_model` would copy the weights.
    described = Model.load(str(path / "MLmodel"))
    described.flavors[pyfunc.FLAVOR_NAME]["artifacts"] = {"model": {"path": _ARTIFACTS, "uri": MODEL}}
    described.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    described.save(str(path / "MLmodel"))


def _settings(info: CommittedInfo) -> dict[str, Any]:
    """The prompts' layout and the type of the weights, for the code of a plain model."""
    use = plain_use(info) or PlainUse()
    question = find_template(info.template).render(Probe("{question}", ""))[0]
    layouts = {
        name: text.replace("{text}", question)
        for name, text in (("with_picture", use.with_picture), ("without_picture", use.without_picture))
    }
    return asdict(use) | layouts | {"dtype": info.dtype, "max_tokens": _MAX_TOKENS}


def _example() -> str:
    """A grey picture as PNG in base64."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _requirements(names: tuple[str, ...]) -> list[str]:
    """Installed versions, without the label of a local build such as `+cpu`, which package indexes do not have."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]


@contextmanager
def _on_this_machine(folder: Location) -> Iterator[Path]:
    """A local folder with the files of a model; those at an address are downloaded for the block."""
    if folder.is_local:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="odedit-model-") as temporary:
        for file in folder.glob("*"):
            if file.is_file():
                (Path(temporary) / file.name).write_bytes(file.read_bytes())
        yield Path(temporary)


def _link(run: Tracker, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    patiently(run.store.client.log_outputs, run.run_id, [LoggedModelOutput(model_id, step=0)])


def _log_scores(run: Tracker, model_id: str, scores: Mapping[str, float]) -> None:
    """Logs metrics of the run that MLflow shows as the model's own."""
    from mlflow.entities import Metric

    now, inputs = int(time.time() * 1000), run.store.run(run.run_id).inputs.dataset_inputs
    about = {"dataset_name": inputs[0].dataset.name, "dataset_digest": inputs[0].dataset.digest} if inputs else {}
    metrics = [
        Metric(name, value, now, 0, model_id=model_id, run_id=run.run_id, **about) for name, value in scores.items()
    ]
    patiently(run.store.client.log_batch, run.run_id, metrics=metrics)


def _table(workspace: Workspace) -> Table:
    listed = read_edits(workspace.model)[:_TABLE_ROWS]
    return Table(_COLUMNS, [[entry[name] for name in _COLUMNS] for entry in listed])
