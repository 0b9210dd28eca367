"""Every preset's flags are accepted by the parsers that will read them.

megatron-core 0.17 to 0.19 by their real parser; core_v0.14.0 and slime at two commits (2025-10-15, the
reference's, and 2026-08-21) from recorded lists of their flags.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, megatron_wheel, run
from test_parsers import recorded_parser

from megatron_fp8_ext import presets
from megatron_fp8_ext.launch import plan, request
from megatron_fp8_ext.megatron_plugin import flags

pytestmark = pytest.mark.megatron
HERE = Path(__file__).parent
MEGATRON = [name for name in presets.names() if "-cpt" in name]
SLIME = [name for name in presets.names() if "-cpt" not in name]
PARSE = """
import json, sys
import megatron_fp8_ext
from megatron_fp8_ext.megatron_plugin import checks, compat
compat.process_fp8_gap = lambda: (True, None)  # as on a Hopper GPU: parsing needs none
checks.corpus_exists = lambda args: None
megatron_fp8_ext.install()
from megatron.training.arguments import parse_args
commands = json.loads(sys.argv[1])
for name, argv in commands.items():
    sys.argv = ["pretrain_gpt.py", *argv]
    args = parse_args()
    print("PARSED", name, args.fp8, args.padded_vocab_size, args.lr, args.train_iters)
"""


def command(name: str) -> list[str]:
    inputs = {"data": "DATA", "model": "MODEL", "init": "STABLE/iter_0035000", "eval-data": "EVAL"}
    found = plan.build(request.Request(preset=presets.get(name), inputs=inputs), plan.Facts())
    return list(found.argv)


@pytest.mark.parametrize("version", ["0.17.0", "0.18.0", "0.19.2"])
def test_wheels_parse_every_preset(version, tmp_path):
    commands = {name: command(name) for name in MEGATRON}
    (tmp_path / "STABLE" / "iter_0035000").mkdir(parents=True)
    for argv in commands.values():
        argv[argv.index("--load") + 1] = str(tmp_path / "STABLE")
    path = megatron_wheel(version)
    outcome = run(
        [sys.executable, "-W", "ignore", "-c", PARSE, json.dumps(commands)],
        PYTHONPATH=f"{path}:{ROOT}",
    )
    assert outcome.code == 0, outcome.output[-3000:]
    parsed = [line.split()[1:] for line in outcome.output.splitlines() if line.startswith("PARSED")]
    assert [row[0] for row in parsed] == MEGATRON
    for name, fp8, vocabulary, lr, iterations in parsed:
        assert fp8 == ("None" if name.endswith("-bf16") else "e4m3")
        assert vocabulary == ("151936" if "1.5b" in name else "152064")
        assert (lr, iterations) == ("0.0001", "40000")


@pytest.mark.parametrize("name", MEGATRON)
def test_core_v0_14_parses_every_preset(name):
    parser = recorded_parser()
    facts = flags.Facts(options=frozenset(parser._option_string_actions))
    parsed = parser.parse_args(list(flags.expand(command(name), facts).argv))
    assert parsed.lr == 1e-4 and parsed.lr_wsd_decay_iters == 5000
    assert parsed.fp8_param_gather is not name.endswith("-bf16")


@pytest.mark.parametrize("name", SLIME)
@pytest.mark.parametrize("commit", ["8359c9a", "624b824"])
def test_slime_parses_every_preset(commit, name):
    """slime's own flags over Megatron's; `--sglang-*` are SGLang's, passed through by prefix."""
    parser = recorded_parser()
    types = {"int": int, "float": float}
    for row in json.loads((HERE / f"slime_{commit}_flags.json").read_text()):
        known = [f for f in row["flags"] if f in parser._option_string_actions]
        if known or row["action"] not in ("store", "store_true", "store_false"):
            continue
        options = {"action": row["action"]}
        if row["action"] == "store":
            options |= {
                "type": types.get(row["type"], str),
                "nargs": row["nargs"],
                "choices": row["choices"],
            }
        parser.add_argument(*row["flags"], **options)
    facts = flags.Facts(options=frozenset(parser._option_string_actions))
    parsed, rest = parser.parse_known_args(list(flags.expand(command(name), facts).argv))
    left = [token for token in rest if token.startswith("--")]
    assert all(token.startswith("--sglang-") for token in left), left
    assert parsed.hf_checkpoint == "MODEL" and parsed.rotary_base == 1000000
    assert parsed.fp8_recipe == ("delayed" if name.endswith("-bf16") else "blockwise")


def test_a_misspelt_flag_would_be_found():
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        recorded_parser().parse_args([*command(MEGATRON[0]), "--no-such-flag"])
