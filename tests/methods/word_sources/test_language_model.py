import http.server
import json
import threading

import pytest

from lightning_prompts.errors import UserError
from lightning_prompts.methods.dpo_diff import language_model as module
from lightning_prompts.methods.dpo_diff.language_model import LanguageModel, is_usable, parse_answer

PROMPT = "a small dog on a red mat"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "small -> tiny, little\nred -> crimson, scarlet.",
            {"small": ["tiny", "little"], "red": ["crimson", "scarlet"]},
        ),
        (
            "1. **Small** → Tiny, small, LITTLE\n- dog: hound, pup dog",
            {"Small": ["tiny", "little"], "dog": ["hound", "pup dog"]},
        ),
        ("Sure! Here you are:\n\nhouse -> home", {}),
        ("dog ->\nmat -> , ;", {}),
        ("", {}),
    ],
)
def test_answers_are_parsed(answer, expected):
    assert parse_answer(answer, PROMPT) == expected


def test_answers_with_too_few_words_are_not_usable():
    assert is_usable({"a": ["b", "c"], "d": ["e", "f"], "g": ["h"]})
    assert not is_usable({"a": ["b", "c"], "d": ["e"]})
    assert not is_usable({})


@pytest.fixture
def endpoint():
    """Serve the answers of a list, one after the other; record the requests."""
    answers, requests = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.headers))
            content = {"choices": [{"message": {"content": answers.pop(0)}}]} if answers else {"error": "no more"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#tiny", answers, requests
    server.shutdown()


def test_endpoint_is_asked_until_the_answer_is_usable_and_cached(endpoint, tmp_path, monkeypatch):
    url, answers, requests = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers += ["I cannot do that.", "dog -> hound\nred -> crimson", "dog -> hound, puppy\nred -> crimson, scarlet"]
    model = LanguageModel(url, tmp_path / "answers.json")
    result = model(PROMPT, "synonyms")
    assert result == {"dog": ["hound", "puppy"], "red": ["crimson", "scarlet"]}
    path, body, headers = requests[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "tiny"
    assert PROMPT in body["messages"][0]["content"]
    assert headers["Authorization"] == "Bearer secret"
    assert len(requests) == 3
    assert LanguageModel(url, tmp_path / "answers.json")(PROMPT, "synonyms") == result
    assert len(requests) == 3


def test_endpoint_with_unusable_answers_is_given_up(endpoint, tmp_path):
    url, answers, requests = endpoint
    answers += ["nonsense"] * 3
    with pytest.raises(UserError, match="was asked 5 times"):
        LanguageModel(url, tmp_path / "answers.json")(PROMPT, "antonyms")
    assert len(requests) == 5
    assert not (tmp_path / "answers.json").exists()


def test_unreachable_endpoint_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot be reached"):
        LanguageModel("http://127.0.0.1:9/v1#x", tmp_path / "answers.json")(PROMPT, "synonyms")


def test_local_model_answers_reproducibly(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "QUESTION", "a {prompt:.3}")  # the model reads 24 tokens
    monkeypatch.setattr(module, "parse_answer", lambda answer, prompt: {"dog": [*answer.split()[:2], "b"]})
    words = LanguageModel(language_model, tmp_path / "answers.json")(PROMPT, "synonyms")
    assert words["dog"]
    again = LanguageModel(language_model, tmp_path / "other.json")(PROMPT, "synonyms")
    assert again == words
