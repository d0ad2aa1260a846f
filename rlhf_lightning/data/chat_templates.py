"""The chat templates of `data.template`, and which one a tokenizer has."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.errors import UserError, nearest

# Each writes exactly what is learned: nothing follows the end of the last turn, so a model folder that is exported with
# the template gives a conversation the same tokens in every program. %END% is what ends a turn.
# Newlines stand in expressions: one behind a block is not written.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + %END% }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # no space at the end of a prompt: tokenizers join it with the first word of the response
    "human_assistant": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '\\n\\nHuman: ' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + m['content'] + %END% }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ %END% }}{% endif %}{% endfor %}"
    ),
}


def own_template(name: str, tokenizer: Any) -> str:
    """Return the source of a template of ours for `tokenizer`, with the BOS that the tokenizer adds and its EOS.

    A turn of chatml ends with `<|im_end|>` where the tokenizer has that token, and with EOS everywhere else.

    Raises:
        UserError: there is no template of this name.
    """
    if name not in TEMPLATES:
        options = ["auto", *TEMPLATES]
        raise UserError(f"data.template={name!r} is not one of {', '.join(options)}.{nearest(name, options)}")
    bos, ends = tokenizer.bos_token_id, name == "chatml" and "<|im_end|>" in tokenizer.get_added_vocab()
    starts = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    source = TEMPLATES[name].replace("%END%", "'<|im_end|>'" if ends else "eos_token")
    return ("{{ bos_token }}" if starts else "") + source


def tokenizer_template(tokenizer: Any, tools: bool) -> str:
    """Return the chat template of a tokenizer: of several, the one that it uses with or without tools.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; choose one with "
            f"data.template={'|'.join(TEMPLATES)}"
        )
    try:
        return str(tokenizer.get_chat_template(tools=[] if tools else None))
    except ValueError as error:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has several chat templates: {error}") from error
