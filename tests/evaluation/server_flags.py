"""Print the flags of an installed server's own parser: `PYTHON server_flags.py sglang|vllm [WORDS...]`.

With WORDS, parse them instead and print what came of them. Run by the Python that has the server.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys


def parser(kind: str) -> argparse.ArgumentParser:
    if kind == "sglang":
        from sglang.srt.server_args import ServerArgs

        found = argparse.ArgumentParser()
        ServerArgs.add_cli_args(found)
        return found
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser  # 0.32
    found = FlexibleArgumentParser()
    make_arg_parser(found)
    return found


def version(kind: str) -> str:
    for name in (kind, f"{kind}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return __import__(kind).__version__


def flags(kind: str) -> dict[str, object]:
    """Flags by name: their choices, the number of words they take (0 for a switch), or null for one."""
    found: dict[str, object] = {}
    for action in parser(kind)._actions:
        few = action.choices is not None and len(list(action.choices)) < 8
        says = sorted(map(str, action.choices)) if few else action.nargs
        found |= {flag: says for flag in action.option_strings}
    return found


def main(argv: list[str]) -> None:
    kind, words = argv[0], argv[1:]
    if not words:
        print(json.dumps({"version": version(kind), "flags": flags(kind)}, default=str))
        return
    if kind == "sglang":  # the whole of its command line, --config included
        from sglang.srt.server_args import prepare_server_args

        record = prepare_server_args(words)
        parsed = {name: getattr(record, name) for name in record.__struct_fields__}
    else:
        assert words[0] == "serve"
        parsed = vars(parser(kind).parse_args(words[1:]))
    plain = {name: value for name, value in parsed.items() if isinstance(value, (str, int, list))}
    print(json.dumps(plain, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
