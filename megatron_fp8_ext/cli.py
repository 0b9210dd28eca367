"""Console script `megatron-fp8`. Help, `list`, `show` and `expand` import neither torch nor Megatron."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from megatron_fp8_ext import __version__, presets, registry
from megatron_fp8_ext.commands import bench, compare, convert, data, demo, evaluate, rl, schedule
from megatron_fp8_ext.commands import doctor as doctor_command
from megatron_fp8_ext.commands import run as run_command
from megatron_fp8_ext.commands import watch as watch_command
from megatron_fp8_ext.errors import UserError, unknown_name

app = typer.Typer(
    help="FP8 training for Megatron-LM: add --fp8-recipe infir2 to the command you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.command(context_settings=compare.CONTEXT)(compare.compare)
app.command("report")(compare.report_)
app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
    run_command.run
)
app.command()(watch_command.watch)
app.command()(doctor_command.doctor)
app.add_typer(rl.app, name="rl")
app.add_typer(schedule.app, name="schedule")
app.add_typer(evaluate.app, name="eval")
app.add_typer(demo.app, name="demo")
app.add_typer(convert.app, name="convert")
_out = Console()


@app.command("list")
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="preset, recipe, schedule, loss or packer")
    ] = None,
) -> None:
    """Presets, and the recipes, schedules, losses and packers found through entry points."""
    kinds = ("preset", *registry.GROUPS)
    if kind is not None:
        plurals = {"losses": "loss", **{f"{name}s": name for name in kinds}}
        kind = plurals.get(kind, kind)
        if kind not in kinds:
            raise unknown_name("kind", kind, kinds)
    first = [] if kind else ["kind"]
    table = Table(*first, Column("name", no_wrap=True), "what it is", box=None)
    for each in [kind] if kind else kinds:
        first = [] if kind else [each]
        if each == "preset":
            for name in presets.names():
                table.add_row(*first, name, presets.get(name).summary)
            continue
        for provider in registry.providers(each):
            found = provider.load()
            what = getattr(found, "summary", None) or (found.__doc__ or "").split("\n")[0]
            ours = provider.distribution == "megatron-fp8-ext"
            table.add_row(
                *first, provider.name, what if ours else f"{what} ({provider.distribution})"
            )
    _out.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a recipe or a preset: infir2, qwen2.5-7b-cpt")],
) -> None:
    """Everything a recipe or a preset says, and the Megatron flags it becomes."""
    if name in presets.names() or name.endswith((".yaml", ".yml")):
        run_command.show_preset(name)
        return
    if name not in registry.names("recipe"):
        raise unknown_name("recipe or preset", name, (*registry.names("recipe"), *presets.names()))
    from megatron_fp8_ext.megatron_plugin import flags
    from megatron_fp8_ext.recipe import get_recipe

    recipe = get_recipe(name)
    table = Table(box=None, show_header=False)
    table.add_row("recipe", recipe.name)
    table.add_row("what", recipe.summary)
    for operand in ("input", "weight", "grad_output"):
        table.add_row(operand, str(getattr(recipe, operand) or "bf16"))
    if recipe.is_fp8:
        table.add_row("scales", recipe.scale_format)
        table.add_row("GEMMs in FP8", "fprop, dgrad, wgrad (FP32 accumulation)")
        table.add_row("weights", "kept in FP8" if recipe.param_gather else "kept in BF16")
    table.add_row("optimizer", "FP32 main weights and moments")
    table.add_row("in BF16", ", ".join(recipe.high_precision))
    table.add_row("source", recipe.source)
    for variable, value in recipe.environment.items():
        table.add_row("environment", f"{variable}={value}")
    command = ["--bf16", "--use-distributed-optimizer", "--save", "DIR"]
    facts = flags.Facts(options=frozenset({flags.RESHARDABLE}))
    emulated = [flags.EMULATE] if recipe.control else []
    native = flags.expand([*command, *emulated, flags.RECIPE, name], facts).argv[len(command) :]
    table.add_row("Megatron flags", " ".join(native) or "none")
    _out.print(table)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def expand(context: typer.Context) -> None:
    """Print what Megatron will be given for FLAGS (after `--`): the dry run.

    Assumes a Hopper GPU with TransformerEngine; reads the checkpoint that the run would load.
    """
    from megatron_fp8_ext.megatron_plugin import command, flags

    found = command.read([token for token in context.args if token != "--"])
    facts = flags.Facts(
        options=frozenset({flags.RESHARDABLE}), environ=os.environ, checkpoint=found.layout
    )
    result = flags.expand(found.scheduled.argv, facts)
    for note in (*found.notes, *result.notes):
        print(f"# {note}")
    for name, value in result.env.items():
        print(f"export {name}={value}")
    print(" ".join(result.argv))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a UserError is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"megatron-fp8: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
