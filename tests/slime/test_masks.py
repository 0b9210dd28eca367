"""Tokens and masks of packed samples against slime's own MultiTurnLossMaskGenerator, to the token."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import trees
from chat import CASES, TOOLS, write_tokenizer

from megatron_fp8_ext.demo.text import tokenizer_file
from megatron_fp8_ext.errors import UserError
from megatron_fp8_ext.sft import conversation, template

pytestmark = pytest.mark.slime


@pytest.fixture(params=trees.params())
def generator(request):
    """The class as the checkout has it; it needs transformers alone."""
    pytest.importorskip("transformers")
    file = request.param / "slime" / "utils" / "mask_utils.py"
    spec = importlib.util.spec_from_file_location("slime_mask_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MultiTurnLossMaskGenerator


@pytest.fixture(params=["bytes", "SmolLM2"])
def path(request, tmp_path):
    if request.param == "bytes":
        return write_tokenizer(tmp_path)
    try:
        return tokenizer_file()
    except UserError as error:
        pytest.skip(str(error))


def of_transformers(chat):
    """The same tokenizer and template through transformers, whose default slime 8359c9a was written for."""
    from transformers import PreTrainedTokenizerFast

    class Tokenizer(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            return super().apply_chat_template(*args, **{"return_dict": False, **kwargs})

    return Tokenizer(tokenizer_object=chat.tokenizer, chat_template=chat.source, **chat.special)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("case", CASES)
def test_slime_masks_the_same_tokens(generator, path, case, tools):
    small = path.is_dir()
    takes_tools = "tools" in inspect.signature(generator.get_loss_mask).parameters
    if (tools and not (takes_tools and small)) or ("tool" in case and not small):
        pytest.skip("no tools in this template, or in slime 8359c9a")
    chat = template.load(path, split_tool_turns=case == "two tools")
    messages = CASES[case]
    theirs = generator(of_transformers(chat), "qwen")
    more = {"tools": tools} if takes_tools else {}
    tokens, mask = theirs.get_loss_mask(messages, **more)
    ours = chat.encode([conversation.parse({"messages": messages, "tools": tools})])[0]
    assert ours.tokens.tolist() == tokens
    assert ours.mask.tolist() == [bool(m) for m in mask]
    assert 0 < sum(mask) < len(mask)
