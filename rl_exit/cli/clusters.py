"""Commands for a cluster: submit, jobs, runs, manifest."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_exit.cli.apps import app, jobs_app
from rl_exit.cli.common import INTERRUPTED, Json, Words, fail, print_json, print_table, split_words, told

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Dashboard of the head, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, then RAY_ADDRESS.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of the job (rl-exit jobs list).")]
MB = 1_000_000


@app.command(epilog="Example: `rl-exit submit configs/default.yaml storage_path=s3://bucket/runs --dry-run`")
@told
def submit(
    words: Words = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, send nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Then show its log until it is over.")] = False,
    code: Annotated[
        str, typer.Option("--code", metavar="tree|installed|WHEEL", help="Code that the job runs; default: this one.")
    ] = "tree",
    working_dir: Annotated[
        Path | None, typer.Option("--working-dir", help="Folder of files of your own, e.g. an algorithm, to go along.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Pattern of names to leave out.")] = None,
    max_upload: Annotated[int, typer.Option("--max-upload", metavar="MB", help="Most that is sent.")] = 100,
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", metavar="FILE", help="YAML with pip, env_vars, image_uri, ...")
    ] = None,
    env: Annotated[list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Variable of the job.")] = None,
    num_cpus: Annotated[
        float | None,
        typer.Option("--num-cpus", min=0, help="CPUs of the run's own process; default: none, on the head."),
    ] = None,
    num_gpus: Annotated[float | None, typer.Option("--num-gpus", min=0, help="GPUs of the run's own process.")] = None,
    memory: Annotated[int | None, typer.Option("--memory", metavar="MB", min=1, help="Memory of it.")] = None,
    resource: Annotated[
        list[str] | None, typer.Option("--resource", metavar="NAME=AMOUNT", help="Custom resource of it.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Kept with the job.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="The cluster's Python.")] = "python",
    any_version: Annotated[
        bool, typer.Option("--any-version", help="Send although the cluster has another Ray or Python.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a run to a Ray cluster as a job; the same configuration as for train."""
    from rl_exit.cluster.address import ENV_KEYS, find_target
    from rl_exit.cluster.runtime_env import build_runtime_env
    from rl_exit.cluster.submit import EntryPoint, parse_metadata, parse_resources, plan_submission, send
    from rl_exit.config import load_config
    from rl_exit.trainers.rllib.registry import check_algorithm

    config = load_config(*split_words(words))
    check_algorithm(config.algorithm)
    plan = plan_submission(
        config,
        runtime_env=build_runtime_env(runtime_env, env or []),
        entry_point=EntryPoint(num_cpus, num_gpus, memory and memory * MB, parse_resources(resource)),
        metadata=parse_metadata(metadata),
        code=code,
        working_dir=working_dir,
        excludes=tuple(exclude or ()),
        max_upload=max_upload * MB,
        python=python,
    )
    if dry_run:
        named = address or any(os.environ.get(key) for key in ENV_KEYS)
        print_json(plan.shown(find_target(address).url if named else "(none given)"))
        return
    target = find_target(address)
    name = send(plan, target, any_version=any_version)
    if follow:
        typer.echo(f"submitted {name}", err=True)
        _follow(target, name)
    elif as_json:
        print_json({"submission_id": name, **plan.metadata})
    else:
        typer.echo(
            f"submitted {name} ({plan.package.size / MB:.1f} MB of files, {plan.package.digest()})\n"
            f"log:   rl-exit jobs logs -f {name}\nstate: rl-exit jobs status {name}\nstop:  rl-exit jobs stop {name}"
        )


@jobs_app.command("list", epilog="Example: `rl-exit jobs list --address http://127.0.0.1:8265`")
@told
def jobs_list(
    address: Address = None,
    everything: Annotated[bool, typer.Option("--all", help="Also jobs that are no runs of rl-exit.")] = False,
    as_json: Json = False,
) -> None:
    """Jobs of a cluster, the newest first."""
    from rl_exit.cluster.address import find_target
    from rl_exit.cluster.jobs import Jobs
    from rl_exit.cluster.tables import jobs_table

    found = Jobs(find_target(address)).list(everything)
    if as_json:
        print_json([job.to_dict() for job in found])
    elif not found:
        typer.echo("no jobs")
    else:
        print_table(jobs_table(found))


@jobs_app.command("status", epilog="Example: `rl-exit jobs status docstrings-20261125-213626-2139`")
@told
def jobs_status(job: JobName, address: Address = None, as_json: Json = False) -> None:
    """State of a job."""
    from rl_exit.cluster.address import find_target
    from rl_exit.cluster.jobs import Jobs

    found = Jobs(find_target(address)).get(job)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found)


@jobs_app.command("logs", epilog="Example: `rl-exit jobs logs -f docstrings-20261125-213626-2139`")
@told
def jobs_logs(
    job: JobName,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """What a job has printed; with -f the command ends with it, with code 2 if it fails."""
    from rl_exit.cluster.address import find_target
    from rl_exit.cluster.jobs import Jobs, plain

    target = find_target(address)
    if follow:
        _follow(target, job)
    else:
        sys.stdout.write(plain(Jobs(target).logs(job)))


@jobs_app.command("stop", epilog="Example: `rl-exit jobs stop docstrings-20261125-213626-2139`")
@told
def jobs_stop(job: JobName, address: Address = None, as_json: Json = False) -> None:
    """Stop a job; submitting the same run again goes on where it was."""
    from rl_exit.cluster.address import find_target
    from rl_exit.cluster.jobs import Jobs

    jobs = Jobs(find_target(address))
    before = jobs.get(job)
    found = before if before.is_over else jobs.stop(job)
    if as_json:
        print_json(found.to_dict())
    elif before.is_over:
        typer.echo(f"{job}: was over already ({before.state})")
    else:
        typer.echo(f"{job}: {found.state}")


def _follow(target: Any, name: str) -> None:
    from rl_exit.cluster.jobs import Jobs, plain

    jobs = Jobs(target)
    try:
        for part in jobs.follow(name):
            sys.stdout.write(plain(part))
            sys.stdout.flush()
        found = jobs.get(name)
        until = time.monotonic() + 10.0
        while not found.is_over and time.monotonic() < until:
            time.sleep(0.2)
            found = jobs.get(name)
    except KeyboardInterrupt:
        typer.echo(f"no longer followed; the job goes on. Stop it: rl-exit jobs stop {name}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if found.state != "SUCCEEDED":
        fail(f"job {name}: {found.state}{': ' + found.message if found.message else ''}")
    typer.echo(f"{name}: {found.state}", err=True)


def _show(job: Any) -> None:
    from rl_exit.progress import clock

    typer.echo(f"{job.name}: {job.state}" + (f" after {clock(job.seconds)}" if job.seconds is not None else ""))
    for label, value in (("run", job.run), ("place", job.place), ("message", job.message)):
        if value:
            typer.echo(f"{label}: {value}")


@app.command(epilog="Example: `rl-exit runs --storage s3://bucket/runs --address http://127.0.0.1:8265`")
@told
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder of run directories.")] = Path("runs"),
    storage: Annotated[
        list[str] | None, typer.Option("--storage", metavar="URL", help="Also the runs kept there (storage_path).")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Runs here, in a storage and on a cluster, with state and result."""
    from dataclasses import asdict

    from rl_exit.cluster.address import ENV_KEYS, find_target
    from rl_exit.cluster.jobs import Jobs
    from rl_exit.cluster.runs import local_runs, stored_runs, with_jobs
    from rl_exit.cluster.tables import runs_table
    from rl_exit.errors import UserError

    found = list(local_runs(folder))
    for url in storage or []:
        found += stored_runs(url)
    if address or any(os.environ.get(key) for key in ENV_KEYS):
        try:
            target = find_target(address)
            found = with_jobs(found, Jobs(target).list(), target.url)
        except UserError as error:
            if address:
                raise
            typer.echo(f"without the jobs of the cluster: {error}", err=True)
    if as_json:
        print_json([asdict(run) for run in found])
    elif not found:
        typer.echo(f"no runs in {folder}")
    else:
        print_table(runs_table(found))


@app.command(epilog="Example: `rl-exit manifest rayjob configs/default.yaml storage_path=s3://bucket/runs`")
@told
def manifest(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="rayjob, raycluster, ray-up, slurm or dockerfile.")],
    words: Words = None,
    image: Annotated[str, typer.Option("--image", help="Container image with rl-exit; default: rl-exit:VERSION.")] = "",
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Worker nodes; default: as the run's actors need.")
    ] = None,
    worker_cpus: Annotated[int, typer.Option("--worker-cpus", min=1, help="CPUs of a worker node.")] = 4,
    worker_memory: Annotated[int, typer.Option("--worker-memory", metavar="GIB", min=1, help="Its memory.")] = 16,
    worker_gpus: Annotated[
        int | None, typer.Option("--worker-gpus", min=0, help="Its GPUs; default: 1 where the run uses any.")
    ] = None,
    head_cpus: Annotated[int, typer.Option("--head-cpus", min=1, help="CPUs of the head node.")] = 4,
    head_memory: Annotated[int, typer.Option("--head-memory", metavar="GIB", min=1, help="Its memory.")] = 16,
    claim: Annotated[
        str | None, typer.Option("--claim", help="Kubernetes volume claim to be mounted at storage_path.")
    ] = None,
    hosts: Annotated[str, typer.Option("--hosts", metavar="H1,H2", help="ray-up: own machines, the head first.")] = "",
    ssh_user: Annotated[str, typer.Option("--ssh-user", help="ray-up: user on the machines.")] = "ubuntu",
    region: Annotated[str, typer.Option("--region", help="ray-up: AWS region.")] = "us-west-2",
    head_instance: Annotated[str, typer.Option("--head-instance", help="ray-up: AWS type of the head.")] = "m6i.xlarge",
    worker_instance: Annotated[
        str, typer.Option("--worker-instance", help="ray-up: AWS type of a worker.")
    ] = "m6i.xlarge",
    partition: Annotated[str | None, typer.Option("--partition", help="slurm: partition.")] = None,
    time_limit: Annotated[str, typer.Option("--time", help="slurm: time limit.")] = "24:00:00",
    output: Annotated[Path | None, typer.Option("--output", help="File to write; default: print it.")] = None,
) -> None:
    """Write a KubeRay, ray up, Slurm or Docker file for a run."""
    from rl_exit.cluster.manifest import Machines, render
    from rl_exit.config import load_config
    from rl_exit.files import write_text

    machines = Machines(
        image=image,
        workers=workers,
        worker_cpus=worker_cpus,
        worker_memory=worker_memory,
        worker_gpus=worker_gpus,
        head_cpus=head_cpus,
        head_memory=head_memory,
        claim=claim,
        hosts=tuple(host for host in hosts.split(",") if host),
        ssh_user=ssh_user,
        region=region,
        head_instance=head_instance,
        worker_instance=worker_instance,
        partition=partition,
        time=time_limit,
    )
    text = render(kind, load_config(*split_words(words)), machines)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
        typer.echo(str(output))
