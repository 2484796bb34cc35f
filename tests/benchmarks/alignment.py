"""Cosines between the gradients of an objective's terms and those of the scored losses.

    python -m tests.benchmarks.alignment [--editors wise,ftl] [--steps 0,5] [--edits 72] [--checkpoint DIR] [--out DIR]

Edits of the embedded world's validation split take some steps on the editor's own loss. There, edit by edit, the
gradient of every term with respect to the edited parameters is compared with the gradient of the NLL of the scored
image rephrase (`m_gen`) and with that of the KL of the scored near question (`m_loc_near`). With a positive cosine, a
step that lowers the term lowers the scored loss. MEND is left out: its edit is one step of a hypernetwork.

Any penalty on the scale gradients g of the three risks (TV, one-sided, signed, Huber) has a gradient that is a weighted
sum of theirs, so their three cosines bound its effect. Further terms: the variance of the NLLs of edit and rephrases
(V-REx, arXiv 2003.00688, eq. 8), the variance of the gradients of these NLLs (after Fishr, arXiv 2109.02934, eq. 4),
MMD of displacements (edited minus unedited states) with an adaptive bandwidth, and KL on the edit's question without
its picture.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from odedit import Objective, ObjectiveConfig, Stopping, calibrate, edit, find_template, load_editor, world
from odedit.backbones import encode_requests, load_backbone
from odedit.data.images import ImageReader
from odedit.data.negatives import NegativePool
from odedit.data.pool import Pool
from odedit.data.records import read_records
from odedit.data.supervision import Supervision, build_request
from odedit.editors.base import Measuring, Trainable
from odedit.inputs.batch import (
    EDIT,
    LOCALITY_SLOTS,
    NEAR,
    REPHRASE,
    REPHRASE_SLOTS,
    SUPERVISION_SLOTS,
    EditBatch,
    EditParams,
    EditRequest,
    is_negative,
    stack_params,
    things_of,
)
from odedit.objectives.base import BaseConfig
from odedit.risks import mmd, risks
from tests.benchmarks.tables import show

TEMPLATE = find_template("mmedit")
EDITORS: dict[str, dict[str, Any]] = {
    "wise": {"site": "layers.2.ffn.in", "margin_out": 1.1, "margin_in": 4.5, "margin_gap": 2.2},
    "tpatcher": {},
    "unike": {"num_layers": 2, "learning_rate": 0.1, "encoder_width": 256, "code_width": 64},
    "ftl": {"learning_rate": 1e-3},
}
NEGATIVES = 12
JUDGES = ("m_gen", "m_loc_near")
Gradients = dict[str, Tensor]
"""Gradients by term, one row per edit."""


class Alignment:
    """Edits of the embedded world, and the gradients of terms at their parameters."""

    def __init__(self, num_edits: int, checkpoint: str = "embedded") -> None:
        self.backbone: Any = load_backbone("blip2", checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            paths = world.build(folder)
            reader = ImageReader(str(paths["images"]), str(paths["images_rephrase"]))
            pool = Pool.sample(str(paths["train"]), reader)
            self.of_pool, records = (
                [build_request(record, reader, Supervision(), pool) for record in read_records(str(paths[part]))]
                for part in ("train", "validation")
            )
        self.requests: list[EditRequest] = records[:num_edits]
        pictures = [request.edit.picture for request in self.of_pool if request.edit.picture is not None]
        things: dict[str, frozenset[str]] = {}
        for request in self.of_pool:
            if request.edit.picture is not None:
                named = things_of(request.meta.get("fact"), request.edit.entity)
                things[request.edit.picture.key] = named | things.get(request.edit.picture.key, frozenset())
        self.pool = NegativePool(self.backbone.image_features(pictures), NEGATIVES, things)
        self.sigma2_0 = calibrate(self.backbone, self.of_pool[:64], TEMPLATE)

    def editor(self, name: str) -> Any:
        editor: Any = load_editor(name, EDITORS[name])
        if isinstance(editor, Trainable):
            # Untrained encoders: the location of neurons matters little to their gradients.
            editor = editor.with_weights(editor.initial_weights(self.backbone, 0))
        if isinstance(editor, Measuring):
            editor = editor.measured(self.backbone, encode_requests(self.backbone, self.of_pool[:64], TEMPLATE)[0])
        return editor

    def cosines(self, editor: Any, steps: int) -> dict[str, dict[str, Tensor]]:
        """Cosine of each term with each judge, `(E,)`."""
        supervision, evaluation = encode_requests(self.backbone, self.requests, TEMPLATE, editor.sites, self.pool)
        native = Objective(ObjectiveConfig(name="native"))
        results = edit(self.backbone, editor, native, supervision, Stopping(steps, 1e-9))
        start = editor.init(self.backbone, supervision)
        final = stack_params([result.params for result in results])
        params = {name: final[name].requires_grad_(name not in editor.frozen) for name in start}
        terms = self._terms(editor, params, supervision) | self._ideas(editor, params, supervision)
        terms["KL, the question without a picture"] = self._kept(editor, params, evaluation, "blind_loc")
        judges = self._judged(editor, params, evaluation)
        return {
            name: {judge: torch.cosine_similarity(gradient, judges[judge], dim=1) for judge in JUDGES}
            for name, gradient in terms.items()
        }

    def _terms(self, editor: Any, params: EditParams, supervision: EditBatch) -> Gradients:
        odedit = ObjectiveConfig(sigma2_0=self.sigma2_0)
        contrast = ObjectiveConfig(name="contrast", negatives=NEGATIVES, negatives_at_once=NEGATIVES)
        kl = ObjectiveConfig(name="native_kl")
        near = list(filter(is_negative, supervision.slots))

        def gradient(slots: Iterable[str], config: BaseConfig, term: str) -> Tensor:
            return self._gradients(editor, params, supervision.select([EDIT, *slots]), config, [term])[0]

        of_odedit = {"MMD of the rephrases": "gen", "penalty": "penalty"}
        of_odedit |= {f"g of R_{name}": f"g_{name}" for name in ("rel", "loc", "gen")}
        whole = supervision.select(SUPERVISION_SLOTS)
        return {
            "NLL of the edit": gradient([], contrast, "rel"),
            "NLL of both rephrases in one": gradient([REPHRASE], contrast, "gen"),
            "KL, unrelated question": gradient([LOCALITY_SLOTS[0]], kl, "loc"),
            "KL, the record's one near picture": gradient([NEAR], kl, "loc"),
            f"KL, {NEGATIVES} hard negatives": gradient(near, contrast, "loc"),
        } | dict(zip(of_odedit, self._gradients(editor, params, whole, odedit, of_odedit.values()), strict=True))

    def _states_and_nll(self, editor: Any, params: EditParams, batch: EditBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Final states at the answers, edited and not, and the NLL of every sequence `(E, K)`, unsmoothed."""
        prefix = self.backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise)
        with torch.no_grad():
            base_EKTD = self.backbone.suffix(prefix, batch.predict_EKT)
        # Only the math backend of attention supports second derivatives.
        with sdpa_kernel(SDPBackend.MATH), editor.applied(self.backbone, params, batch):
            states_EKTD = self.backbone.suffix(prefix, batch.predict_EKT)
        log_p = self.backbone.head(states_EKTD).log_softmax(dim=-1)
        nll_EKT = -log_p.gather(-1, batch.target_EKT.unsqueeze(-1)).squeeze(-1)
        return states_EKTD, base_EKTD, risks.masked_mean(nll_EKT, batch.target_mask_EKT)

    def _ideas(self, editor: Any, params: EditParams, supervision: EditBatch) -> Gradients:
        """Gradients of terms on edit and rephrases that are part of no objective."""
        batch = supervision.select([EDIT, *REPHRASE_SLOTS])
        states_EKTD, base_EKTD, nll_EK = self._states_and_nll(editor, params, batch)
        moved_EKTD, mask = states_EKTD - base_EKTD, batch.target_mask_EKT
        distances = []
        for k in (1, 2):
            apart_E = (moved_EKTD[:, 0, 0] - moved_EKTD[:, k, 0]).square().sum(-1).detach()
            sigma2_E = torch.maximum(apart_E, apart_E.mean() * 1e-3).clamp_min(1e-12)  # 0 before the first step
            scaled = moved_EKTD / sigma2_E.sqrt()[:, None, None, None]
            distances.append(mmd.mmd2_rbf(scaled[:, 0], scaled[:, k], mask[:, 0], mask[:, k], torch.ones(1)).value)
        several = torch.stack([_flat(nll_E, params, create_graph=True) for nll_E in nll_EK.unbind(1)])
        return {
            "variance of their NLLs (V-REx)": _flat(nll_EK.var(dim=1), params, retain_graph=True),
            "MMD of displacements": _flat(torch.stack(distances).mean(0), params, retain_graph=True),
            "variance of their gradients (Fishr)": _flat(several.var(dim=0).sum(dim=1), params),
        }

    def _gradients(
        self, editor: Any, params: EditParams, batch: EditBatch, config: BaseConfig, names: Iterable[str]
    ) -> list[Tensor]:
        """Gradients by name: a risk, `penalty`, or a risk's scale gradient `g_<risk>`."""
        objective = Objective(config)
        prefix = self.backbone.prefix(batch, *editor.sites, positionwise=editor.positionwise)
        with torch.no_grad():
            base_EKTD = self.backbone.suffix(prefix, batch.predict_EKT)
        unedited = objective.unedited(self.backbone, batch, base_EKTD)
        with editor.applied(self.backbone, params, batch) as trace:
            hidden = self.backbone.suffix(prefix, objective.read(batch))
        terms = objective(self.backbone, editor, params, trace, batch, hidden, unedited)
        named = terms.risks | {"penalty": terms.penalty}
        named |= {f"g_{name}": value for name, value in terms.scale_gradients.items()}
        return [_flat(named[name], params, retain_graph=True) for name in names]

    def _judged(self, editor: Any, params: EditParams, evaluation: EditBatch) -> Gradients:
        rephrase = replace(evaluation.select(["m_gen"]), slots=(EDIT,))
        _, _, nll_EK = self._states_and_nll(editor, params, rephrase)
        return {
            "m_gen": _flat(nll_EK[:, 0], params),
            "m_loc_near": self._kept(editor, params, evaluation, "m_loc_near"),
        }

    def _kept(self, editor: Any, params: EditParams, evaluation: EditBatch, probe: str) -> Tensor:
        """Gradient of the KL at a scored question."""
        batch = replace(evaluation.select(["rel", probe]), slots=(EDIT, NEAR))
        return self._gradients(editor, params, batch, ObjectiveConfig(name="native_kl"), ["loc"])[0]


def _flat(risk_E: Tensor, params: EditParams, **options: bool) -> Tensor:
    """Gradient of every edit's risk with respect to its own parameters, one row per edit."""
    moved = [value for value in params.values() if value.requires_grad]
    parts = torch.autograd.grad(risk_E.sum(), moved, allow_unused=True, **options)
    rows = [
        (torch.zeros_like(value) if part is None else part).flatten(1) for value, part in zip(moved, parts, strict=True)
    ]
    return torch.cat(rows, dim=1)


def _mean(values_E: Tensor) -> str:
    """Mean and half of the 95% interval, `.12 ±.03`, over edits whose gradients are both non-zero."""
    known = values_E[values_E != 0]
    if len(known) < 2:
        return "-"
    return f"{float(known.mean()):+.2f} ±{1.96 * float(known.std()) / math.sqrt(len(known)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editors", default=",".join(EDITORS))
    parser.add_argument("--steps", default="0,5,10,20")
    parser.add_argument("--edits", type=int, default=72)
    parser.add_argument("--checkpoint", default="embedded", help="a BLIP-2 of another world")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    chosen = parser.parse_args()
    alignment = Alignment(chosen.edits, chosen.checkpoint)
    steps = [int(step) for step in chosen.steps.split(",")]
    for name in chosen.editors.split(","):
        editor = alignment.editor(name)
        cosines = {step: alignment.cosines(editor, step) for step in steps}
        for judge in JUDGES:
            table = [[term, *(_mean(cosines[step][term][judge]) for step in steps)] for term in cosines[steps[0]]]
            title = f"{name}: cosine of a term's gradient with that of {judge}, by step"
            show(title, ["term", *map(str, steps)], table, chosen.out, f"alignment_{name}_{judge}")


if __name__ == "__main__":
    main()
