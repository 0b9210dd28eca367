"""The reference's two conversion tools by their argument names, as `megatron-fp8 convert` commands."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.launch.plan import split_checkpoint


def torch_dist_to_hf(argv: Sequence[str]) -> list[str]:
    """Return the `megatron-fp8` words for convert_torch_dist_to_hf.py's arguments.

    Raises:
        UserError: --origin-hf-dir is missing, or --force is given.
    """
    parser = argparse.ArgumentParser("convert_torch_dist_to_hf.py", allow_abbrev=False)
    parser.add_argument("--input-dir", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--origin-hf-dir", help="model folder: config.json and tokenizer")
    parser.add_argument("--chunk-size", type=int, help="bytes of a shard")
    parser.add_argument("--model-name", help="not needed: config.json says it")
    parser.add_argument("--vocab-size", help="not needed: config.json says it")
    parser.add_argument("-f", "--force", action="store_true")
    args = parser.parse_args(list(argv))
    if args.origin_hf_dir is None:
        raise UserError(
            "--origin-hf-dir is missing: name the model folder with config.json and tokenizer"
        )
    if args.force:
        raise UserError(f"--force: nothing is overwritten here; remove {args.output_dir} yourself")
    root, step = split_checkpoint(args.input_dir)
    words = [
        "convert",
        "megatron-to-hf",
        root,
        args.output_dir,
        "--hf-reference",
        args.origin_hf_dir,
    ]
    if step is not None:
        words += ["--ckpt-step", str(step)]
    if args.chunk_size is not None:
        words += ["--shard-size", f"{args.chunk_size / 1e9:g}"]
    return words


def bf16_to_fp8(argv: Sequence[str]) -> list[str]:
    """Return the `megatron-fp8` words for bf16_cast_fp8.py's arguments.

    The reference declares --force-pow-2-scale with type=bool, which reads `False` as True.
    """
    parser = argparse.ArgumentParser("bf16_cast_fp8.py", allow_abbrev=False)
    parser.add_argument("--input-bf16-hf-path", required=True)
    parser.add_argument("--output-fp8-hf-path", required=True)
    parser.add_argument(
        "--force-pow-2-scale", choices=["True", "False", "true", "false"], default="True"
    )
    args = parser.parse_args(list(argv))
    scales = "e8m0" if args.force_pow_2_scale.lower() == "true" else "fp32"
    words = ["convert", "hf-to-fp8", args.input_bf16_hf_path, args.output_fp8_hf_path]
    return [*words, "--scale-format", scales]


def main(tool: str) -> None:
    """Run a tool with this process's arguments; `--dry-run` prints the command alone."""
    argv = [token for token in sys.argv[1:] if token != "--dry-run"]
    try:
        words = {"torch_dist_to_hf": torch_dist_to_hf, "bf16_to_fp8": bf16_to_fp8}[tool](argv)
    except UserError as error:
        print(f"megatron-fp8: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(shlex.join(["megatron-fp8", *words]), flush=True)
    if len(argv) < len(sys.argv) - 1:
        return
    raise SystemExit(subprocess.call([sys.executable, "-m", "megatron_fp8_ext.cli", *words]))
