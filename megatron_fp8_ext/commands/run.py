"""`megatron-fp8 run` and the preset half of `list` and `show`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from megatron_fp8_ext import presets
from megatron_fp8_ext.errors import UserError, unknown_name
from megatron_fp8_ext.launch import checks, plan, reference, render, request, start


def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a preset, or a YAML file that extends one")],
    data: Annotated[
        str | None, typer.Option(help="CPT: prefixes of --data-path; SFT and RL: samples")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="model folder: config.json and tokenizer")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Megatron checkpoint to start from")] = None,
    after: Annotated[
        str | None, typer.Option(help="go on from this run: its output folder")
    ] = None,
    output: Annotated[str | None, typer.Option(help="folder of the run (exp/EXPERIMENT)")] = None,
    eval_data: Annotated[str | None, typer.Option(help="RL: evaluation prompts")] = None,
    launcher: Annotated[
        str | None, typer.Option(help="torchrun (Megatron), ray (slime) or slurm")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="number of nodes")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each node")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings, under --set")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print everything, start nothing")
    ] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="CPT: random weights")
    ] = False,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="torchrun: HOST:PORT where nodes meet")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="running cluster, http://HEAD:8265")
    ] = None,
    megatron: Annotated[str | None, typer.Option(help="Megatron-LM checkout to run")] = None,
    slime: Annotated[str | None, typer.Option(help="slime checkout (SFT, RL)")] = None,
    time: Annotated[int, typer.Option(help="Slurm: minutes of one job")] = 24 * 60,
    partition: Annotated[str | None, typer.Option(help="Slurm partition")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account")] = None,
    container: Annotated[str | None, typer.Option(help="Slurm: container image (pyxis)")] = None,
    as_script: Annotated[
        bool,
        typer.Option("--as-script", help="take the reference scripts' arguments and variables"),
    ] = False,
) -> None:
    """Run a preset; MORE MEGATRON FLAGS go after `--`. Prints the command before it starts."""
    extra = tuple(token for token in context.args if token != "--")
    inputs = {"data": data, "model": model, "init": init, "output": output, "eval-data": eval_data}
    given = {key: value for key, value in inputs.items() if value}
    if launcher is not None and launcher not in request.LAUNCHERS:
        raise unknown_name("launcher", launcher, request.LAUNCHERS)
    asked = request.Request(
        preset=presets.get(name),
        launcher=launcher,
        rdzv_endpoint=rdzv_endpoint, ray_address=ray_address, megatron=megatron, slime=slime,
        from_scratch=from_scratch,
        slurm=request.SlurmOptions(
            minutes=time, partition=partition, account=account, container=container
        ),
    )  # fmt: skip
    if config is not None:
        asked = request.with_config(asked, config)
    asked = dataclasses.replace(asked, inputs={**asked.inputs, **given})
    counts = {"nodes": nodes, "gpus-per-node": gpus}
    asked = request.with_set(
        asked, [*(f"{k}={v}" for k, v in counts.items() if v is not None), *(set_ or ())]
    )
    notes: tuple[str, ...] = ()
    if as_script:
        translated = reference.translate(asked, extra, os.environ)
        asked, notes = translated.request, translated.notes
    else:
        _no_misplaced(context, extra)
        asked = dataclasses.replace(asked, extra=extra)
    if after is not None:
        asked = _after(asked, after)
    _execute(asked, notes, dry_run)


def _no_misplaced(context: typer.Context, extra: tuple[str, ...]) -> None:
    """An option of ours that is misspelt must not reach Megatron: its flags stand after `--`."""
    argv = sys.argv[1:]
    before = argv[: argv.index("--")] if "--" in argv else argv
    wrong = next((t for t in before if t.startswith("-") and t in extra), None)
    if wrong is not None:
        options = [o for p in context.command.params for o in p.opts if o.startswith("--")]
        hint = str(unknown_name("option", wrong, options)).split(" known: ")[0].rstrip(": ")
        raise UserError(f"{hint} (Megatron's own flags go after `--`)")


def _after(asked: request.Request, folder: str) -> request.Request:
    """Take over the checkpoints and the model of an earlier stage."""
    before = start.read_record(folder)
    stages = presets.STAGES
    if before["stage"] in stages and stages.index(before["stage"]) > stages.index(
        asked.preset.stage
    ):
        raise UserError(
            f"--after {folder}: {asked.preset.stage} does not come after {before['stage']} "
            f"({before.get('preset')})"
        )
    inputs = {"init": str(before["save"])}
    # RL serves from an FP8 export of the model, so its --model is another folder.
    if before.get("model") and (asked.preset.stage != "rl" or before["stage"] == "rl"):
        inputs["model"] = str(before["model"])
    return dataclasses.replace(asked, inputs={**inputs, **asked.inputs})


def _execute(asked: request.Request, notes: tuple[str, ...], dry_run: bool) -> None:
    planned = plan.build(asked, start.facts(asked))
    found = checks.problems(planned)
    launched = render.launch(planned)
    print(f"# {asked.preset.name}: {asked.preset.summary}")
    print(f"# {planned.nodes} x {planned.gpus} GPUs, output {planned.output}")
    for line in (*notes, *planned.notes):
        print(f"# note: {line}")
    print(render.shell(launched, planned.facts.secrets), flush=True)
    if dry_run:
        for line in found:  # last, where they are seen
            print(f"# problem: {line}")
        return
    if found:
        for line in found:
            print(f"megatron-fp8: problem: {line}", file=sys.stderr)
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise UserError(f"{asked.preset.name} cannot start: mend the {count} named above")
    print(f"# in sight: megatron-fp8 watch {shlex.quote(planned.output)}", flush=True)
    raise typer.Exit(start.start(planned, launched))


def show_preset(name: str) -> None:
    """Print every setting of a preset with its origin, a line each, whole on any terminal."""
    preset = presets.get(name)
    print(f"{preset.name}: {preset.summary}")
    print(f"source: {preset.source}; {preset.script or 'derived'}")
    titles = {
        "run": "run", "settings": "flags", "slime": "flags for slime", "megatron": "flags for Megatron",
        "environment": "environment",
    }  # fmt: skip
    for section, title in titles.items():
        _section(title, preset.sections[section])
    planned = plan.build(request.Request(preset=preset), plan.Facts())
    derived = {key: s for key, s in planned.settings.items() if s.note == "config.json"}
    _section(
        "flags from config.json", {k: dataclasses.replace(s, note="") for k, s in derived.items()}
    )
    print("\nleft out, and why")
    for key, why in preset.dropped.items():
        print(f"  {key}")
        print(_indented(why))


def _section(title: str, rows: Mapping[str, presets.Setting]) -> None:
    if not rows:
        return
    print(f"\n{title}")
    for key, setting in rows.items():
        only = f" (with --{setting.when})" if setting.when is not None else ""
        print(f"  {key} = {setting.value}  [{setting.origin}]{only}")
        if setting.note:
            print(_indented(setting.note))


def _indented(text: str) -> str:
    indent = " " * 6
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
