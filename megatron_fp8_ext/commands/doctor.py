"""`megatron-fp8 doctor`: this machine, or every node of a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from megatron_fp8_ext.doctor import Finding


def doctor(
    slime: Annotated[bool, typer.Option("--slime", help="also what slime needs")] = False,
    hf_checkpoint: Annotated[Path | None, typer.Option(help="served model, for --slime")] = None,
    engine_gpus: Annotated[int, typer.Option(help="GPUs of a rollout engine; 0: none here")] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="of training")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs that must be on a node")] = 0,
    every_node: Annotated[
        bool, typer.Option("--every-node", help="on each node of the running Ray cluster with GPUs")
    ] = False,
    cluster_gpus: Annotated[int, typer.Option(help="for --every-node: GPUs needed in all")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """What is installed, which seams apply, what conflicts, and how to mend it (exit 1 if broken)."""
    if every_node:
        from megatron_fp8_ext.launch import ray_nodes

        words = ["--gpus", str(gpus)]
        if slime:
            words += ["--slime", "--engine-gpus", str(engine_gpus)]
            words += ["--tensor-parallel", str(tensor_parallel)]
        if hf_checkpoint is not None:
            words += ["--hf-checkpoint", str(hf_checkpoint)]
        raise typer.Exit(ray_nodes.report(words, cluster_gpus))
    from megatron_fp8_ext import doctor as checks

    findings = checks.examine(gpus)
    if slime:
        from megatron_fp8_ext.slime_plugin.examine import examine

        rows = examine(hf_checkpoint, engine_gpus, tensor_parallel)
        findings += [checks.Finding(*row) for row in rows]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        _print(findings)
    raise typer.Exit(any(finding.level == "fail" for finding in findings))


def _print(findings: Sequence[Finding]) -> None:
    from megatron_fp8_ext.megatron_plugin.patches import PATCHES

    out = Console()
    folded = (Column(name, overflow="fold") for name in ("what", "found", "mend"))
    table = Table("", *folded, box=None)
    style = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]FAIL[/]"}
    for finding in findings:
        table.add_row(style[finding.level], finding.subject, finding.found, finding.mend)
    out.print(table)
    place = Column("seam", overflow="fold", ratio=3)
    columns = (Column(name, ratio=share) for name, share in (("why", 3), ("delete when", 2)))
    seams = Table(place, Column("applies", ratio=1), *columns, box=None, title="Seams in Megatron")
    for patch in PATCHES:
        symbol = f"{patch.module.removeprefix('megatron.')}: {patch.symbol}"
        seams.add_row(symbol, f"{patch.when}, {patch.versions}", patch.reason, patch.delete_when)
    out.print(seams)
