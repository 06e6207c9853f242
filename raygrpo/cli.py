"""The commands. Each loads what it needs when it runs, so that `raygrpo --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from raygrpo.config import RunConfig
    from raygrpo.jobs.client import RayJobs

Result = TypeVar("Result")
INTERRUPTED = 130  # exit status of what Ctrl-C ended

app = typer.Typer(
    help="GRPO post-training on Ray: vLLM generators, verifiable rewards, shared-prefix DeepSpeed learners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure raygrpo itself.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigArgument = Annotated[
    Path, typer.Argument(help="A run's YAML, e.g. pipelines/quickstart.yaml.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the YAML, e.g. seed=1 learner.optimizer.lr=1e-5; values are YAML.",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HOST:8265; by default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a Ray on "
        "this machine.",
        show_default=False,
    ),
]
JobArgument = Annotated[str, typer.Argument(help="As `raygrpo submit` printed it.", show_default=False)]


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this name, from its newest checkpoint.")
    ] = False,
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="Run everything in this process, without Ray: breakpoints work, in reward functions too."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Also show what the worker processes print.")] = False,
) -> None:
    """Train a policy as CONFIG says, to the end.

    Ends with a summary: reward before and after, a picture of the reward curve, where the time went, the exported
    model, and the command that opens the run in the MLflow UI. Everything is written to output_dir/<name>-<time>.

    Example: raygrpo train pipelines/quickstart.yaml seed=1 max_staleness=1
    """
    import shlex
    import time

    from rich.console import Console

    from raygrpo.console import print_preset, show_progress
    from raygrpo.jobs.driver import current_job, require_lasting_paths
    from raygrpo.prepare import prepare
    from raygrpo.summary import print_summary

    start_s = time.monotonic()
    settings = _load(config, overrides)
    _or_exit(lambda: require_lasting_paths(settings))
    job = current_job()
    command = shlex.join(["raygrpo", "train", str(config), *(overrides or []), *["--local"] * local, "--resume"])
    command = (job and job.resume_command) or command
    prepared = _or_exit(lambda: prepare(settings, config.parent))
    screen = Console(stderr=True)
    print_preset(settings.algorithm, screen)
    try:
        with show_progress(settings, screen) as watcher:
            if local:
                from raygrpo.local import train_locally

                result = train_locally(prepared, watcher, resume=resume, resume_command=command)
            else:
                from raygrpo.train import train as train_on_ray

                result = train_on_ray(prepared, watcher, resume=resume, resume_command=command, verbose=verbose)
    except (RuntimeError, ValueError) as error:
        _fail(f"training failed: {error}")
    except KeyboardInterrupt:
        _fail(f"stopped; go on with: {command}")
    except Exception as error:
        if not _is_of_the_machine(error):
            raise
        _fail(f"training failed: {_in_a_line(error)}")
    seconds = time.monotonic() - start_s
    print_summary(
        Console(),
        result.history,
        result.links,
        name=settings.name,
        evaluations=result.evaluations,
        export_dir=result.export_dir,
        best_checkpoint=result.best_checkpoint,
        seconds=seconds,
    )


@app.command()
def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Validate CONFIG without starting anything: settings, data, rewards, and what a step will be made of.

    Shows the first prompts as the model will see them, tries the reward functions on a sample, and prints the batch
    algebra: prompts, groups, completions, tokens, micro-batches, updates, and the CPUs and GPUs asked for against those
    there.

    Example: raygrpo check pipelines/quickstart.yaml groups_per_step=32
    """
    from raygrpo.check import check as run

    settings = _load(config, overrides)
    if not _or_exit(lambda: run(settings, config.parent)):
        raise typer.Exit(1)


@app.command()
def evaluate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions for each prompt, instead of what CONFIG says.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many answers and completions of each set.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Of CPU kernels; by default all cores.")] = None,
) -> None:
    """Evaluate a model as the `eval` section of CONFIG says, as a run of CONFIG does; nothing is trained.

    Without that section: the mean reward on CONFIG's prompts, sampled as in training. Overrides name other prompts or
    another model, such as one that a run exported.

    Example: raygrpo evaluate my_run.yaml model.path=runs/my_run-latest/model
    """
    import os

    from raygrpo.evaluate import describe
    from raygrpo.evaluate import evaluate as run

    settings = _load(config, overrides)
    num_threads = threads or os.cpu_count() or 1
    sets = _or_exit(lambda: run(settings, config.parent, samples=samples, num_threads=num_threads))
    typer.echo(f"model {settings.model.path}")
    for evaluated in sets:
        typer.echo(describe(evaluated, show))


@app.command()
def sweep(
    config: ConfigArgument,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B...",
            help="Settings, some with several values (seed=0,1,2): every combination is trained. Commas inside "
            "[], {} and quotes do not count: data.args={a: 1, b: 2} has one value, key=[1,2],[3,4] has two.",
            show_default=False,
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest sweep of this name: finished runs are skipped.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Each run in one process, as with `raygrpo train`.")] = False,
) -> None:
    """Train every combination of some settings, one after another, and compare them.

    Each is a `raygrpo train` of its own; one that fails costs the others nothing. Their MLflow runs are nested under
    the sweep's, whose page has the table and the picture of all of them.

    Example: raygrpo sweep pipelines/quickstart.yaml seed=0,1,2 learner.optimizer.lr=1e-4,3e-4
    """
    import shlex

    from rich.console import Console

    from raygrpo.sweep import sweep as run

    options = ["--local"] * local
    command = shlex.join(["raygrpo", "sweep", str(config), *overrides, *options, "--resume"])
    try:
        complete = _or_exit(lambda: run(config, overrides, Console(), resume=resume, options=options, command=command))
    except KeyboardInterrupt:
        _fail(f"stopped; go on with: {command}")
    if not complete:
        _fail(f"some runs failed; try those again with: {command}")


@app.command()
def ui(
    config: Annotated[
        Path | None, typer.Argument(help="A run's YAML; without one, the store of ./runs.", show_default=False)
    ] = None,
    overrides: OverridesArgument = None,
    port: Annotated[int | None, typer.Option(help="Of this machine; by default any that is free.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser, where there is a screen.")] = True,
) -> None:
    """Open the MLflow UI on the store that CONFIG tracks to.

    A local store is served by this command until Ctrl-C; of a server, only the address is shown.

    Example: raygrpo ui pipelines/quickstart.yaml
    """
    from raygrpo.tracking.store import resolve_store, without_password
    from raygrpo.tracking.ui import is_server, open_browser, serve

    settings = _load(config, overrides) if config else None
    output_dir = settings.output_dir if settings else "runs"
    uri = _or_exit(lambda: resolve_store(settings.tracking.uri if settings else None, output_dir))
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        _fail(f"there is no MLflow store at {database} yet: train first, or name the YAML of a run")

    def show(address: str) -> None:
        typer.echo(f"MLflow shows {without_password(uri)} at {without_password(address)}")
        if browser:
            open_browser(address)

    if is_server(uri):
        show(uri)
        return
    typer.echo("starting MLflow; Ctrl-C ends it")
    try:
        serve(uri, port, show)
    except RuntimeError as error:
        _fail(str(error))


@app.command()
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this name, from its newest checkpoint.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end, or leave it.")] = True,
) -> None:
    """Run `raygrpo train CONFIG` as a job on a Ray cluster, and follow it.

    What git would commit of the project travels; data and models that git ignores do not, and are named by paths that
    the cluster's nodes read. Ctrl-C stops the job; twice leaves it to itself. A cluster with token authentication takes
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Example: raygrpo submit my_run.yaml --address http://HOST:8265 output_dir=/shared/runs seed=1
    """
    from raygrpo.jobs.client import RayJobs, plan

    submission = _or_exit(lambda: plan(config, overrides or [], address, resume=resume))
    jobs = _or_exit(lambda: RayJobs(address))
    job_id = _or_exit(lambda: jobs.submit(submission, lambda text: typer.echo(text, err=True)))
    typer.echo(f"job {job_id}: {jobs.page(job_id)}", err=True)
    if not wait:
        return
    try:
        _follow(jobs, job_id)
    finally:
        submission.remove_probe()


@app.command()
def status(job: JobArgument, address: AddressOption = None) -> None:
    """How a job stands, and the last line of its log.

    Example: raygrpo status raygrpo_0123456789ab --address http://HOST:8265
    """
    from raygrpo.jobs.client import RayJobs, describe

    jobs = _or_exit(lambda: RayJobs(address))
    typer.echo(_or_exit(lambda: describe(jobs, job)))


@app.command()
def logs(
    job: JobArgument,
    address: AddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on to the job's end; Ctrl-C leaves it running.")
    ] = False,
) -> None:
    """What a job has printed.

    Example: raygrpo logs raygrpo_0123456789ab --follow
    """
    from rich.console import Console

    from raygrpo.console import show_log
    from raygrpo.jobs.client import RayJobs

    jobs = _or_exit(lambda: RayJobs(address))
    if not follow:
        typer.echo(_or_exit(lambda: jobs.log(job)), nl=False)
        return
    _or_exit(lambda: jobs.info(job))
    with show_log(Console()) as show:
        _or_exit(lambda: jobs.follow(job, show))


@app.command()
def stop(job: JobArgument, address: AddressOption = None) -> None:
    """End a job, which can be resumed from its newest checkpoint.

    Example: raygrpo stop raygrpo_0123456789ab --address http://HOST:8265
    """
    from raygrpo.jobs.client import STOP_LIMIT_S, RayJobs

    jobs = _or_exit(lambda: RayJobs(address))
    if not _or_exit(lambda: jobs.stop(job)):
        typer.echo(f"job {job} had ended: {_or_exit(lambda: jobs.info(job)).status.value}")
        return
    info = _or_exit(lambda: jobs.wait_until_ended(job, STOP_LIMIT_S))
    if not info.status.is_terminal():
        _fail(f"job {job} was asked to stop and is still {info.status.value} after {STOP_LIMIT_S:g} s")
    typer.echo(f"job {job}: {info.status.value}")


@bench.command("shared-prefix")
def bench_shared_prefix(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Four points, in about a minute.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished points in this file, and leave out those it holds.")
    ] = None,
) -> None:
    """Time and memory of the shared-prefix forward and backward against encoding every prompt + completion.

    One thread, CPU time, interleaved in one process; every row also shows that the results are equal. The whole grid
    takes about half an hour of CPU time.

    Example: raygrpo bench shared-prefix --resume points.jsonl
    """
    from raygrpo.bench.shared_prefix import main as run

    run(json=json, quick=quick, resume=resume)


@bench.command("pipeline")
def bench_pipeline(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter points, in about two minutes.")] = False,
) -> None:
    """What the pipeline itself costs: groups per second through the stream, claims per second, and where the time goes.

    Generators answer at once and the learner learns nothing; controller, Ray Data and reward workers are the real ones.
    """
    from raygrpo.bench.pipeline import main as run

    run(json=json, quick=quick)


@bench.command("publish")
def bench_publish(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the model's weights.")] = 500,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    generators: Annotated[int, typer.Option(min=1, help="Generators that load each version.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Publishes, one after the other.")] = 5,
    weight_transfer: Annotated[
        Literal["object_store", "direct"], typer.Option(help="See generator.weight_transfer.")
    ] = "object_store",
) -> None:
    """Bytes and seconds of a publish, from packing the weights to the last generator's acknowledgement.

    A random model in real vLLM generators; after every publish their log-probabilities must be the model's.
    """
    from raygrpo.bench.publish import main as run

    _or_exit(
        lambda: run(
            json=json,
            megabytes=megabytes,
            dtype=dtype,
            num_generators=generators,
            rounds=rounds,
            weight_transfer=weight_transfer,
        )
    )


def _follow(jobs: RayJobs, job_id: str) -> None:
    """Show a submitted job's log until it has ended, and end with the job's own success. Ctrl-C stops the job."""
    from rich.console import Console

    from raygrpo.console import show_log
    from raygrpo.jobs.client import failure

    interrupted = False
    with show_log(Console()) as show:
        try:
            _or_exit(lambda: jobs.follow(job_id, show))
        except KeyboardInterrupt:
            interrupted = True
            show(f"stopping job {job_id}; Ctrl-C again leaves it to itself")
            try:
                _or_exit(lambda: jobs.stop(job_id))
                _or_exit(lambda: jobs.follow(job_id, show))
            except KeyboardInterrupt:
                show(f"left to itself; see `raygrpo status {job_id}`")
    info = _or_exit(lambda: jobs.info(job_id))
    typer.echo(f"job {job_id}: {info.status.value}", err=True)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if reason := failure(info):
        _fail(reason)
    if info.status != "SUCCEEDED":
        raise typer.Exit(1)


def _load(config: Path, overrides: list[str] | None) -> RunConfig:
    from raygrpo.config_file import load_config

    return _or_exit(lambda: load_config(config, overrides))


def _or_exit(action: Callable[[], Result]) -> Result:
    """The action's result; what a user got wrong becomes a message, without a traceback."""
    try:
        return action()
    except ValueError as error:
        _fail(str(error))


def _is_of_the_machine(error: Exception) -> bool:
    """Disks and networks, and what Ray says of its processes; anything else is ours and deserves its traceback."""
    from ray.exceptions import RayError

    return isinstance(error, OSError | RayError)


def _in_a_line(error: Exception) -> str:
    from raygrpo.launch import root_cause

    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {root_cause(error)}"


def _fail(message: str) -> NoReturn:
    typer.secho(f"raygrpo: {message}", fg="red", err=True)
    sys.exit(1)


def main() -> None:
    app()
