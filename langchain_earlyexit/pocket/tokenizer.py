"""The pocket tokenizer: whole words with their leading space, single digits, and all bytes, so any text round-trips."""

import random
from collections import Counter
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from langchain_earlyexit.pocket.curriculum import draw_lesson
from langchain_earlyexit.pocket.traces import BOXED_REQUEST, SYSTEM_PROMPTS, synthetic_guesser

CONTROL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>")
MARKER_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PAD, IM_START, IM_END, OPEN, CLOSE = range(5)

_PIECES = (
    r"\n\n"
    r"| [+\-*=] (?=[0-9])"  # an operator takes the space before a number, so that numbers are digits alone
    r"| ?\\boxed"
    r"| ?\p{L}+"
    r"|[0-9]"
    r"| ?[^\s\p{L}0-9]"
    r"|\s"
)


def _words(texts: int, seed: int, at_least: int) -> list[str]:
    """Pieces that enough of the generated training texts hold to be tokens, most frequent first."""
    splitter = Sequence([Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    rng = random.Random(seed)  # noqa: S311
    guesser = synthetic_guesser(right=0.6)
    counts: Counter[str] = Counter()
    for _ in range(texts):
        text = draw_lesson(rng, guesser, early=False)
        whole = "".join(segment.text for segment in (*text.segments, *text.tail))
        for marker in (*CONTROL_TOKENS, *MARKER_TOKENS):
            whole = whole.replace(marker, "\0")
        # By text, not by occurrence: a chain repeats the made-up name of its tool, which must not become a token.
        counts.update({piece for part in whole.split("\0") for piece, _ in splitter.pre_tokenize_str(part)})
    for sentence in (*SYSTEM_PROMPTS, BOXED_REQUEST):
        counts.update({piece: at_least for piece, _ in splitter.pre_tokenize_str(sentence)})
    common = [(count, piece) for piece, count in counts.items() if len(piece) > 1 and count >= at_least]
    return [piece for _, piece in sorted(common, key=lambda pair: (-pair[0], pair[1]))]


def build(texts: int = 20_000, seed: int = 0, at_least: int = 6) -> Tokenizer:
    """A tokenizer over all bytes and the words of the training texts. Words it does not know become bytes."""
    pieces = [
        *CONTROL_TOKENS,
        *MARKER_TOKENS,
        *sorted(ByteLevel.alphabet()),
        *_words(texts, seed, at_least),
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKER_TOKENS])
    return tokenizer


CHAT_TEMPLATE = """\
{%- set turns = messages %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- set turns = messages[1:] %}
{%- endif %}
{{- '# Tools' }}
{%- for tool in tools %}
{%- set function = tool.function if tool.function is defined else tool %}
{%- set schema = function.parameters if function.parameters else {} %}
{%- set purpose = (function.description or '').strip().split('\\n')[0].strip().rstrip('.') %}
{{- '\\n- ' + (purpose + ': ' if purpose else '') + function.name + '(' }}
{%- for name, property in (schema.properties or {}).items() %}
{%- set kinds = property.anyOf if property.anyOf else [property] %}
{%- set kind = (kinds | rejectattr('type', 'equalto', 'null') | list + kinds)[0] %}
{{- (', ' if not loop.first else '') + name + ('' if name in (schema.required or []) else '?') + ': ' }}
{{- kind.enum | join('|') if kind.enum else (kind.type if kind.type is string else 'any') }}
{%- endfor %}
{{- ')' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'tool' %}
{{- '\\n' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|im_start|>user\\n' }}
{{- '<tool_response>\\n' + content + '\\n</tool_response>' }}
{{- '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
{%- else %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function is defined else call %}
{{- '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""


def pretrained(tokenizer: Tokenizer, context: int) -> Any:
    """The tokenizer as `transformers` saves and loads it, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=CONTROL_TOKENS[IM_END],
        pad_token=CONTROL_TOKENS[PAD],
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
