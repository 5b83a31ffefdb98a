"""Chat: the text that a model's own template makes of a conversation.

A template is a program in the language Jinja2 that comes with a model (tokenizer.chat_template). It is untrusted: in Jinja2's
sandbox it can reach neither files nor our program. It could still run forever or fill the memory; Ctrl-C ends it.
"""
import datetime
import json
import re

from cli import UserError, one_line
from files import short_repr
from tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")     # marks replies, for those who train on them only
TEMPLATE_HINT = "put the model's own chat_template.jinja into its folder, or leave out --chat"


class ChatTemplate:
    """The chat template of a model's tokenizer. Raises UserError if it has none, or a damaged one."""

    def __init__(self, tokenizer: Tokenizer):
        from jinja2.sandbox import ImmutableSandboxedEnvironment    # here, not above: other programs start faster without it
        if not tokenizer.chat_template:
            raise UserError(f"the model has no chat template, so it was not trained to chat; {TEMPLATE_HINT}")
        # As transformers renders templates: lines with nothing but a statement leave no trace.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, **{"ensure_ascii": False} | settings)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        first = {name: ids[0] if isinstance(ids, list) else ids for name, ids in tokenizer.special_ids.items()}
        self.special = {name.removesuffix("_id"): "" if id is None else tokenizer.decode([id]) for name, id in first.items()}
        try:
            self.template = environment.from_string(GENERATION.sub("", tokenizer.chat_template))
        except Exception as error:      # of whatever kind: one that is nested too deeply is no TemplateError
            raise UserError(f"the model's chat template cannot be read ({short_repr(str(error))}); {TEMPLATE_HINT}") from error

    def text(self, messages: list[dict]) -> str:
        """The text of a conversation up to where the model replies.

        messages: {"role": "system", "user" or "assistant", "content": text} each

        Raises UserError if the template refuses the conversation, or fails.
        """
        try:
            return self.template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                        **self.special)
        except Refusal as error:
            raise UserError(f"the model's chat template refuses it: {one_line(str(error))}") from error
        except Exception as error:      # of whatever kind: the template is a program
            reason = one_line(short_repr(f"{type(error).__name__}: {error}"))
            raise UserError(f"the model's chat template fails ({reason}); {TEMPLATE_HINT}") from error


class Refusal(Exception):
    """What a template raises to refuse a conversation."""


def refuse(message):
    raise Refusal(message)


def common_start(first: list[int], second: list[int]) -> int:
    """The number of tokens that two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
