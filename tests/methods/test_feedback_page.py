"""The page of human feedback answers only the user's browser, and escapes texts."""

import html.parser
import http.client
import json
import re
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import torch

from lightning_prompts.methods.steering.human_feedback import Choice, Page
from lightning_prompts.methods.steering.human_feedback.choices import Round

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "<script>document.title='taken'</script> **a** $$b$$ http://example.com ${c} {{d}} &lt; \u202egnp\x1b[31m"
ESCAPED = "<script>document.title='taken'</script> **a** $$b$$ http://example.com ${c} {{d}} &lt; \\u202egnp\\x1b[31m"


class OpenPage:
    """Open a page that waits for an answer, and send requests to it."""

    def __init__(self, temporary, message):
        self.page, self.answers, self.stopped, self.temporary = Page(show=False), [], False, temporary
        self.page.open(None, True)
        self.address = re.search(r"http://\S+/", message())[0]
        parts = urllib.parse.urlsplit(self.address)
        self.port, self.secret = parts.port, parts.path
        self.host = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.ask, daemon=True).start()
        self.until(lambda: self.page.view.ready)
        self.config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", self.get("")[1])[1])

    def ask(self):
        """Ask until the test stops it."""
        while not self.stopped:
            images = [torch.rand(3, 16, 16) for _ in range(4)]
            positions = torch.zeros(1, 2), torch.tensor([[0.0, 1], [1, 0], [1, 1]])
            generate = images[1:].__getitem__
            answer = self.page.choose(
                Round(
                    PROMPT,
                    images[:1],
                    [PROMPT] * 3,
                    *positions,
                    lambda i, _, generate=generate: generate(i),
                    lambda: self.stopped,
                )
            )
            self.answers.append(answer)

    def until(self, true):
        """Wait until a condition is true."""
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end
            time.sleep(0.02)

    def request(self, method, path, headers, body=None):
        """Return the status and the text of an answer; the request has exactly the given headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        try:
            connection.endheaders(body)
            answer = connection.getresponse()
            events = "event-stream" in answer.headers.get("content-type", "")
            return answer.status, "" if events else answer.read().decode(errors="replace")
        finally:
            connection.close()

    def get(self, path, *headers):
        """Request a file as the user's browser does."""
        return self.request("GET", self.secret + path, [("Host", self.host), *headers])

    def call(self, trigger, data, *headers, host=None, secret=None):
        """Trigger the event of a click, or of the timer that updates the session's question."""
        if trigger[0] != "timer":
            self.content()
        (number,) = (
            dependency["id"]
            for dependency in self.config["dependencies"]
            if trigger in [(self.part(target[0]), target[1]) for target in dependency["targets"]]
        )
        body = json.dumps({"fn_index": number, "data": data, "session_hash": "one", "trigger_id": None}).encode()
        everything = [("Host", host or self.host), ("Content-Type", "application/json"), *headers]
        path = f"{self.secret if secret is None else secret}gradio_api/run/predict"
        return self.request("POST", path, everything, body)

    def part(self, number):
        """Return the name of a part of the page, or its type."""
        (part,) = (part for part in self.config["components"] if part["id"] == number)
        return part["props"].get("elem_id") or part["type"]

    def content(self):
        """Return the content of the page by the names of its parts."""
        status, text = self.call(("timer", "tick"), [-1, 0])
        assert status == 200, text
        (outputs,) = (
            dependency["outputs"] for dependency in self.config["dependencies"] if dependency["targets"][0][1] == "tick"
        )
        return dict(zip(map(self.part, outputs), json.loads(text)["data"], strict=True))

    def close(self):
        """Close the page."""
        self.stopped = True
        self.page.close("Finished.")


@pytest.fixture
def opened(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("gradio.route_utils.DEFAULT_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setattr("gradio.routes.DEFAULT_TEMP_DIR", str(tmp_path / "gradio"))
    caplog.set_level("INFO", "lightning_prompts")
    page = OpenPage(tmp_path, lambda: caplog.messages[-1])
    yield page
    page.close()


def image_paths(content):
    """Return the images of the candidates, as the page requests them."""
    value = content["candidates"]["value"]
    return [urllib.parse.urlsplit(image["image"]["url"]).path for image in value]


class VisibleText(html.parser.HTMLParser):
    """Parse the visible text of HTML, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        self.text += data


def test_requests_of_other_origins_are_refused_and_change_nothing(opened):
    port, own = opened.port, f"http://{opened.host}"
    foreign = [
        [("Host", host)]
        for host in (
            "example.com",
            f"example.com:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port + 1}",
            f"127.0.0.1.example.com:{port}",
            f"localhost.:{port}",
            f"0.0.0.0:{port}",
            f"[::1]:{port}",
            f"user@127.0.0.1:{port}",
            "",
            f"127.0.0.1:{port}0",
        )
    ]
    foreign += [
        [("Host", opened.host), ("Origin", origin)]
        for origin in (
            "null",
            "http://example.com",
            f"http://example.com:{port}",
            f"http://127.0.0.1:{port + 1}",
            "http://127.0.0.1",
            f"https://{opened.host}",
            f"http://localhost:{port}",
            f"{own}.example.com",
            "",
            f"file://{opened.host}",
        )
    ]
    foreign += [
        [("Host", opened.host), ("Host", "example.com")],
        [("Host", opened.host), ("Origin", own), ("Origin", "null")],
    ]
    foreign += [
        [("Host", opened.host), ("Origin", "http://example.com"), ("Connection", "Upgrade"), ("Upgrade", "websocket"),
         ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "MDEyMzQ1Njc4OWFiY2RlZg==")],
        [("Host", "example.com"), ("X-Forwarded-Host", opened.host), ("Forwarded", f"host={opened.host}")],
    ]  # fmt: skip
    for headers in foreign:
        for path in ("", "config", "gradio_api/heartbeat/x", "gradio_api/queue/data?session_hash=x"):
            status, text = opened.request("GET", opened.secret + path, headers)
            assert status in (400, 403), (headers, path)
            assert "script" not in text
            assert "access-control" not in text.lower()
        for method in ("POST", "OPTIONS", "HEAD", "PUT"):
            status, _ = opened.request(method, f"{opened.secret}gradio_api/run/predict", headers, b"{}")
            assert status in (400, 403), (headers, method)
    for headers in ([("Origin", "http://example.com")], [("Origin", "null")]):
        assert opened.call(("finish", "click"), [1], *headers)[0] == 403
    assert opened.call(("finish", "click"), [1], host=f"example.com:{port}")[0] == 403
    for secret in ("/", opened.secret[:-2] + "/", f"/{'x' * (len(opened.secret) - 2)}/", opened.secret[:-1], "//"):
        assert opened.call(("finish", "click"), [1], secret=secret)[0] == 403
        for path in ("", "config", "theme.css", "assets/x.js", "gradio_api/info", f"?token={opened.secret}"):
            assert opened.request("GET", secret + path, [("Host", opened.host)])[0] in (403, 404)
    assert opened.answers == []


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_requests_of_the_page_are_answered(opened, name):
    host = f"{name}:{opened.port}"
    assert opened.request("GET", opened.secret, [("Host", host)])[0] == 200
    assert opened.call(("finish", "click"), [1], ("Origin", f"http://{host.lower()}"), host=host)[0] == 200
    opened.until(lambda: opened.answers)
    assert opened.answers == [Choice("finish")]


def test_routes_that_the_page_does_not_need_are_refused(opened):
    others = (
        "config config/ login login/ logout monitoring monitoring/x manifest.json robots.txt pwa_icon gradio_api/info "
        "gradio_api/upload gradio_api/upload_progress gradio_api/api/predict gradio_api/call/x "
        "gradio_api/startup-events gradio_api/component_server gradio_api/reset gradio_api/cancel "
        "gradio_api/proxy=http://example.com gradio_api/file=/etc/hostname gradio_api/mcp/sse gradio_api/deep_link "
        "gradio_api/stream/x/y/z/playlist.m3u8 gradio_api/queue/status gradio_api/process_recording docs openapi.json"
    ).split()
    for path in others:
        for method in ("GET", "POST"):
            assert opened.request(method, opened.secret + path, [("Host", opened.host)], b"{}")[0] in (403, 404), (
                method,
                path,
            )


def test_uploads_and_other_files_are_refused(opened, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nhello\r\n--x--\r\n'
    headers = [("Host", opened.host), ("Content-Type", "multipart/form-data; boundary=x")]
    for path in (
        "upload",
        "gradio_api/upload",
        "gradio_api/upload/",
        "gradio_api/upload?upload_id=1",
        "gradio_api/stream/x",
    ):
        assert opened.request("POST", opened.secret + path, headers, body)[0] == 404
    assert sorted(tmp_path.rglob("*")) == before
    (other := tmp_path / "other.png").write_bytes(b"secret")
    folder = opened.page.images
    (hidden := folder / "hidden").mkdir()
    (hidden / "other.png").write_bytes(b"secret")
    for file in (
        other,
        hidden / "other.png",
        f"{folder}/../other.png",
        f"{folder}/..%2fother.png",
        Path(__file__),
        "/etc/hostname",
    ):
        for route in ("file=", "file/", "proxy=file://", "proxy=http://example.com/"):
            status, text = opened.get(f"gradio_api/{route}{file}")
            assert (status, "secret" in text) == (404, False), (route, file)


def test_refused_request_with_a_body_is_answered(opened):
    """A connection that is closed before the body is read would be reset, and the answer lost."""
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", opened.port), timeout=10) as connection:
            head = f"POST {opened.secret}x HTTP/1.1\r\nHost: example.com\r\nContent-Length: 40000\r\n\r\n"
            connection.sendall(head.encode())
            time.sleep(0.02)  # the body arrives after an early answer
            connection.sendall(b"x" * 20000)
            time.sleep(0.02)
            connection.sendall(b"x" * 20000)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 403")
        assert b"a tunnel must have this port on both ends" in answer


def test_images_of_a_round_are_deleted_after_it(opened):
    first = image_paths(opened.content())
    assert len(first) == 3
    assert all(path.startswith(opened.secret) for path in first)
    assert [opened.request("GET", path, [("Host", opened.host)])[0] for path in first] == [200] * 3
    assert all(
        opened.request("GET", path.removeprefix(opened.secret[:-1]), [("Host", opened.host)])[0] == 403
        for path in first
    )
    assert all(opened.request("GET", path, [("Host", "example.com")])[0] == 403 for path in first)
    opened.call(("others", "click"), [1])
    opened.until(lambda: opened.page.view.question == 2 and opened.page.view.ready)
    assert [opened.request("GET", path, [("Host", opened.host)])[0] for path in first] == [403] * 3  # gradio's answer
    content = opened.content()
    assert [opened.request("GET", path, [("Host", opened.host)])[0] for path in image_paths(content)] == [200] * 3
    assert len(list(opened.page.images.iterdir())) == 3 + 2  # the candidates, the current image, and the map


def test_prompts_and_captions_are_escaped(opened):
    content = opened.content()
    status = VisibleText(content["status"])
    assert status.text == f"Prompt: {ESCAPED}Moves so far: 0. Select the candidate that you like best."
    assert status.tags == [("strong", []), ("br", [])]
    assert [image["caption"] for image in content["candidates"]["value"]] == [f"{i}  {ESCAPED}" for i in (1, 2, 3)]
    opened.stopped = True
    opened.until(lambda: opened.answers)
    opened.page.publish(prompt="", status="Finished. The results are in /<b>runs</b>\x1b[0m.")
    status = VisibleText(opened.content()["status"])
    assert (status.text, status.tags) == ("Finished. The results are in /<b>runs</b>\\x1b[0m.", [])


def test_closed_page_leaves_no_files(opened, tmp_path, monkeypatch):
    opened.content()
    assert list(opened.page.images.iterdir())
    opened.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        opened.get("")
    opened.close()  # again


def test_page_that_fails_to_open_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        "lightning_prompts.methods.steering.human_feedback.server.secrets.token_urlsafe", lambda *_: 1 / 0
    )
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        Page(show=False).open(None, True)
    assert list(tmp_path.glob("lightning-prompts-*")) == []
    assert set(threading.enumerate()) == before


def test_page_restores_the_gradio_folder_and_has_a_long_secret(opened, monkeypatch):
    import os

    assert os.environ["GRADIO_TEMP_DIR"] == str(opened.page.images)
    first = opened.secret
    opened.close()
    assert "GRADIO_TEMP_DIR" not in os.environ
    assert len(first) > 32
