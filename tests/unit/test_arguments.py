from __future__ import annotations

from megatron_fp8_ext.megatron_plugin import arguments


def test_value_and_has():
    argv = ["--a", "1", "--b=2", "--c", "--a", "3"]
    assert arguments.value(argv, "--a") == "3"
    assert arguments.value(argv, "--b") == "2"
    assert arguments.value(argv, "--c") is None
    assert arguments.has(argv, "--c") and not arguments.has(argv, "--aa")


def test_without_takes_the_value_along():
    argv = ["--a", "1", "x", "--b=2", "--c", "--a", "--d"]
    assert arguments.without(argv, "--a", takes_value=True) == ["x", "--b=2", "--c", "--d"]
    assert arguments.without(argv, "--c", takes_value=False) == [
        "--a", "1", "x", "--b=2", "--a", "--d",
    ]  # fmt: skip
    assert "--b=2" not in arguments.without(argv, "--b", takes_value=True)
