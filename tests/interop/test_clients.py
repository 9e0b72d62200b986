"""`duquantpp serve` and the clients that are meant: openai's, and lm-eval's local-completions."""

import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from duquantpp_jax.commands.options.quantize import QuantizeOptions
from duquantpp_jax.commands.quantize import quantize
from tests.conftest import TEXT

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.slow, pytest.mark.sockets, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def simulated(shallow_directory, tmp_path_factory):
    """Two layers of the embedded model, quantized, with a chat template."""
    place = tmp_path_factory.mktemp("simulated")
    shutil.copytree(shallow_directory, place / "m")
    (place / "m/chat_template.jinja").write_text("{{ messages[-1].content }}, said he.")
    how = {"rows": 4, "calibration_text": TEXT, "recipe": "block_hadamard"}
    quantize(QuantizeOptions(model=place / "m", out=place / "q", **how))
    return place / "q"


@pytest.fixture(scope="module")
def server(simulated):
    """A running server of it, its client and its port."""
    command = [sys.executable, "-m", "duquantpp_jax.cli", "serve", str(simulated)]
    command += ["--port", "0", "--rows", "4", "--name", "small", "--cache", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    port = int(line.rsplit(":", 1)[1].split("/")[0])
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    yield process, client, port
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


def test_concurrent_requests_get_what_each_gets_alone(server):
    _, client, _ = server

    def text(number):
        prompt = ("It was a dark night", "The old man", "She had", "In")[number % 4]
        how = {"temperature": (0, 0.8)[number % 2], "seed": number, "max_tokens": 5 + number % 3}
        return client.completions.create(model="small", prompt=prompt, **how).choices[0].text

    alone = [text(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [*pool.map(text, range(8))] == alone
    assert len({*alone}) > 4
    parts = client.completions.create(
        model="small", prompt="It was a dark night", temperature=0, max_tokens=5, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == alone[0]


def test_a_chat_with_log_probabilities_is_the_completion_of_its_prompt(server):
    _, client, _ = server
    asked = {"model": "small", "temperature": 0, "max_tokens": 6}
    messages = [{"role": "user", "content": "It was a dark night"}]
    chat = {**asked, "messages": messages, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**chat).choices[0]
    content = answer.logprobs.content
    prompt = "It was a dark night, said he."
    direct = client.completions.create(**asked, prompt=prompt, logprobs=1).choices[0]
    assert (answer.message.role, answer.message.content) == ("assistant", direct.text)
    assert [token.token for token in content] == direct.logprobs.tokens
    assert [token.logprob for token in content] == pytest.approx(direct.logprobs.token_logprobs)
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
    parts = [*client.chat.completions.create(**chat, stream=True)]
    deltas = [part.choices[0].delta.content for part in parts]
    assert "".join(filter(None, deltas)) == direct.text


def test_a_refusal_is_the_clients_own_error_and_half_a_request_harms_nobody(server):
    _, client, port = server
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' does not exist"):
        client.completions.create(model="gpt", prompt="a")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
    assert client.models.list().data[0].id == "small"


def test_local_completions_scores_as_our_own_model(server, simulated):
    lm_eval = pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    from lm_eval.tasks import TaskManager

    from duquantpp_jax.evaluation import harness

    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", DISABLE_MULTIPROC="1")
    place = simulated.parent / "tokenizer"
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    file = str(simulated / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, **ends).save_pretrained(place)

    def scores(model, **arguments):
        manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
        tasks = ["gutenberg_cloze", "gutenberg_exact", "gutenberg_last_word"]
        options = {"task_manager": manager, "limit": 3, "bootstrap_iters": 0, **arguments}
        return lm_eval.simple_evaluate(model, tasks=tasks, **options)["samples"]

    url = f"base_url=http://127.0.0.1:{server[2]}/v1/completions,model=small,tokenizer={place}"
    theirs = scores("local-completions", model_args=url)
    ours = scores(harness.model_class()(str(simulated)))
    for task in ours:
        for own, other in zip(ours[task], theirs[task], strict=True):
            if task == "gutenberg_exact":
                assert own["resps"] == other["resps"]
                continue
            for mine, wanted in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                assert mine[0] == pytest.approx(wanted[0], rel=1e-5)
                assert mine[1] == wanted[1]
