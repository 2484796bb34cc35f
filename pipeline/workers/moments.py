"""Second moments of unedited activations, by Ray Data: each worker reads a share of the pool.

Every share is a file of its own in `moments/<key>`, in the feature store or else in `out`; the key names the model, the
sites and the pool. Shares that exist are not measured again: by a run that goes on, by one that changes this run's
model, or by any run with the same feature store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from odedit import editors
from odedit.backbones import Backbone, fingerprint
from odedit.data.images import ImageError
from odedit.data.supervision import build_request
from odedit.errors import InputError
from odedit.inputs.batch import EditRequest
from odedit.inputs.prompts import find_template
from odedit.runtime.addresses import masked
from odedit.runtime.process import configure_process
from odedit.storage.location import Location, at
from odedit.ways.common.activations import Moments, measured
from pipeline.run_folder import staging
from pipeline.run_folder.workspace import Workspace
from pipeline.workers import engine
from pipeline.workers.committing import way_of
from pipeline.workers.model import SETTING, worker_backbone
from pipeline.workers.plan import Job, Plan
from pipeline.workers.preparer import write_note


def measure(job: Job, plan: Plan, earlier: Workspace | None = None) -> tuple[Location, ...]:
    """Files of the moments' shares, measured now unless they exist; empty for a way that reads none, or without a pool.

    Args:
        earlier: Folder of the run whose model is changed.

    Raises:
        InputError: The settings do not fit the model.
        GraphError: The workers failed.
    """
    if not way_of(job.config).measures or not job.workspace.pool.exists():
        return ()
    key = _key(job)
    store = job.config.pipeline.feature_store
    shared = [] if store is None else [at(store, SETTING) / "moments"]
    folders = [*shared, job.workspace.moments, *([] if earlier is None else [earlier.moments])]
    for folder in folders:
        if files := _complete(folder / key):
            return files
    folder = folders[0] / key
    folder.make_folder()
    shares = list(range(plan.num_actors))
    files = tuple(folder / f"share-{share}-of-{len(shares)}.safetensors" for share in shares)
    engine.run_shares(partial(measure_share, files=files), job, shares, plan)
    return files


def measure_share(job: Job, share: int, files: Sequence[Location]) -> None:
    """Writes the moments of every n-th record of the pool, of n files, unless the file exists."""
    if files[share].exists():
        return
    configure_process(job.num_threads, job.device)
    config = job.config
    backbone = worker_backbone(
        config.backbone, job.device, config.pipeline.feature_store, partial(write_note, job, "store")
    )
    sites = _sites(job, backbone)
    template = find_template(config.data.template)
    *_, moments = measured(backbone, template, sites, _requests(job, share, len(files)))
    assert isinstance(moments, Moments)
    moments.write(files[share], {"fingerprint": backbone.fingerprint, "sites": json.dumps(sites)})


def _sites(job: Job, backbone: Backbone) -> tuple[str, ...]:
    editor = editors.find(job.config.editor.name)(job.config.editor.settings)
    sites: tuple[str, ...] = way_of(job.config).measured_sites(backbone, editor)
    return sites


def _requests(job: Job, share: int, count: int) -> list[EditRequest]:
    """Every `count`-th record of the pool, from `share` on; those whose pictures cannot be read are left out."""
    pool = staging.read_pool(job.workspace, job.sources)
    assert pool is not None, "measured with a pool only"
    requests = []
    for record in pool.records[share::count]:
        with suppress(ImageError, InputError):
            requests.append(build_request(record, pool.reader, job.config.supervision, locality=False))
    return requests


def _key(job: Job) -> str:
    """Name of what the moments depend on: the weights, the sites' settings, the pool and its layout as text."""
    config = job.config
    assert config.commit is not None
    model = config.backbone
    digest = hashlib.sha256(job.workspace.pool.read_bytes())
    described = {
        "weights": fingerprint(model.family, model.checkpoint, dtype=model.dtype),
        "pictures": [masked(root) for root in _picture_roots(job) if root is not None],
        "names": (config.commit.name, config.editor.name),
        "editor": asdict(config.editor.settings),
        "layers": getattr(config.commit.settings, "layers", None),
        "template": config.data.template,
        "image_size": model.image_size,
        "supervision": asdict(config.supervision),
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _picture_roots(job: Job) -> tuple[str | None, ...]:
    """Folders that the pool's pictures may lie in; the pool's rows name them without."""
    sources = job.sources
    return (
        sources.pool, sources.pictures, sources.image_root, sources.rephrase_root, sources.pool_image_root,
        sources.pool_rephrase_root,
    )  # fmt: skip


def _complete(folder: Location) -> tuple[Location, ...]:
    """The files of a measurement whose shares are all there."""
    files = folder.glob("share-*-of-*.safetensors")
    by_count: dict[str, list[Location]] = {}
    for file in files:
        by_count.setdefault(file.name.rsplit("-", 1)[1].split(".")[0], []).append(file)
    for count, found in by_count.items():
        if len(found) == int(count):
            return tuple(folder / f"share-{share}-of-{count}.safetensors" for share in range(int(count)))
    return ()
