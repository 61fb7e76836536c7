"""What is known of each family of reasoning models: one table of data, and three small readers of it.

A row holds what the model's makers or a paper have published: how thinking is marked, the words with which
the model doubts itself, advised sampling, how thinking is switched on and off. A cell that nobody has
published is left empty rather than guessed. What the loaded tokenizer and chat template really do is read
from them, not from this table (`thinking_tags`, `thinking_state`).

Papers: LYNX (arXiv 2512.05325) for cue words and probe depths, CoDE-Stop (arXiv 2604.04930, Table 7) for τ,
DEER (arXiv 2504.15895) for the inducer, Qwen3 (arXiv 2505.09388) for the budget sentence.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

ThinkingState = Literal["open", "closed", "absent", "none"]

LYNX_CUES = ("wait", "hmm", "alternatively")
"""The reflection words LYNX looks at (arXiv 2512.05325); DEER and CoDE-Stop use the first and the last."""

BOXED_INDUCER = "\n\n**Final Answer**\n\nThe final answer is \\boxed{"
"""Makes a model answer in a box right after its thinking (the string of DEER and CoDE-Stop)."""


@dataclass(frozen=True)
class ThinkTags:
    """The strings that open and close thinking."""

    start: str
    end: str

    @property
    def markers(self) -> tuple[str, ...]:
        """The strings that a tokenizer would keep whole: a Harmony header is made of several."""
        return tuple(part for tag in (self.start, self.end) for part in re.findall(r"<\|.+?\|>", tag) or [tag])


@dataclass(frozen=True)
class Switch:
    """How thinking is asked for and declined: keywords of the chat template, or a line of system prompt."""

    on: Mapping[str, object] = field(default_factory=dict, hash=False)
    off: Mapping[str, object] = field(default_factory=dict, hash=False)
    system_on: str = ""
    system_off: str = ""


@dataclass(frozen=True)
class Family:
    """One row of the table. Empty cells mean: not published, use your own default."""

    name: str
    patterns: tuple[str, ...] = ()
    """Regular expressions, searched in lower-cased model ids, directory names, model types, architectures."""
    think: ThinkTags | None = None
    think_newline: bool = False
    """Whether the model's thinking begins on a new line after the start tag."""
    empty_thinking: str = ""
    """An empty block of thinking; by default the tags with blank lines (NoThinking, arXiv 2504.09858)."""
    cues: tuple[str, ...] = ()
    """Words with which a reflection begins; empty: check at paragraphs instead."""
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Advised for thinking: temperature, top_p, top_k, min_p."""
    habit: Literal["boxed", "text"] = "text"
    """The form in which the model answers whatever it is asked. Models for all purposes box what asks for a box."""
    boxed_inducer: str = BOXED_INDUCER
    """What follows the end-of-thinking string to make the model answer in a box."""
    budget_message: str = ""
    """What is fed before the end tag when a hard budget ends the thinking."""
    probe_layers: tuple[float, ...] = ()
    """Depths, as shares of the number of layers, at which a probe was published to work."""
    tau: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    """CoDE-Stop's τ by model and benchmark. It spans 0.9 to 90: a hint where to look, not a default."""
    template_switch: Switch = field(default_factory=Switch)
    source: str = ""


_THINK = ThinkTags("<think>", "</think>")
_HARMONY = ThinkTags("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")
_MISTRAL = ThinkTags("[THINK]", "[/THINK]")

KNOWN_TAGS: tuple[ThinkTags, ...] = (
    _THINK,
    _MISTRAL,
    _HARMONY,
    ThinkTags("<seed:think>", "</seed:think>"),
    ThinkTags("◁think▷", "◁/think▷"),
    ThinkTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkTags("<|begin_of_thought|>", "<|end_of_thought|>"),
    ThinkTags("<thinking>", "</thinking>"),
    ThinkTags("<reasoning>", "</reasoning>"),
)
"""Tags seen in the wild, the commonest first: what an unknown model is searched for."""

_ENABLE_THINKING = Switch(on={"enable_thinking": True}, off={"enable_thinking": False})

FAMILIES: tuple[Family, ...] = (
    Family(
        name="pocket",
        patterns=(r"(^|[\\/_-])pocket([-_][^\\/]*|[\\/]weights)?$",),
        think=_THINK,
        think_newline=True,
        cues=("wait", "hmm", "alternatively", "actually", "but wait", "let me check"),
        sampling={"temperature": 0.6, "top_p": 0.95},
        habit="boxed",
        boxed_inducer="\n\nThe answer is \\boxed{",
        template_switch=_ENABLE_THINKING,
        source="the recipe bundled with this package",
    ),
    Family(
        name="deepseek-r1",
        patterns=(r"deepseek[-_]r1", r"r1[-_]distill"),
        think=_THINK,
        think_newline=True,
        cues=LYNX_CUES,
        sampling={"temperature": 0.6, "top_p": 0.95},
        probe_layers=(9 / 28, 16 / 28, 1.0),
        tau={
            "r1-distill-llama-8b": {
                "amc23": 35.0,
                "aime": 90.7,
                "math500": 20.5,
                "gsm8k": 7.6,
                "gpqa-d": 64.7,
            }
        },
        source="model card DeepSeek-R1 (usage recommendations); probe depths: LYNX on R1-Distill-Qwen-1.5B",
    ),
    Family(
        name="nemotron-nano-v1",
        patterns=(r"llama-3[._]1-nemotron-nano-(4b|8b)",),
        think=_THINK,
        think_newline=True,
        cues=LYNX_CUES,
        sampling={"temperature": 0.6, "top_p": 0.95},
        probe_layers=(0.25, 0.5, 0.75, 1.0),
        tau={
            "nemotron-nano-8b-v1": {
                "amc23": 8.0,
                "aime": 15.6,
                "math500": 4.6,
                "gsm8k": 2.2,
                "gpqa-d": 11.8,
            }
        },
        template_switch=Switch(system_on="detailed thinking on", system_off="detailed thinking off"),
        source="model card Llama-3.1-Nemotron-Nano-8B-v1; probe depths: LYNX",
    ),
    Family(
        name="nemotron-nano-v2",
        patterns=(r"nemotron-nano-(9b|12b)-v2",),
        think=_THINK,
        think_newline=True,
        sampling={"temperature": 0.6, "top_p": 0.95},
        template_switch=Switch(system_off="/no_think"),  # thinking is what it does by default
        source="model card NVIDIA-Nemotron-Nano-9B-v2 and its chat template",
    ),
    Family(
        name="qwq",
        patterns=(r"qwq",),
        think=_THINK,
        think_newline=True,
        cues=LYNX_CUES,
        sampling={"temperature": 0.6, "top_p": 0.95, "min_p": 0.0},
        probe_layers=(0.25, 0.5, 0.75, 1.0),
        source="model card QwQ-32B; probe depths: LYNX",
    ),
    Family(
        name="qwen3-instruct",
        # Its tokenizer has the tags and its template speaks of them, but the model never thinks.
        patterns=(r"qwen3.*instruct", r"qwen3-coder"),
        source="documentation of Qwen3: Qwen3-Instruct-2507 supports only non-thinking mode",
    ),
    Family(
        name="qwen3-thinking",
        patterns=(r"qwen3.*thinking",),
        think=_THINK,
        think_newline=True,
        cues=LYNX_CUES,
        sampling={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
        budget_message="\n\nConsidering the limited time by the user, I have to give the solution based on "
        "the thinking directly now.\n",
        source="model card Qwen3-4B-Thinking-2507; budget sentence: arXiv 2505.09388",
    ),
    Family(
        name="qwen3",
        patterns=(r"qwen3(?![.\d])",),
        think=_THINK,
        think_newline=True,
        cues=LYNX_CUES,
        sampling={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
        budget_message="\n\nConsidering the limited time by the user, I have to give the solution based on "
        "the thinking directly now.\n",
        probe_layers=(1 / 3, 0.5, 2 / 3, 1.0),
        tau={
            "qwen3-4b": {"amc23": 3.5, "aime": 5.3, "math500": 2.0, "gsm8k": 0.9, "gpqa-d": 4.6},
            "qwen3-14b": {"amc23": 3.3, "aime": 6.9, "math500": 2.3, "gsm8k": 0.9, "gpqa-d": 5.5},
        },
        template_switch=_ENABLE_THINKING,
        source="model card Qwen3-8B; budget sentence: arXiv 2505.09388; probe depths: LYNX on Qwen3-8B",
    ),
    Family(
        name="gpt-oss",
        patterns=(r"gpt[-_]?oss",),
        think=_HARMONY,
        empty_thinking=_HARMONY.start + _HARMONY.end,
        sampling={"temperature": 1.0, "top_p": 1.0},
        # It has levels but no off: the lowest level, and the empty analysis channel, are the nearest to it.
        template_switch=Switch(off={"reasoning_effort": "low"}),
        source="README of gpt-oss (recommended sampling parameters); the Harmony response format",
    ),
    Family(
        name="magistral",
        patterns=(r"magistral",),
        think=_MISTRAL,
        sampling={"temperature": 0.7, "top_p": 0.95},
        source="model cards Magistral-Small-2506 and Magistral-Small-2509",
    ),
    Family(
        name="smollm3",
        patterns=(r"smollm3",),
        think=_THINK,
        think_newline=True,
        sampling={"temperature": 0.6, "top_p": 0.95},
        template_switch=_ENABLE_THINKING,
        source="model card SmolLM3-3B and its chat template",
    ),
    Family(
        name="phi-4-reasoning",
        patterns=(r"phi-?4(-mini)?-reasoning",),
        think=_THINK,
        sampling={"temperature": 0.8, "top_p": 0.95},
        source="model card Phi-4-mini-reasoning (usage example); Phi-4-reasoning's system prompt for the tags",
    ),
)

UNKNOWN = Family(
    name="unknown",
    # The two names under which templates take the switch (Qwen's, Granite's and DeepSeek-V3.1's); a template
    # that knows neither ignores both.
    template_switch=Switch(
        on={"enable_thinking": True, "thinking": True}, off={"enable_thinking": False, "thinking": False}
    ),
    source="no family matched: tags are read from tokenizer and template, nothing else is assumed",
)


def find_family(*hints: str) -> Family:
    """Return the first family that a hint names; `UNKNOWN` if none does.

    Hints go from telling to vague: model id or directory name first, then model type and architectures, for
    many a model is of a type (say `qwen3`) without being of the family.
    """
    for hint in hints:
        for family in FAMILIES:
            if any(re.search(pattern, hint.lower()) for pattern in family.patterns):
                return family
    return UNKNOWN


def thinking_tags(template: str | None, added_tokens: Collection[str], family: Family) -> ThinkTags | None:
    """Return the tags this very model marks its thinking with, or None if it does not think.

    1. A known family without tags does not think, whatever its tokenizer inherited.
    2. The family's tags, if tokenizer or template show them.
    3. Else other known tags that tokenizer or template show (a fine-tune that changed them).
    4. Else the family's tags all the same: some models (Nemotron Nano v1) write them as plain text, which
       neither a token nor the template need betray.

    Tags count as shown if every marker is an added token, or every marker stands in the template.
    """
    if family.think is None and family is not UNKNOWN:
        return None

    def shown(tags: ThinkTags) -> bool:
        return any(all(marker in place for marker in tags.markers) for place in (added_tokens, template or ""))

    candidates = ((family.think,) if family.think else ()) + KNOWN_TAGS
    return next((tags for tags in candidates if shown(tags)), family.think)


def thinking_state(prompt_tail: str, tags: ThinkTags | None) -> ThinkingState:
    """Tell what the generation prompt has done about thinking.

    `prompt_tail` is what the template adds for the model's turn, and nothing before it: tags in the history
    or in a user's text must not be seen here. "open": thinking has begun. "closed": an empty block, so no
    thinking. "absent": the model has tags, but the template leaves it to the model, or to the caller, to
    write them. "none": the model has none.
    """
    if tags is None:
        return "none"
    opened, closed = prompt_tail.rfind(tags.start), prompt_tail.rfind(tags.end)
    if opened == closed == -1:
        return "absent"
    return "open" if opened > closed else "closed"
