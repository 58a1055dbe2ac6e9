"""The command that writes: generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_exit.cli.apps import app
from rl_exit.cli.common import Json, Params, Rule, print_json, read_lines, told
from rl_exit.errors import UserError


@app.command(epilog='Example: `rl-exit generate runs/documentation/model --prompt "Once upon a time"`')
@told
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A decoder's folder, a run directory or a hub id.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="One prompt a line, blank lines left out ('-': standard input).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 100,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; default: take the likeliest.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Below 1 sharpens what is drawn from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest with this probability together.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text ends before this string.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Leave where pi is above it; 1: full depth; default: the model's.")
    ] = None,
    criterion: Rule = None,
    param: Params = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Draft with exits, verify at full depth: the text of full depth.")
    ] = False,
    draft_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens drafted before each verification.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    stream: Annotated[bool, typer.Option("--stream", help="Show each text as it is written, one prompt at a time.")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Write text; each token leaves at its own layer."""
    if (prompt is None) == (file is None):
        raise UserError("give either --prompt or --file")
    if stream and as_json:
        raise UserError("--stream shows text as it comes, --json whole results; give one of them")
    drawing = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
    idle = [name for name, value in drawing.items() if value is not None and not sample]
    if idle:
        raise UserError(f"{', '.join(idle)}: for tokens that are drawn; add --sample")
    prompts = prompt if file is None else read_lines(file)
    assert prompts is not None
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed if sample else None,
        "stop_strings": stop or None,
        "lossless": lossless,
        "draft_tokens": draft_tokens,
    }
    from rl_exit.generation.command import Writer

    writer = Writer(model, threshold, criterion, param or [], options)
    if stream:
        for one in prompts:
            _show_stream(writer, one)
        return
    found = writer.write(prompts, batch_size)
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    for made in found:
        typer.echo(f"{made.prompt}{made.text}")
        typer.echo(_figures(made, writer.model.num_layers), err=True)


def _show_stream(writer: Any, prompt: str) -> None:
    typer.echo(prompt, nl=False)
    for piece in writer.stream(prompt):
        if isinstance(piece, str):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        else:
            typer.echo()
            typer.echo(_figures(piece, writer.model.num_layers), err=True)


def _figures(made: Any, num_layers: int) -> str:
    ends = {"eos": "ended by itself", "stop": "at a stop string", "length": "at its length"}[made.finish]
    return f"[{len(made.tokens)} tokens, mean exit layer {made.mean_exit_layer:.2f} of {num_layers}, {ends}]"
