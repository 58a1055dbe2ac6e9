"""The command serve."""

from __future__ import annotations

from typing import Annotated

import typer

from rl_exit.cli.apps import app
from rl_exit.cli.common import told


@app.command(epilog="Example: `rl-exit serve runs/docstrings/model --port 8000` · then open http://127.0.0.1:8000")
@told
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a run directory or a hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes with a copy of the model.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of each replica.")] = 1,
    batching: Annotated[
        str, typer.Option(help="pooled: texts at the same layer run together; plain: serve.batch, for comparison.")
    ] = "pooled",
    batch_size: Annotated[int, typer.Option(min=1, help="Most texts that run together; usually 8 to 64.")] = 32,
    max_context: Annotated[
        int,
        typer.Option(min=2, help="Decoder: tokens of a prompt and what follows; sets the cache's memory."),
    ] = 2048,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0, help="How long a text may wait for others; by default 0, plain: 25.")
    ] = None,
    goal_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Answer as many requests as possible within this, the others when there is time."),
    ] = None,
    lines: Annotated[
        bool,
        typer.Option(
            help="Classifier: requests straight to the process of a model; otherwise each by a call of Ray's."
        ),
    ] = True,
    max_chars: Annotated[int, typer.Option(min=1, help="Characters of a text.")] = 20_000,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts of a request.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1_000_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Texts inside at once; more are refused (503).")] = 4096,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up (504).")] = 60.0,
) -> None:
    """Serve a model over HTTP: labels of texts, or a decoder's text token by token. Ctrl-C ends it."""
    from rl_exit.cluster.serving import ServeOptions, serve_model
    from rl_exit.serving.schema import Limits

    options = ServeOptions(
        model=model,
        host=host,
        port=port,
        replicas=replicas,
        threads=threads,
        batching=batching,  # type: ignore[arg-type]  # checked there
        batch_size=batch_size,
        deadline=None if deadline_ms is None else deadline_ms / 1000,
        goal=None if goal_ms is None else goal_ms / 1000,
        lines=lines,
        max_context=max_context,
        limits=Limits(max_chars, max_texts, max_body, max_waiting, timeout),
    )
    left = serve_model(options, lambda address: typer.echo(f"serving {model} at {address} (Ctrl-C ends)"))
    typer.echo(f"ended; {left or 'no'} open requests were left unanswered")
