"""Implementation of the commands. Results go to standard output, progress and notes to standard error."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from odedit.editing.files import EditInfo
from odedit.errors import InputError, NothingUsable, counted
from odedit.evaluation.columns import METRICS
from odedit.runtime.addresses import masked
from odedit.storage.location import Location, locate
from pipeline.config import checkpoints, presets
from pipeline.config.run import EMBEDDED, Dtype, RunConfig, apply_override, from_dict, load, load_commit, read_yaml
from pipeline.console import say
from pipeline.driver.preflight import Ready, preview
from pipeline.driver.run import Outcome, run
from pipeline.report import page
from pipeline.report.cloud import HiddenStates
from pipeline.run_folder import rows
from pipeline.run_folder.reasons import lines
from pipeline.run_folder.staging import OWN_PICTURES, PICTURES
from pipeline.run_folder.summary import finished_run
from pipeline.run_folder.workspace import Workspace
from pipeline.tracking.connection import open_command, store_uri
from pipeline.tracking.fetch import fetch_edit
from pipeline.workers.profile import Profile


def edit(path: Path | None, overrides: Sequence[str], *, dry_run: bool, fresh: bool, profile: bool = False) -> None:
    """`odedit edit`."""
    check_given(path, overrides)
    config = replace(load(path, overrides), commit=None)
    errors = Console(stderr=True)
    if dry_run:
        show_plan(preview(config, fresh=fresh), config)
        return
    measured = Profile() if profile else None
    outcome = run(config, errors, fresh=fresh, profile=measured)
    show_outcome(outcome)
    if measured is not None and measured.records:
        Console().print(measured.table())
    check_any(outcome)


def check_any(outcome: Outcome) -> None:
    """Raises NothingUsable if no record was edited or scored."""
    if not outcome.summary["n"]:
        counts = ", ".join(f"{outcome.summary[status]} {status}" for status in ("failed", "skipped"))
        raise NothingUsable(
            f"No record was edited ({counts}):\n{lines(outcome.summary['reasons'])}\n"
            f"The reason of every record is in {outcome.workspace.results}."
        )


def commit(
    path: Path | None,
    overrides: Sequence[str],
    *,
    edits_from: str | None,
    change: str | None,
    remove: Sequence[str],
    add: str | None,
    dry_run: bool,
    fresh: bool,
) -> None:
    """`odedit commit`."""
    from pipeline.driver import commit as driver

    either = " for a new model, or --change RUN for a changed one"
    if change is None:
        check_given(path, overrides, otherwise=either)
        if remove or add is not None:
            raise InputError("--remove and --add change a model that exists; name its run with --change RUN.")
    elif path is not None:
        raise InputError(f"Give --config FILE or data.path=FILE{either}.")
    elif any(text.startswith("preset=") for text in overrides):
        raise InputError("--preset is for a new model; a changed one has the settings of its earlier run.")
    config = load_commit(path, overrides) if change is None else driver.changed(change, remove, add, overrides)
    if dry_run:
        config = driver.with_edits_of(config, edits_from)
        driver.check(config, edits_from)
        conflicts, identity = driver.Conflicts(config, edits_from), driver.further_inputs(config, edits_from)
        show_plan(preview(config, fresh=fresh, check_staged=conflicts, identity=identity), config)
        return
    outcome = driver.commit(config, Console(stderr=True), edits_from=edits_from, fresh=fresh)
    summary = outcome.summary
    title = f"one model ({config.commit_way}): {summary['editor']}, {summary['objective']} objective"
    show_outcome(outcome, title, "results/, model/")
    show_retention(outcome)
    say(Console(), f"Model:   {outcome.workspace.model}")
    tracking = config.tracking
    if outcome.tracking_uri and tracking.register is not None:
        say(Console(), f"Registry: this model was registered as models:/{tracking.register}@{tracking.alias}.")
    folder = json.dumps(str(outcome.workspace.model))
    asking = f'import odedit; print(odedit.load_edited({folder}).answer("PICTURE", "QUESTION"))'
    say(Console(), f"Ask it:  python -c {shlex.quote(asking)}")
    check_any(outcome)


def check_given(
    path: Path | None, overrides: Sequence[str], *, setting: str = "data.path", otherwise: str = ""
) -> None:
    """Raises InputError unless a configuration file, or the setting on the command line, names the records."""
    if path is None and not any(text.startswith(f"{setting}=") for text in overrides):
        raise InputError(f"Give --config FILE or {setting}=FILE{otherwise}.")


def list_presets() -> None:
    """`odedit presets`."""
    table = Table("preset", "backbone.checkpoint", "family", "layers", "settings of editors")
    for name in presets.names():
        preset = presets.find(name)
        checkpoint = preset.backbone.get("checkpoint", "(a folder of yours)")
        origin = f"{preset.origin}: {preset.source}"
        table.add_row(name, checkpoint, preset.backbone["family"], str(preset.layers), origin)
    Console().print(table)


def train(editor: str, path: Path | None, overrides: Sequence[str], out: str | None, *, fresh: bool) -> Location:
    """`odedit train`."""
    from pipeline.training.train import run as run_training

    errors = Console(stderr=True)
    check_given(path, overrides, setting="training.path")
    values = {} if path is None else read_yaml(path)
    section = values.get("editor")
    named = section.get("name") if isinstance(section, dict) else None
    if named not in (None, editor):
        # A run's configuration may name another editor; its model and records still apply.
        say(errors, f"{path}: its editor is {named!r}; {editor!r} takes its defaults and the settings given here.")
        values["editor"] = {}
    for text in (f"editor.name={editor}", *overrides):
        apply_override(values, text)
    config = from_dict(values)
    given = values.get("training") or {}
    missing = [name for name in ("path", "validation") if name not in given]
    if missing and config.backbone.checkpoint != EMBEDDED:
        # A model that `odedit world train` made trains with these defaults; any other one would learn digits.
        raise InputError(
            f"training.{missing[0]}: missing, and its default, {getattr(config.training, missing[0])}, is of the "
            f"embedded world, backbone.checkpoint is {config.backbone.checkpoint!r}. Give training.path=FILE and "
            "training.validation=FILE, or both defaults if the model knows that world."
        )
    return run_training(config, out, errors, fresh=fresh)


def show_plan(ready: Ready, config: RunConfig, *, edits: bool = True) -> None:
    """Prints the resolved configuration and the plan of a checked run.

    Args:
        config: Configuration as the user gave it.
        edits: Whether the run makes edits, whose memory is told.
    """
    from pipeline.workers import ray_session
    from pipeline.workers.plan import local_plan

    num_groups, num_usable, out = len(ready.staged.usable), ready.staged.num_usable, ready.workspace.out
    groups = f"{counted(num_groups, 'group')} of {ready.config.pipeline.batch_size}"
    records = f"{counted(num_usable, 'usable record')} in {groups}, {ready.staged.problems} skipped"
    if not num_usable:
        raise NothingUsable(
            f"None of {counted(ready.staged.problems, 'record')} can be used:\n{lines(ready.staged.reasons)}\n"
            "`odedit data check --all` names every one."
        )
    for note in ready.notes:
        say(Console(stderr=True), f"Note: {note}")
    print(masked(replace(ready.config, out=config.out).to_yaml()))
    print(f"# input: {records}")
    for line in supervision_lines(ready):
        print(f"# {line}")
    address = ray_session.address_of(config.pipeline)
    if address is None:
        if config.commit is not None:
            from pipeline.driver.commit import TRAINED_GROUPS_PER_WORKER, groups_of_model

            count = groups_of_model(ready)
            plan = local_plan(config.pipeline, config.backbone, count, TRAINED_GROUPS_PER_WORKER)
            print(f"# plan of the model: {plan}")
        name = "plan" if config.commit is None else "plan of edits and scores"
        print(f"# {name}: {local_plan(config.pipeline, config.backbone, num_groups)}")
    else:
        print(f"# plan: on the cluster at {address}")
    if edits and (memory := checkpoints.memory(ready.config)) is not None:
        print(f"# memory of a worker, about {memory} ({config.backbone.dtype})")
    done = len(rows.finished_groups(ready.workspace))
    print(f"# results: {out}" + (f" (finished groups there: {done})" if done else ""))
    if config.tracking.enabled:
        print(f"# MLflow: {masked(store_uri(config.tracking, out))}")


_ORIGINS = {"given": "given", "drawn": "from data.pool", "made": "made", "missing": "missing"}


def supervision_lines(ready: Ready) -> Iterator[str]:
    """Where the supervision of a run's records is from, a line for each kind of it."""
    if not ready.origins:
        yield f"supervision: none, {ready.config.objective.name} with {ready.config.editor.name} reads the edit alone"
    for name, counts in ready.origins.items():
        parts = [f"{counts[origin]} {words}" for origin, words in _ORIGINS.items() if counts[origin]]
        yield f"supervision: {name}: {', '.join(parts)}"


def show_outcome(outcome: Outcome, title: str | None = None, files: str = "results/, edits/") -> None:
    """Prints a run's summary and the locations of its files.

    Args:
        title: Title of the table; None: the method.
        files: Files and folders of the results beside report and summary.
    """
    out = Console()
    title = title or f"{outcome.summary['editor']}, {outcome.summary['objective']} objective"
    out.print(page.summary_table(outcome.summary, title))
    for line in _of_other_questions(outcome.summary):
        say(out, line)
    if outcome.summary["n"] and outcome.summary["reasons"]:
        say(out, f"Not edited:\n{lines(outcome.summary['reasons'])}")
    say(out, f"Report:  {outcome.workspace.report}")
    say(
        out,
        f"Results: {outcome.workspace.out} (summary.json, {files}); odedit show {outcome.workspace.out} lists edits",
    )
    if outcome.tracking_uri:
        say(out, f"MLflow:  {open_command(outcome.tracking_uri)}")


_RETAINED = (*METRICS, "m_loc_near")
"""Scores of earlier edits that fit into a terminal."""


def show_retention(outcome: Outcome) -> None:
    """Prints what was left of earlier edits, of a model that was made one record after another."""
    from odedit.ways.common.files import read_committed_info
    from pipeline.run_folder.retention import checks

    found = checks(read_committed_info(outcome.workspace.committed))
    if not found:
        return
    names = [name for name in found[-1].scores if name in _RETAINED]
    table = Table("edits", *names, title="earlier edits, scored again (retention.parquet has every edit)")
    for check in found:
        table.add_row(str(check.edits), *(f"{check.scores[name]:.3f}" for name in names))
    Console().print(table)


_KEPT_OF = {
    PICTURES: "general questions about the pictures of data.pictures",
    OWN_PICTURES: "general questions about the records' own pictures",
}
"""Questions of a pool that is made of pictures, by its source."""


def _of_other_questions(summary: Mapping[str, Any]) -> list[str]:
    """Lines about the questions that are no record's, of a model with all records."""
    about = _KEPT_OF.get(summary.get("kept_of", ""), "the pool's questions")
    lines = []
    for name, what in zip(rows.KEPT, (about, "questions without a picture"), strict=True):
        if name in summary:
            e = summary[name]
            interval = f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
            lines.append(f"{name}: {interval} of {e['n']} answers to {what} are as before.")
    if "text" in summary:
        e = summary["text"]
        before, after = e["perplexity_before"], e["perplexity_after"]
        lines.append(f"Perplexity of the text: {before:.4g} before, {after:.4g} after ({e['tokens']:,} tokens).")
    return lines


def study(name: str, config: Path | None, overrides: Sequence[str], out: str | None, *, fresh: bool) -> None:
    """`odedit study`: runs a study and prints its tables; `list` prints the studies that ship."""
    from pipeline.study import spec
    from pipeline.study.run import describe
    from pipeline.study.run import run as run_study

    console = Console()
    if name == "list":
        for known in spec.names():
            say(console, f"{known:10} {spec.load(known, None).title}")
        return
    settings = spec.load(name, config, overrides)
    folder = out if out is not None else f"studies/{name}"
    options = [*(["--config", str(config)] if config else []), *overrides, *(["--out", out] if out else [])]
    command = masked(shlex.join(["odedit", "study", name, *options]))
    finished = run_study(name, settings, folder, Console(stderr=True), fresh=fresh, command=command)
    print(finished.markdown)
    for line in describe(finished, locate(folder, "--out")):
        say(Console(stderr=True), line)


def compare(names: Sequence[str], uri: str | None, html: str | None) -> None:
    """`odedit compare`."""
    from pipeline.report import compare as comparing

    with comparing.sides(names, uri) as sides:
        comparison = comparing.compare(sides)
        print(comparing.to_markdown(comparison))
        if html is not None:
            target = locate(html, "--html")
            comparing.write_html(comparison, target)
            say(Console(stderr=True), f"Page: {target.text}")


def report(folder: str, baseline: str | None, *, with_states: bool = False) -> None:
    """`odedit report`: writes the pages of a run, of all runs directly below a folder, or of a study or search.

    Args:
        with_states: Whether the model is loaded and the hidden states of the worst edits are drawn.
    """
    from pipeline.report.compare import runs_in
    from pipeline.report.run_page import Baseline, write_run_report

    other = None if baseline is None else finished_run(baseline, "--baseline")[0]
    compared = None if other is None else Baseline.of(other.out.name, other)
    location = locate(folder, "RUN")
    below = [] if Workspace(location).run.exists() else [out for out in location.glob() if Workspace(out).run.exists()]
    for out in below or [out for _, out in runs_in(location)]:
        workspace, summary = finished_run(out, "RUN")
        is_baseline = other is not None and str(other.out) == str(workspace.out)
        states = _states_of_the_worst(workspace) if with_states else None
        print(write_run_report(workspace, summary, baseline=None if is_baseline else compared, states=states))


def _states_of_the_worst(workspace: Workspace) -> HiddenStates:
    import torch

    from pipeline.edits.states import hidden_states
    from pipeline.report.cloud import SHOWN_EDITS
    from pipeline.run_folder.outcomes import RANKED, worst_ids

    worst = worst_ids(rows.read_rows(rows.parts(workspace), RANKED, (rows.EDITED,)), SHOWN_EDITS)
    return hidden_states(workspace, worst, "cuda" if torch.cuda.is_available() else "cpu")


def show(folder: str, edit_id: str | None) -> None:
    """`odedit show`: the worst edits of a run, or one edit."""
    from pipeline.edits import show as showing
    from pipeline.run_folder.outcomes import find_outcome, picture_reader

    workspace, _ = finished_run(folder, "RUN")
    if edit_id is None:
        Console().print(showing.worst(workspace))
    else:
        showing.show(find_outcome(workspace, edit_id), picture_reader(workspace), Console())


def apply(
    edits: Sequence[str],
    prompt: str,
    image: Path | None,
    *,
    caption: bool,
    checkpoint: str | None,
    device: str,
    dtype: str,
    max_tokens: int,
) -> None:
    """`odedit apply`."""
    from odedit.data.images import ImageError
    from odedit.editing.files import load_edits
    from odedit.inputs.batch import Probe
    from odedit.inputs.markers import without_leading_marker
    from pipeline.edits import files, held
    from pipeline.edits.answers import before_and_after, load_backbone_of, read_picture

    _check_device(device)
    if dtype not in get_args(Dtype):
        raise InputError(f"--dtype: got {dtype!r}, expected one of {', '.join(get_args(Dtype))}.")
    try:
        picture = None if image is None else read_picture(image)
    except ImageError as error:
        raise InputError(f"--image: {error}") from error
    given = files.find(edits)
    backbone = load_backbone_of(given.infos[0], checkpoint, dtype=dtype, device=device)
    editor, params, infos = load_edits(given.files, backbone, device)
    question = Probe(prompt if picture is None else without_leading_marker(prompt), "", picture, caption)
    before, after = before_and_after(backbone, editor, params, infos[0].template, question, max_tokens)
    print(f"before: {before}\nafter:  {after}")
    _say_all([*given.notes, *_template_notes(infos)])
    if len(infos) > 1:  # a single edit was scored when it was made
        result = held.ask(backbone, editor.sites, infos, lambda batch: editor.together(backbone, params, batch))
        _say_all(result.sentences())


def _template_notes(infos: Sequence[EditInfo]) -> Iterator[str]:
    """A note if the edits were made with different prompt templates."""
    templates = sorted({info.template for info in infos})
    if len(templates) > 1:
        yield (
            f"The edits were made with different prompt templates ({', '.join(templates)}). The question was asked "
            f"with the first edit's, {infos[0].template!r}."
        )


def _say_all(sentences: Iterable[str]) -> None:
    errors = Console(stderr=True)
    for sentence in sentences:
        say(errors, sentence)


def _check_device(device: str) -> None:
    """Raises InputError unless this machine has the device."""
    import torch

    num_gpus = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{index}" for index in range(num_gpus))]
    if device not in allowed:
        raise InputError(f"--device: got {device!r}, expected one of {', '.join(allowed)} on this machine.")


def merge(edits: Sequence[str], out: Path, checkpoint: str | None) -> Path:
    """`odedit merge`: a plain checkpoint with the edits in its weights."""
    from odedit.editing.files import load_edits
    from odedit.editing.merging import merged_into
    from odedit.storage.atomic import check_new
    from pipeline.edits import files, held
    from pipeline.edits.answers import load_backbone_of

    check_new(out)
    given = files.find(edits)
    backbone = load_backbone_of(given.infos[0], checkpoint)
    editor, params, infos = load_edits(given.files, backbone)
    with merged_into(backbone, editor, params) as merged:
        result = held.ask(backbone, editor.sites, infos, lambda batch: nullcontext())
        merged.write(out)
    _say_all([*given.notes, *result.sentences()])
    return out


def edits(model: str, *, failed: bool, as_csv: bool) -> None:
    """`odedit edits`: the edits of a committed model, worst first."""
    from pipeline.edits import listing
    from pipeline.run_folder.committed import read_edits, worst_first

    listed = [entry for entry in worst_first(read_edits(locate(model, "MODEL"))) if not (failed and entry["holds"])]
    if as_csv:
        print(listing.to_csv(listed), end="")
    else:
        Console().print(listing.table(listed))


def fetch(run_id: str, edit_ids: Sequence[str], uri: str, out: Path) -> None:
    """`odedit fetch`."""
    from odedit.storage.atomic import new_folder

    with ExitStack() as stack:
        try:
            stack.enter_context(new_folder(out))
        except OSError as error:
            raise InputError(f"--out: {str(out)!r} cannot be written to: {error.strerror}.") from error
        for edit_id in edit_ids:
            print(fetch_edit(uri, run_id, edit_id, out))


def train_world(out: Path, seed: int, vision_steps: int, joint_steps: int, family: str) -> Path:
    """`odedit world train`."""
    from odedit.world import train

    errors = Console(stderr=True)
    last = time.monotonic()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(), console=errors, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        tasks: dict[str, TaskID] = {}

        def show(stage: str, step: int, steps: int, loss: float) -> None:
            nonlocal last
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, loss=loss)
            bar.update(tasks[stage], completed=step, loss=loss)
            # Without a terminal there is no bar: a line every 5 seconds instead.
            if not errors.is_terminal and (step == steps or time.monotonic() - last > 5):
                last = time.monotonic()
                say(errors, f"{stage}: step {step} of {steps}, loss {loss:.3f}")

        return train.train(out, seed, show, vision_steps, joint_steps, family)


def check_world(checkpoint: Path | None, samples: int, family: str) -> int:
    """`odedit world check`: prints the accuracies; returns 1 if one is below its threshold."""
    from odedit.world import check

    if checkpoint is not None and not (checkpoint / "config.json").is_file():
        raise InputError(f"--checkpoint: {checkpoint} holds no config.json; expected the folder of a checkpoint.")
    accuracies = check.check(checkpoint, samples=samples, family=family)
    table = Table("attribute", *("plain", "rephrase"))
    for attribute, row in accuracies.items():
        table.add_row(attribute, *(f"{row[name]:.3f}" if name in row else "" for name in ("plain", "rephrase")))
    Console().print(table)
    shortfalls = check.shortfalls(accuracies)
    for line in shortfalls:
        say(Console(stderr=True), line)
    return 1 if shortfalls else 0


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Columns of a file by field, from texts such as `question=prompt`. Raises InputError for another form."""
    from odedit.data.names import KNOWN, unknown_column

    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise InputError(f"--column: got {pair!r}, expected FIELD=COLUMN, such as question=prompt.")
        if name not in KNOWN:
            raise InputError(f"--column: {unknown_column(name)}")
        columns[name] = column
    return columns


def check_data(
    path: str,
    image_root: str | None,
    rephrase_root: str | None,
    task: str,
    images: bool,
    column: Sequence[str],
    *,
    prints_all: bool = False,
) -> None:
    """`odedit data check`."""
    from odedit.data.check import CheckReport, FirstFindings, check_records

    report, first = CheckReport(), FirstFindings(prints_all)
    with _named_by_flags():
        columns = parse_columns(column)
        for finding in check_records(
            path, image_root, rephrase_root, report, task=task, read_images=images, columns=columns
        ):
            if first.takes(finding):
                print(_with_flags(str(finding)))
    if rest := first.rest():
        print(f"And more of the same kind: {rest}. --all prints each.")
    for line in report.lines():
        print(_with_flags(line))
    skipped = ", ".join(f"{count} {kind}" for kind, count in report.skipped.most_common())
    print(
        f"{report.num_usable} of {counted(report.num_records, 'record')} can be used"
        + (f"; skipped: {skipped}." if skipped else ".")
    )
    if not report.num_usable:
        raise NothingUsable("None of the records can be used." if report.num_records else f"{path} holds no record.")


def pack_data(
    path: str, out: str, image_root: str | None, rephrase_root: str | None, task: str, column: Sequence[str]
) -> None:
    """`odedit data pack`."""
    from odedit.data.check import Finding, FirstFindings
    from odedit.data.pack import pack

    errors, first = Console(stderr=True), FirstFindings()

    def show(finding: Finding) -> None:
        if first.takes(finding):
            say(errors, _with_flags(str(finding)))

    with _named_by_flags():
        columns = parse_columns(column)
        done = pack(path, image_root, rephrase_root, out, task=task, columns=columns, on_problem=show)
    if rest := first.rest():
        say(errors, f"And more of the same kind: {rest}. `odedit data check --all` names each.")
    print(f"{out}: {counted(done.num_records, 'record')} ({done.num_problems} unusable), "
          f"{counted(done.num_images, 'picture')}, "
          f"{done.num_image_bytes / 2**20:.1f} MiB, {done.num_unreadable} unreadable.")  # fmt: skip
    if done.is_useless:
        raise NothingUsable("Not one picture could be read, so nothing was written: see --image-root, --rephrase-root.")


@contextmanager
def _named_by_flags() -> Iterator[None]:
    """Renames settings in error messages to the options of the command: `data.image_root` to `--image-root`."""
    try:
        yield
    except InputError as error:
        raise InputError(_with_flags(str(error))) from error


def _with_flags(text: str) -> str:
    flags = {"image_root": "--image-root", "rephrase_root": "--rephrase-root", "task": "--task", "path": "PATH"}
    for setting, flag in flags.items():
        text = text.replace(f"data.{setting}", flag)
    return text
