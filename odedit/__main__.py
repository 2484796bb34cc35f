"""Commands of `odedit`. Results go to standard output, progress and log to standard error.

Exit codes: `odedit.runtime.exit_codes`. Commands import their modules when they run, so that help is fast.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from odedit.errors import InputError
from odedit.runtime import garbage
from odedit.runtime.exit_codes import exit_on_error, is_output_closed, print_error

app = typer.Typer(
    help="Batch editing of multimodal language models: records in, edited models and scores out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
world_app = typer.Typer(
    help="Write the embedded benchmark; train or check an embedded model.", no_args_is_help=True, rich_markup_mode=None
)
data_app = typer.Typer(
    help="Print a file of records to fill in; check and pack such files.", no_args_is_help=True, rich_markup_mode=None
)
convert_app = typer.Typer(
    help="Convert models that are published in parts to one checkpoint.", no_args_is_help=True, rich_markup_mode=None
)
mlflow_app = typer.Typer(help="Log finished runs to MLflow.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(mlflow_app, name="mlflow")
app.add_typer(convert_app, name="convert")
app.add_typer(world_app, name="world")
app.add_typer(data_app, name="data")

_debug = False

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the file.")
]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="Settings for this model; `odedit presets` lists them.")
]
MovedCheckpoint = Annotated[str | None, typer.Option(help="Model, if it has moved since the edit was made.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    global _debug
    _debug = debug or bool(os.environ.get("ODEDIT_DEBUG"))
    # Silences the libraries, unless the user has set these.
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    _decrypt_variables()
    _warn_of_passwords()


def _decrypt_variables() -> None:
    """Decrypts the variables that `odedit submit --env` has passed to this job."""
    if os.environ.get("ODEDIT_SEALED_VARIABLES"):
        from cluster import sealing

        with _explained():
            try:
                sealing.unseal()
            except sealing.JobError as error:
                raise InputError(str(error)) from error


def _warn_of_passwords() -> None:
    if any("://" in text for text in sys.argv):
        from cluster.packing import holds_password

        if any(map(holds_password, sys.argv)):
            print_error(
                "Note: an address on the command line holds a password, which `ps` shows to all users of this machine. "
                "Put the address into the configuration file, or the password into the environment."
            )


def _explained() -> AbstractContextManager[None]:
    return exit_on_error(debug=_debug)


def _with_preset(preset: str | None, overrides: list[str] | None, section: str = "") -> list[str]:
    """The overrides with the preset's name before them."""
    return [*([] if preset is None else [f"{section}preset={preset}"]), *(overrides or [])]


@app.command()
def presets() -> None:
    """Lists settings by model: checkpoint, family, and what the settings of the editors come from."""
    with _explained():
        from pipeline import commands

        commands.list_presets()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results and the MLflow store.")] = Path("demo"),
    edits: Annotated[int, typer.Option(min=2, help="Number of evaluation edits.")] = 48,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the results of an earlier demo first.")] = False,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the report in a browser.")] = False,
) -> None:
    """Edits the embedded model with WISE under five objectives, and compares them.

    The objectives: WISE's own loss, the likelihood with a rephrase, the same with WISE's own terms, ODEdit, contrast.
    Then commits the same facts to one model, beside the sum of single edits, and prints a command that asks it. Ends by
    opening its report in a browser where there is a desktop. Needs no network; a few minutes on two cores. The same
    command resumes an interrupted demo.
    """
    with _explained():
        from pipeline import demo

        demo.main(out, edits, fresh=fresh, opens=not no_open)


@app.command()
def edit(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of the settings that differ from the defaults. Without it, data.path=FILE."),
    ] = None,
    preset: Preset = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print settings and plan, and write nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in `out` first.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print the time of each stage, and write OUT/profile.json.")
    ] = False,
) -> None:
    """Edits the records of a file, one edit each, and scores every edit before and after.

    The same command resumes an interrupted run. Results: OUT/results/*.parquet, OUT/edits/*.safetensors,
    OUT/summary.json, OUT/report.html, and the same in MLflow.

    Example: odedit edit --config run.yaml data.limit=100 editor.max_steps=20 out=runs/first
    """
    with _explained():
        from pipeline import commands

        commands.edit(config, _with_preset(preset, overrides), dry_run=dry_run, fresh=fresh, profile=profile)


@app.command()
def commit(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file as for `odedit edit`; its section `commit` names the way. Without it, data.path=FILE."
        ),
    ] = None,
    preset: Preset = None,
    edits_from: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="RUN", help="Run whose finished edits are used (routed, bulk, sum); default: new ones."
        ),
    ] = None,
    change: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Run of `odedit commit` whose model is changed, instead of --config."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="EDIT_ID", help="Record to take out of that model; repeatable.")
    ] = None,
    add: Annotated[
        str | None, typer.Option(metavar="FILE", help="Records to commit to that model in addition.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print settings and plan, and write nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in `out` first.")] = False,
) -> None:
    """Commits all records to one model, and scores every record on it.

    The same command resumes an interrupted run. Results: OUT/model (what you serve), OUT/results/*.parquet,
    OUT/summary.json, OUT/report.html, and the same in MLflow. --change makes a new model from an earlier one.

    Example: odedit commit --config run.yaml out=runs/one-model
    """
    with _explained():
        from pipeline import commands

        commands.commit(
            config,
            _with_preset(preset, overrides),
            edits_from=edits_from,
            change=change,
            remove=remove or [],
            add=add,
            dry_run=dry_run,
            fresh=fresh,
        )


@app.command()
def score(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id of a checkpoint, or folder of a committed model.")
    ],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file as for `odedit edit`; backbone is the unedited model. Without it, data.path=FILE."
        ),
    ] = None,
    preset: Preset = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also measure the perplexity of this text, before and after.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in `out` first.")] = False,
) -> None:
    """Scores the records of a file on one whole model, against the unedited model.

    The same command resumes an interrupted run. Results: OUT/results/*.parquet, OUT/kept.parquet, OUT/summary.json,
    OUT/report.html, and the same in MLflow.

    Example: odedit score merged --config run.yaml out=runs/merged
    """
    with _explained():
        from pipeline import score

        score.score(model, config, _with_preset(preset, overrides), text, dry_run=dry_run, fresh=fresh)


@app.command()
def train(
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="mend or unike.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file as for `odedit edit`; records: training.path, training.validation.")
    ] = None,
    preset: Preset = None,
    out: Annotated[
        str | None, typer.Option(help="File or address of the weights; default: beside the folder `out`.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Restart the training and replace the file.")] = False,
) -> None:
    """Trains the weights that an editor needs, and prints their file, for the setting editor.checkpoint.

    The same command resumes an interrupted training.

    Example: odedit train mend --config run.yaml training.path=train.json training.validation=validation.json
    """
    with _explained():
        from pipeline import commands

        print(commands.train(editor, config, _with_preset(preset, overrides), out, fresh=fresh))


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the study; `odedit study list` prints all.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the settings that differ from the shipped study.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder or address; default: studies/NAME.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the results of an earlier run first.")] = False,
) -> None:
    """Runs arms that differ in a few settings, and compares them on the same records.

    Results: OUT/table.md, OUT/table.csv, OUT/plot.png, and an MLflow run with a child run per arm. The same command
    resumes an interrupted study.

    Example: odedit study table1 draw.per_task=12 --out studies/small
    """
    with _explained():
        from pipeline import commands

        commands.study(name, config, overrides or [], out, fresh=fresh)


@app.command()
def tune(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the search; default: the shipped demo.")] = None,
    preset: Preset = None,
    out: Annotated[str | None, typer.Option(help="Folder or address; default: searches/NAME-OF-THE-FILE.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="DIR", help="Resume the search in this folder.")] = None,
) -> None:
    """Searches for settings with Ray Tune and Optuna, and compares the best with the defaults on other records.

    Results: OUT/best.yaml for `odedit edit`, OUT/summary.md, OUT/trials.csv, plots, and an MLflow run with a child run
    per trial. --resume continues an interrupted search.

    Example: odedit tune --config search.yaml trials=200 concurrent=8
    """
    with _explained():
        from tune import commands

        commands.tune(config, _with_preset(preset, overrides, "settings."), out, resume)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folder, address or MLflow run id of a run, study or search."),
    ],
    uri: Annotated[str | None, typer.Option(help="MLflow store of the run ids, like tracking.uri.")] = None,
    html: Annotated[str | None, typer.Option(help="Also write the tables to this HTML file.")] = None,
) -> None:
    """Compares runs with the first one: different settings, metrics, and paired tests on common records.

    Prints Markdown.

    Example: odedit compare runs/native runs/wise-odedit studies/table4 --html comparison.html
    """
    with _explained():
        from pipeline import commands

        commands.compare(runs, uri, html)


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN|DIR", help="Folder or address of a run, or of a study or folder with several.")
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN", help="Run that the scores are compared with, edit by edit.")
    ] = None,
    states: Annotated[
        bool,
        typer.Option("--states", help="Also load the model, and draw where the worst edits and their rephrases lie."),
    ] = False,
) -> None:
    """Writes RUN/report.html again: scores, and every edit with its pictures and answers, worst first.

    Prints the path of each page, one file that needs no network.

    Example: odedit report runs/wise-odedit --baseline runs/native
    """
    with _explained():
        from pipeline import commands

        commands.report(run, baseline, with_states=states)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder or address of a run.")],
    edit_id: Annotated[
        str | None, typer.Argument(metavar="[EDIT_ID]", help="Edit; default: a list, worst first.")
    ] = None,
) -> None:
    """Shows an edit with its questions, the answers before and after, and its picture where the terminal draws it.

    Example: odedit show runs/first vqa_eval-000001
    """
    with _explained():
        from pipeline import commands

        commands.show(run, edit_id)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND...", help="commit, edit, tune, study or train, with its arguments."),
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Show the job's log until it ends, and exit with its exit code.")] = True,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Environment variable to pass to the job; repeatable.")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Further file or folder to send; repeatable.")
    ] = None,
    install: Annotated[bool, typer.Option(help="Install the dependencies for the job with pip.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job, as Ctrl-C would.")] = None,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Show the log of a job until it ends.")] = None,
) -> None:
    """Runs a command as a job of a Ray cluster, and prints its log.

    Sends the code, and the files below the current folder that the settings name. Full paths and addresses are read
    where the job runs.

    Example: odedit submit --address http://head:8265 --env MLFLOW_TRACKING_TOKEN -- edit --config run.yaml
    out=/shared/runs/one
    """
    from rich.console import Console

    with exit_on_error("Interrupted.", debug=_debug):
        if sum(choice is not None for choice in (command or None, stop, follow)) != 1:
            raise InputError(
                "Give a command, such as `-- edit --config run.yaml`, or one of --follow ID and --stop ID."
            )
        from cluster import submit as jobs
        from pipeline.config.version import code_version

        console = Console(stderr=True)
        try:
            if stop is not None:
                code = jobs.stop(stop, address, console)
            elif follow is not None:
                code = jobs.follow(follow, address, console)
            else:
                code = jobs.submit(
                    command or [],
                    address,
                    console,
                    wait=wait,
                    environment=env or [],
                    include=include or [],
                    install=install,
                    code=code_version(),
                )
        except jobs.JobError as error:
            raise InputError(str(error)) from error
        raise typer.Exit(code)


@app.command()
def apply(
    edits: Annotated[
        list[str],
        typer.Argument(
            metavar="EDIT...",
            help="Edit files, folders of them, runs, or patterns; paths or addresses. All are applied together.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="Question, or beginning of a caption.")],
    image: Annotated[Path | None, typer.Option(help="Picture of the question.")] = None,
    caption: Annotated[
        bool, typer.Option("--caption", help="Continue the prompt without the question template.")
    ] = False,
    checkpoint: MovedCheckpoint = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or one GPU such as cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Type of the model's weights: float32, bfloat16 or float16.")] = "float32",
    max_tokens: Annotated[int, typer.Option(min=1, max=64, help="Longest answer in tokens.")] = 8,
) -> None:
    """Asks the model a question, before and after edits.

    With several edits, also counts how many of them still hold.

    Example: odedit apply out/edits/record-000001.safetensors --prompt "Who owns this?" --image photo.png
    """
    with _explained():
        from pipeline import commands

        commands.apply(
            edits,
            prompt,
            image,
            caption=caption,
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
        )


@app.command()
def fetch(
    edit_ids: Annotated[list[str], typer.Argument(metavar="EDIT_ID...", help="Values of the results' column edit_id.")],
    run: Annotated[str, typer.Option(help="MLflow run id.")],
    uri: Annotated[str, typer.Option(help="MLflow server or database, like tracking.uri.")],
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("."),
) -> None:
    """Downloads edits from MLflow, for `odedit apply`, and prints their files.

    Example: odedit fetch --uri sqlite:///mlflow.db --run 0123456789abcdef record-000001 --out fetched
    """
    with _explained():
        from pipeline import commands

        commands.fetch(run, edit_ids, uri, out)


@app.command()
def merge(
    edits: Annotated[
        list[str],
        typer.Argument(
            metavar="EDIT...",
            help="Edit files of one editor, folders of them, runs, or patterns; paths or addresses.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder of the checkpoint.")],
    checkpoint: MovedCheckpoint = None,
) -> None:
    """Merges edits into the model's weights: a checkpoint with the original files and dtypes, usable without odedit.

    For editors whose edits are weights: ftl, ftv, lora and mend. The others act per prompt and need `odedit apply`.
    Merged edits influence each other; prints how many of them still hold.

    Example: odedit merge runs/first/edits/record-000001.safetensors --out merged
    """
    with _explained():
        from pipeline import commands

        print(commands.merge(edits, out, checkpoint))


@app.command()
def edits(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or address of a committed model, or its run.")],
    failed: Annotated[bool, typer.Option("--failed", help="Only edits that do not hold.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV with all scores instead of a table.")] = False,
) -> None:
    """Lists the edits of a committed model with their answers and scores, worst first.

    Example: odedit edits runs/one/model --failed
    """
    with _explained():
        from pipeline import commands

        commands.edits(model, failed=failed, as_csv=csv)


_FAMILIES = "blip2, minigpt4 or llava"


@world_app.command("build")
def world_build(
    out: Annotated[Path, typer.Argument(help="Output folder.")],
    seed: Annotated[int, typer.Option(help="Seed of new values, wordings and pictures.")] = 0,
) -> None:
    """Writes the benchmark: records in MMEdit's format, and their pictures."""
    with _explained():
        from odedit import world

        for name, path in world.build(out, seed).items():
            print(f"{name}\t{path}")


@world_app.command("train")
def world_train(
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and pictures.")] = 0,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = 2400,
    joint_steps: Annotated[int, typer.Option(min=1, help="Steps of the whole model.")] = 1700,
    family: Annotated[str, typer.Option(help=f"Family of the model: {_FAMILIES}.")] = "blip2",
) -> None:
    """Trains the embedded model from scratch (about a quarter of an hour on one core)."""
    with _explained():
        from pipeline import commands

        print(commands.train_world(out, seed, vision_steps, joint_steps, family))


@world_app.command("check")
def world_check(
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder; default: the shipped one.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions per attribute.")] = 600,
    family: Annotated[
        str, typer.Option(help=f"Family of the shipped model: {_FAMILIES}; not read with --checkpoint.")
    ] = "blip2",
) -> None:
    """Measures the model's accuracy on held-out handwriting and wordings."""
    with _explained():
        from pipeline import commands

        raise typer.Exit(commands.check_world(checkpoint, samples, family))


ImageRoot = Annotated[str | None, typer.Option(help="Folder of the paths in `image` and `m_loc`.")]
RephraseRoot = Annotated[
    str | None, typer.Option(help="Folder of the paths in `image_rephrase`; default: --image-root.")
]
Task = Annotated[str, typer.Option(help="Task of records without one: auto, vqa or caption.")]

Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="FIELD=COLUMN", help="Column of a field, such as question=prompt; repeatable."),
]


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="File or folder of records.")],
    image_root: ImageRoot = None,
    rephrase_root: RephraseRoot = None,
    task: Task = "auto",
    images: Annotated[bool, typer.Option(help="Also read every picture.")] = True,
    column: Columns = None,
    prints_all: Annotated[
        bool, typer.Option("--all", help="Print every record that would be skipped, not the first ten of each kind.")
    ] = False,
) -> None:
    """Prints the records that a run would skip, with reasons, and what it sees in the others."""
    with _explained():
        from pipeline import commands

        commands.check_data(path, image_root, rephrase_root, task, images, column or [], prints_all=prints_all)


@data_app.command("template")
def data_template() -> None:
    """Prints a CSV file to fill in: a picture, a question and a right answer per line.

    Example: odedit data template > records.csv
    """
    with _explained():
        from odedit.data.template import TEMPLATE

        print(TEMPLATE, end="")


@data_app.command("pack")
def data_pack(
    path: Annotated[str, typer.Argument(help="File of records.")],
    out: Annotated[str, typer.Argument(help="Output folder, for the setting data.path.")],
    image_root: ImageRoot = None,
    rephrase_root: RephraseRoot = None,
    task: Task = "auto",
    column: Columns = None,
) -> None:
    """Packs records and their pictures into a few large files, which remote storage reads faster."""
    with _explained():
        from pipeline import commands

        commands.pack_data(path, out, image_root, rephrase_root, task, column or [])


@mlflow_app.callback()
def _mlflow() -> None:
    """Log finished runs to MLflow."""


@mlflow_app.command("sync")
def mlflow_sync(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders or addresses (`out`) of finished runs.")],
    uri: Annotated[str | None, typer.Option(help="MLflow store to use instead of the run's own.")] = None,
) -> None:
    """Logs runs that could not be logged when they ended; edits nothing."""
    with _explained():
        from pipeline.driver.sync import sync

        for folder in runs:
            print(sync(folder, uri))


@convert_app.callback()
def _convert() -> None:
    """Convert models that are published in parts to one checkpoint."""


@convert_app.command("minigpt4")
def convert_minigpt4(
    blip2: Annotated[Path, typer.Option(help="BLIP-2 with FlanT5-XXL, for image tower and Q-Former.")],
    projection: Annotated[Path, typer.Option(help="MiniGPT-4's projection: .pth or safetensors file.")],
    vicuna: Annotated[Path, typer.Option(help="The Vicuna that the projection was trained for.")],
    out: Annotated[Path, typer.Option(help="New folder of the checkpoint.")],
) -> None:
    """Builds a checkpoint of MiniGPT-4, for backbone.checkpoint with the family minigpt4.

    Example: odedit convert minigpt4 --blip2 blip2-flan-t5-xxl --projection pretrained_minigpt4_7b.pth
    --vicuna vicuna-7b-v0 --out minigpt4-7b
    """
    with _explained():
        from odedit.backbones.common import convert_minigpt4 as convert

        print(convert.minigpt4(blip2, projection, vicuna, out))


def main() -> None:
    """Entry point of the `odedit` command."""
    garbage.collect_rarely()
    try:
        app(prog_name="odedit")
    finally:
        is_output_closed()
        garbage.end()


if __name__ == "__main__":
    main()
