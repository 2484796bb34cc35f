"""The front door: `odedit COMMAND`. Standard output is the result, standard error progress and log.

Exit codes: 0 done, 1 it failed or nothing could be used, 2 the input is wrong, 130 interrupted, 141 standard output was
closed. Everything heavy is imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from odedit.errors import InputError, NothingUsable, cause_of, one_sentence
from odedit.runtime.addresses import masked

app = typer.Typer(
    help="Batch editing of multimodal language models: records in, edited models and scores out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
world_app = typer.Typer(help="The embedded model and benchmark.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(
    help="Files of records: look through them, pack them.", no_args_is_help=True, rich_markup_mode=None
)
convert_app = typer.Typer(
    help="Models that are published in pieces, as one checkpoint.", no_args_is_help=True, rich_markup_mode=None
)
mlflow_app = typer.Typer(help="What MLflow is to know.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(mlflow_app, name="mlflow")
app.add_typer(convert_app, name="convert")
app.add_typer(world_app, name="world")
app.add_typer(data_app, name="data")

_debug = False
_OUTPUT_CLOSED = 141
"""Exit code as of a program that the signal SIGPIPE ended."""


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    global _debug
    _debug = debug or bool(os.environ.get("ODEDIT_DEBUG"))
    # The libraries' own chatter; a user who has set these keeps them.
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ):
        os.environ.setdefault(name, value)
    _take_over_secrets()


def _take_over_secrets() -> None:
    """Decrypts what `odedit submit --env` has handed on; says so if a password can be read by others."""
    if os.environ.get("ODEDIT_SEALED_VARIABLES"):
        from cluster import sealing

        with _explained():
            try:
                sealing.unseal()
            except sealing.JobError as error:
                raise InputError(str(error)) from error
    if any("://" in text for text in sys.argv):
        from cluster.packing import holds_password

        if any(map(holds_password, sys.argv)):
            _say(
                "Note: an address on the command line holds a password, which `ps` shows to all users of this machine. "
                "Put the address into the configuration file, or the password into the environment."
            )


@contextmanager
def _explained(
    interrupted: str = "Interrupted. What is finished is kept: the same command goes on from there.",
) -> Iterator[None]:
    """Turns what can go wrong into one message and an exit code."""
    try:
        yield
    except InputError as error:
        _say(str(cause_of(error)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        _say(interrupted)
        raise typer.Exit(130) from error
    except NothingUsable as error:
        _say(str(error))
        raise typer.Exit(1) from error
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            raise typer.Exit(_OUTPUT_CLOSED) from error
        if _debug:
            _say(traceback.format_exc().rstrip())
        _say(f"Failed: {one_sentence(error)}" + ("" if _debug else "\n(odedit --debug ... shows where.)"))
        raise typer.Exit(1) from error


def _is_output_closed() -> bool:
    """Whether the program that reads standard output has ended, as `head` does when it has seen enough."""
    if sys.stdout is None:  # closed before the command began
        return True
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        is_closed = bool(poll.poll(0))
    except BrokenPipeError:
        is_closed = True
    except (OSError, ValueError):  # no file behind it
        return False
    if is_closed:
        # Python flushes once more when it ends, which would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _say(text: str) -> None:
    print(masked(text), file=sys.stderr, flush=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and the MLflow store.")] = Path("demo"),
    edits: Annotated[int, typer.Option(min=2, help="Number of evaluation edits.")] = 48,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier demo's results first.")] = False,
) -> None:
    """Edits the embedded model with WISE and with WISE + ODEdit, and compares them.

    Offline, a few minutes on two cores. Run it again and it resumes, or says that it is finished.
    """
    with _explained():
        from pipeline import demo

        demo.main(out, edits, fresh=fresh)


@app.command()
def edit(
    config: Annotated[Path, typer.Option(help="YAML with what differs from the defaults.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the plan, and stop.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in `out` first.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print where the time went, stage by stage; OUT/profile.json.")
    ] = False,
) -> None:
    """Edits the records of a file, one edit each, and scores every edit before and after.

    The same command resumes an interrupted run. Results: OUT/results/*.parquet, OUT/edits/*.safetensors,
    OUT/summary.json, OUT/report.html, and the same in MLflow.

    Example: odedit edit --config run.yaml data.limit=100 editor.max_steps=20 out=runs/first
    """
    with _explained():
        from pipeline import commands

        commands.edit(config, overrides or [], dry_run=dry_run, fresh=fresh, profile=profile)


@app.command()
def train(
    editor: Annotated[str, typer.Argument(metavar="EDITOR", help="mend or unike.")],
    config: Annotated[Path, typer.Option(help="YAML as for `odedit edit`; training.path names the records.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the file.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="File of the weights or its address; beside the folder `out` if not given.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, and replace the file.")] = False,
) -> None:
    """Trains the weights that an editor needs before its first edit; prints their file.

    The same command resumes an interrupted training. Edit with the file as editor.checkpoint.

    Example: odedit train mend --config run.yaml --out mend.safetensors
    """
    with _explained():
        from pipeline import commands

        print(commands.train(editor, config, overrides or [], out, fresh=fresh))


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which one; `odedit study list` names them.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the files.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with what differs from the study that ships.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder or address; studies/NAME if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the results of an earlier run first.")] = False,
) -> None:
    """Runs many arms that differ in a few settings, and compares them on the same records.

    Results: OUT/table.md, OUT/table.csv, OUT/plot.png, and in MLflow a run with a child for each arm. The same command
    resumes an interrupted study.

    Example: odedit study table1 draw.per_task=12 --out studies/small
    """
    with _explained():
        from pipeline import commands

        commands.study(name, config, overrides or [], out, fresh=fresh)


@app.command()
def tune(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that override the file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the search; the demo that ships if not given.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder or address; searches/NAME-OF-THE-FILE if not given.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="DIR", help="Go on with the search in this folder.")] = None,
) -> None:
    """Searches for settings with Ray Tune and Optuna, and runs the best beside the defaults on other records.

    Results: OUT/best.yaml for `odedit edit`, OUT/summary.md, OUT/trials.csv, pictures, and in MLflow a run with a child
    for each trial. A search that was interrupted goes on with --resume, to as many trials as were asked for.

    Example: odedit tune --config search.yaml trials=200 concurrent=8
    """
    with _explained():
        from tune import commands

        commands.tune(config, overrides or [], out, resume)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folder or address of a run, study or search, or an MLflow run's id."),
    ],
    uri: Annotated[str | None, typer.Option(help="MLflow store of the ids, as tracking.uri.")] = None,
    html: Annotated[str | None, typer.Option(help="Also write the tables as a page.")] = None,
) -> None:
    """Compares runs with the first: settings that differ, metrics, and paired tests on the records they share.

    Prints Markdown.

    Example: odedit compare runs/native runs/wise-odedit studies/table4 --html comparison.html
    """
    with _explained():
        from pipeline import commands

        commands.compare(runs, uri, html)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND...", help="edit, tune, study or train, with its options.")
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option(help="Show the job's log until it ends, and end with its exit code.")] = True,
    env: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Variable that the job gets as it is here; repeatable.")
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="More files to take along; repeatable.")
    ] = None,
    install: Annotated[bool, typer.Option(help="Let pip install the dependencies for the job.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="End a job, as Ctrl-C would.")] = None,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Show the log of a job until it ends.")] = None,
) -> None:
    """Runs a command as a job of a Ray cluster.

    The code and the files that the settings name below the current folder are sent; full paths and addresses are read
    where the job runs. Prints the job's log.

    Example: odedit submit --address http://head:8265 --env MLFLOW_TRACKING_TOKEN -- edit --config run.yaml
    out=/shared/runs/one
    """
    from rich.console import Console

    chosen = sum(one is not None for one in (command or None, stop, follow))
    with _explained("Interrupted."):
        if chosen != 1:
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
            help="Edit files, folders of them, runs, or patterns; paths or addresses. Several are applied together.",
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The question, or the beginning of a caption.")],
    image: Annotated[Path | None, typer.Option(help="Picture that the question is about.")] = None,
    caption: Annotated[bool, typer.Option("--caption", help="Continue the prompt as it stands.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Model, if it has moved since the edit was made.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or one GPU: cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the model's weights.")] = "float32",
    max_tokens: Annotated[int, typer.Option(min=1, max=64, help="Longest answer.")] = 8,
) -> None:
    """Asks the model a question, before and after edits.

    With several edits it also says how many of them hold: whether each is still answered as it was made to be.

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
    edit_ids: Annotated[list[str], typer.Argument(metavar="EDIT_ID...", help="As in the results' column edit_id.")],
    run: Annotated[str, typer.Option(help="Id of the MLflow run.")],
    uri: Annotated[str, typer.Option(help="Tracking server or database, as tracking.uri.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("."),
) -> None:
    """Downloads edits that a run logged to MLflow, for `odedit apply`; prints the files.

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
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    checkpoint: Annotated[str | None, typer.Option(help="Model, if it has moved since the edit was made.")] = None,
) -> None:
    """Writes the edits into the model's weights: a plain checkpoint that needs no odedit.

    For editors whose edits are weights (ftl, ftv, lora, mend); the others decide per prompt and stay with `odedit
    apply`. Edits that are merged change each other's answers: it says how many of them hold. The files are those of the
    model's checkpoint, with its dtypes.

    Example: odedit merge runs/first/edits/record-000001.safetensors --out merged
    """
    with _explained():
        from pipeline import commands

        print(commands.merge(edits, out, checkpoint))


WorldFamily = Annotated[str, typer.Option(help="blip2, minigpt4 or llava; a folder that is given tells its own.")]


@world_app.command("build")
def world_build(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
) -> None:
    """Writes the benchmark: records in MMEdit's format, and their pictures."""
    with _explained():
        from odedit import world

        for name, path in world.build(out, seed).items():
            print(f"{name}\t{path}")


@world_app.command("train")
def world_train(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of weights and pictures.")] = 0,
    vision_steps: Annotated[int, typer.Option(min=1, help="Steps of the vision tower alone.")] = 2400,
    joint_steps: Annotated[int, typer.Option(min=1, help="Steps of the whole model.")] = 1700,
    family: WorldFamily = "blip2",
) -> None:
    """Trains the embedded model from scratch (about a quarter of an hour on one core)."""
    with _explained():
        from pipeline import commands

        print(commands.train_world(out, seed, vision_steps, joint_steps, family))


@world_app.command("check")
def world_check(
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder; the one that ships if not given.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions per attribute.")] = 600,
    family: WorldFamily = "blip2",
) -> None:
    """Asks the model about its world, in handwriting and wordings that it was not trained with."""
    with _explained():
        from pipeline import commands

        raise typer.Exit(commands.check_world(checkpoint, samples, family))


ImageRoot = Annotated[str | None, typer.Option(help="Folder of `image` and `m_loc`.")]
RephraseRoot = Annotated[str | None, typer.Option(help="Folder of `image_rephrase`; as --image-root if not given.")]
Task = Annotated[str, typer.Option(help="auto, vqa or caption: of records that do not say.")]


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="File of records, or a packed folder.")],
    image_root: ImageRoot = None,
    rephrase_root: RephraseRoot = None,
    task: Task = "auto",
    images: Annotated[bool, typer.Option(help="Also read every picture.")] = True,
) -> None:
    """Says which records would be skipped, and why."""
    with _explained():
        from pipeline import commands

        commands.check_data(path, image_root, rephrase_root, task, images)


@data_app.command("pack")
def data_pack(
    path: Annotated[str, typer.Argument(help="File of records.")],
    out: Annotated[str, typer.Argument(help="Folder to write; it is then what data.path names.")],
    image_root: ImageRoot = None,
    rephrase_root: RephraseRoot = None,
    task: Task = "auto",
) -> None:
    """Copies records and their pictures into a few large files, which remote storage reads faster."""
    with _explained():
        from pipeline import commands

        commands.pack_data(path, out, image_root, rephrase_root, task)


@mlflow_app.callback()
def _mlflow() -> None:
    """What MLflow is to know."""


@mlflow_app.command("sync")
def mlflow_sync(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders or addresses of finished runs (out).")],
    uri: Annotated[str | None, typer.Option(help="Log to this store instead of the one that the run names.")] = None,
) -> None:
    """Logs runs that the store did not take when they ended; edits nothing."""
    with _explained():
        from pipeline.driver.sync import sync

        for folder in runs:
            print(sync(folder, uri))


@convert_app.callback()
def _convert() -> None:
    """Models that are published in pieces, as one checkpoint."""


@convert_app.command("minigpt4")
def convert_minigpt4(
    blip2: Annotated[Path, typer.Option(help="BLIP-2 with FlanT5-XXL: image tower and Q-Former are taken.")],
    projection: Annotated[Path, typer.Option(help="MiniGPT-4's projection: a .pth file or safetensors.")],
    vicuna: Annotated[Path, typer.Option(help="The Vicuna that the projection was trained for.")],
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
) -> None:
    """Puts MiniGPT-4 together; the folder is what backbone.checkpoint names for the family minigpt4.

    Example: odedit convert minigpt4 --blip2 blip2-flan-t5-xxl --projection pretrained_minigpt4_7b.pth
    --vicuna vicuna-7b-v0 --out minigpt4-7b
    """
    with _explained():
        from odedit.backbones.common import convert_minigpt4 as convert

        print(convert.minigpt4(blip2, projection, vicuna, out))


def main() -> None:
    """Entry point of the `odedit` command."""
    try:
        app(prog_name="odedit")
    finally:
        _is_output_closed()


if __name__ == "__main__":
    main()
