"""Commands that make a model ready for use: profile, calibrate, dial, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl_exit.cli.apps import app
from rl_exit.cli.common import Json, print_json, print_table, told

Target = Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder or a run directory.")]


@app.command(epilog="Example: `rl-exit profile runs/docstrings`")
@told
def profile(
    model: Target,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts per batch; may be given several times. Default: 1, 8, 32.")
    ] = None,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="The backbone in bfloat16.")] = False,
    as_json: Json = False,
) -> None:
    """Time each layer, exit and policy head on this machine; kept beside the model as costs.json."""
    from rl_exit.deployment import costs_of, model_folder
    from rl_exit.listings import costs_table
    from rl_exit.models.early_exit import EarlyExitModel
    from rl_exit.progress import Terminal

    folder = model_folder(model)
    loaded = EarlyExitModel.from_pretrained(folder)
    if bfloat16:
        loaded.lighten()
    costs = costs_of(loaded, folder, Terminal(), batch_size or (), again=True)
    if as_json:
        print_json(costs.to_dict())
    else:
        print_table(costs_table(costs))


@app.command(
    epilog="Example: `rl-exit calibrate runs/docstrings --speedup 2` · then "
    "`rl-exit predict runs/docstrings --text 'Return a copy.' --point fast`"
)
@told
def calibrate(
    model: Target,
    speedup: Annotated[float | None, typer.Option(help="So many times as fast as full depth.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Points of accuracy that may be lost, e.g. 1.0.")] = None,
    confidence: Annotated[float, typer.Option(help="With which the bound on the loss holds.")] = 0.95,
    data: Annotated[
        Path | None, typer.Option(help="File of texts (and labels) of the same task; default: dev of its training.")
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="Criterion to choose from, several times or 'all'; default: the policy."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the operating point; default: fast, or safe.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that will run together.")] = 32,
    as_json: Json = False,
) -> None:
    """Choose a threshold for a speed, or for a loss that is guaranteed; saved with the model by name."""
    from rl_exit.deployment import calibrate as choose
    from rl_exit.progress import Terminal

    point = choose(
        model,
        Terminal(),
        speedup=speedup,
        max_loss=max_loss,
        confidence=confidence,
        data=data,
        words=criterion or (),
        name=name,
        batch_size=batch_size,
    )
    if as_json:
        print_json(point)
        return
    params = ", ".join(f"{key} {value:.4g}" for key, value in point["params"].items())
    typer.echo(f"{point['name']}: {point['criterion']} ({params}), chosen on {point['texts']} texts of {point['data']}")
    lost = "" if point["loss"] is None else f", {100 * point['loss']:+.2f} points lost on these texts"
    fast = f"expected {point['speedup']:.2f} times as fast at batch size {point['batch_size']}"
    typer.echo(f"{fast}, {100 * point['saved_layers']:.0f} % of layers saved{lost}")
    promise = point["guarantee"]
    if promise is not None:
        typer.echo(
            f"guaranteed with confidence {promise['confidence']:g}: at most {100 * promise['max_loss']:g} points of "
            f"accuracy lost on new texts drawn as these {promise['texts']} were"
        )
    typer.echo(f'use: model.predict(texts, operating_point="{point["name"]}")')


@app.command(epilog="Example: `rl-exit prune runs/docstrings pruned-3 --depth 3`")
@told
def prune(
    model: Target,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the copy.")],
    depth: Annotated[int, typer.Option(help="Layers to keep, 2 or more.")],
) -> None:
    """Copy a model without the layers above a depth (static layer pruning); it answers as exit DEPTH does."""
    from rl_exit.deployment import model_folder, prune_model

    before, after = prune_model(model_folder(model), out, depth)
    typer.echo(f"{out}: {depth} layers, {after / 1e6:.1f} of {before / 1e6:.1f} million weights")


@app.command(
    epilog="Example: `rl-exit dial runs/docstrings` · then "
    "`rl-exit predict runs/docstrings --text 'Return a copy.' --speed 0.5`"
)
@told
def dial(
    model: Target,
    data: Annotated[
        Path | None, typer.Option(help="Labelled texts that the exits were not trained on; default: the run's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Train one policy for every price of a layer, so that --speed moves along the curve; saved with the model."""
    from rl_exit.deployment import make_dial
    from rl_exit.listings import dial_table
    from rl_exit.progress import Terminal

    found = make_dial(model, Terminal(), data, seed=seed)
    if as_json:
        print_json(found)
    else:
        print_table(dial_table(found))
