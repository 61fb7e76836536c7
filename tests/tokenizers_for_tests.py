# ruff: noqa: S106 -- token="<s>" is a token of a tokenizer, not a password
"""Small tokenizers of every kind, trained in memory, with the chat templates of model families in miniature."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is 37 + 48 * 2 - 15? Wait, let me check: 37 + 96 = 133, so the answer is 118.",
    "You are a helpful assistant. Think step by step and put your final answer within a box.",
    "system user assistant tool think function name arguments description parameters",
    'Hello world, how are you today? {"name": "add", "arguments": {"a": 1, "b": 2}}',
    "<b>bold</b> <b>text</b> <b>here</b> <b>too</b>",
    "<html> a < b > c [x] {y} |z| / ~ # @ ! & ; : ' \" \\ `",
]

CHATML = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN3 = (
    CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}",
    )
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PRE_OPENED = CHATML + "<think>\n{% endif %}"
"""QwQ and Qwen3-Thinking: the prompt begins the thinking, and has no switch."""
PLAIN_CHATML = CHATML + "{% endif %}"
"""SmolLM2, Phi-4-reasoning: nothing is said of thinking."""
NEMOTRON_V2 = (
    "{% set ns = namespace(on=true) %}{% for m in messages %}{% if m.role in ['user', 'system'] %}"
    "{% if '/think' in m.content %}{% set ns.on = true %}{% elif '/no_think' in m.content %}"
    "{% set ns.on = false %}{% endif %}{% endif %}{% endfor %}"
    "{% if messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content.replace('/think', '').replace('/no_think', '').strip() }}<|im_end|>\n"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.replace('/think', '').replace('/no_think', '').strip() }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n' if ns.on else '<think></think>' }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}"
    "<｜Assistant｜>{% for call in m.tool_calls %}{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}"
    "<｜end▁of▁sentence｜>{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% elif m.role == 'tool' %}"
    "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
"""As published: only a turn of which the content is none is one of calls."""
DEEPSEEK_MENDED = (
    DEEPSEEK.replace(
        "{% elif m.role == 'assistant' and m.content is none %}",
        "{% elif m.role == 'assistant' %}{% if m.tool_calls %}",
    )
    .replace("{% elif m.role == 'assistant' %}<", "{% endif %}{% if m.content is not none %}<")
    .replace("{% elif m.role == 'tool' %}", "{% endif %}{% elif m.role == 'tool' %}")
)
"""As others ship it: calls wherever there are any, and behind them a turn of the content unless that is none."""
CONTENT_OR_CALLS = CHATML.replace("{{ m.content }}{%", "{% if not m.tool_calls %}{{ m.content }}{% endif %}{%") + (
    "{% endif %}"
)
"""Llama 3: of a turn with calls, the content is not written."""
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
HARMONY = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' else '' }}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
DEEPSEEK_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")


def _wrap(
    tokenizer: Tokenizer, template: str | None, special: tuple[str, ...], plain: tuple[str, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer.to_str()


def byte_level(
    template: str | None = QWEN3,
    special: tuple[str, ...] = QWEN_SPECIAL,
    plain: tuple[str, ...] = QWEN_PLAIN,
    **names: str,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen, Llama 3 and gpt-oss have it."""
    return _wrap(Tokenizer.from_str(_byte_level()), template, special, plain, **names)


@cache
def _byte_fallback() -> str:
    alphabet = sorted(set("".join(CORPUS)) - {" "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *alphabet]
    merges = [("▁", letter) for letter in "abcdefghilmnoprstuwy<"] + [("t", "h"), ("▁", "th"), ("▁", "▁")]
    pieces += [a + b for a, b in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)).to_str()


def sentencepiece(template: str | None = LLAMA2, *, legacy: bool = False) -> PreTrainedTokenizerFast:
    """BPE with spaces as ▁ and byte fallback, as Llama 2 and Gemma have it, blank added tokens included."""
    tokenizer = Tokenizer.from_str(_byte_fallback())
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>")
    plain = ("[INST]", "[/INST]", "\n\n", "    ", "▁▁", "é")
    return _wrap(tokenizer, template, special, plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level(template: str | None = QWEN3) -> PreTrainedTokenizerFast:
    """Words and single characters, a closed vocabulary with an unknown token that is an added token itself."""
    words = sorted({*" ".join(CORPUS).split(), *"".join(CORPUS), "\n"})
    pieces = ["<pad>", "<unk>", *QWEN_SPECIAL, *QWEN_PLAIN, *words]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(
        tokenizer, template, ("<pad>", "<unk>", *QWEN_SPECIAL), QWEN_PLAIN, unk_token="<unk>", pad_token="<pad>"
    )


def normalizing(template: str | None = QWEN3) -> PreTrainedTokenizerFast:
    """Unigram behind NFKC and lower-casing, with tags matched in normalized text and in the vocabulary itself."""
    letters = [(letter, -5.0) for letter in sorted({*"".join(CORPUS).lower(), "▁", "\n"})]
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((token, 0.0) for token in (*QWEN_SPECIAL, *QWEN_PLAIN)), *letters], unk_id=0)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in QWEN_PLAIN])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    wrapped.chat_template = template
    return wrapped
