"""`transformers serve` through `python -m diffqkv run`, asked by OpenAI's client over loopback; and `run` itself."""

import contextlib
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from paths import ROOT
from tiny_sigma import CACHE, save_with_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.model_manager import ModelManager

from diffqkv.__main__ import main

PAGE = (ROOT / "docs" / "serving.md").read_text()
NEW_TOKENS = 12
QUESTION = [{"role": "user", "content": "What do few K heads save?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model that reads two V rows per step, which no other attention function than ours does."""
    folder = tmp_path_factory.mktemp("serving") / "checkpoint"
    save_with_tokenizer(folder, selective_v_top_k=2)
    return folder


@contextlib.contextmanager
def serving(checkpoint, *options):
    """The base URL of a server of the checkpoint, and the file that it logs to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = checkpoint.parent / f"log{port}.txt"
    (checkpoint.parent / "home" / "hub").mkdir(parents=True, exist_ok=True)  # which GET /v1/models lists
    command = [sys.executable, "-m", "diffqkv", "run", "transformers", "serve", checkpoint.name, "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            cwd=checkpoint.parent,
            env={**os.environ, "HF_HOME": str(checkpoint.parent / "home"), "HF_HUB_OFFLINE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not is_healthy(url):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"{url}/v1", log
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=20)
        finally:
            server.kill()


def is_healthy(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def client_of(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def ask(client, messages, **options):
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model="checkpoint", messages=messages, **options)


def said_by_generate(checkpoint, messages, attention="diffqkv"):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_client_gets_what_generate_says(checkpoint, capsys):
    others = [[{"role": "user", "content": text}] for text in ("V?", "How many Q heads are there in SIGMA-1.5B?")]
    want = [said_by_generate(checkpoint, messages) for messages in (QUESTION, *others)]
    assert len(set(want)) == 3 and len(want[0]) > NEW_TOKENS // 2
    assert said_by_generate(checkpoint, QUESTION, "sdpa") != want[0]
    with serving(checkpoint) as (url, log):
        client = client_of(url)
        answer = ask(client, QUESTION)
        assert answer.choices[0].message.content == want[0]
        assert answer.usage.completion_tokens <= NEW_TOKENS
        parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, QUESTION, stream=True)]
        assert "".join(parts) == want[0] and sum(map(bool, parts)) > 1
        with ThreadPoolExecutor() as users:
            answers = list(users.map(lambda messages: ask(client, messages), others))
        assert [answer.choices[0].message.content for answer in answers] == want[1:]
        prompt = f"user: {QUESTION[0]['content']}\nassistant: "
        text = client.completions.create(model="checkpoint", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
        assert text.choices[0].text == want[0]
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="another", messages=QUESTION)
        assert "pinned to 'checkpoint'" in error.value.response.text
        # Before transformers 5.24 the server lists only the hub's cache.
        assert ("checkpoint" in [model.id for model in client.models.list()]) == (CACHE == "cache")

        (block,) = re.findall(r"^```python\n(from openai .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        block = block.replace("http://127.0.0.1:8000/v1", url).replace("stream=True", "stream=True, temperature=0")
        capsys.readouterr()
        exec(compile(block, "serving.md", "exec"), {})
        assert capsys.readouterr().out.startswith(want[0])
    assert "Finished server process" in log.read_text()


def test_continuous_batching_is_an_error_of_the_request(checkpoint):
    with serving(checkpoint, "--continuous-batching") as (url, log):
        with pytest.raises(openai.InternalServerError):
            ask(client_of(url), QUESTION)
    assert re.search(r"^\w*Error: continuous batching: its paged cache", log.read_text(), re.MULTILINE)


def test_what_the_server_leaves_to_run(checkpoint):
    """The day that one of these fails, docs/serving.md and `python -m diffqkv run` can become shorter."""
    assert "getattr(transformers, config.architectures[0])" in inspect.getsource(ModelManager._load_model)
    with pytest.raises(ValueError, match="attention implementation: 'diffqkv'"):
        ModelManager(attn_implementation="diffqkv")


# ---------------------------------------------------------------- run


def test_run_hands_arguments_and_exit_status_on(monkeypatch, capsys):
    seen = []

    class Script:
        def load(self):
            return lambda: seen.append(list(sys.argv)) or 3

    monkeypatch.setattr("diffqkv.commands.run.entry_points", lambda group, name: [Script()])
    monkeypatch.setattr(sys, "argv", ["diffqkv"])
    assert main(["run", "tool", "--help", "-x", "a b", "run"]) == 3
    assert seen == [["tool", "--help", "-x", "a b", "run"]]


def test_run_refuses_a_command_that_no_package_installs(capsys):
    assert main(["run", "no-such-command", "serve"]) == 2
    assert capsys.readouterr().err.startswith("run: got 'no-such-command', want the name of a command")


def test_run_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("diffqkv._transformers.error", ImportError("no transformers here"))
    assert main(["run", "pytest"]) == 2
    assert capsys.readouterr().err == "run: no transformers here\n"
