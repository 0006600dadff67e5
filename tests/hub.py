"""A small hub that serves folders and can simulate failures."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub


class Hub:
    """Serve the files of models.

    Attributes:
        models: For each model, its commits by revision and its folders by commit.
        answer: Statuses and headers to answer instead, by the start of the path.
        broken: The end of the path of a file whose download is interrupted.
        asked: The requests so far.
    """

    def __init__(self):
        self.models, self.answer, self.broken, self.asked = {}, {}, None, []
        self.hangs, self.end = False, threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.end.set()
        self.server.shutdown()
        self.server.server_close()

    def push(self, name, folder, revision="main"):
        """Add a commit of a model and return it."""
        refs, commits = self.models.setdefault(name, ({}, {}))
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        refs[revision], commits[commit] = commit, Path(folder)
        return commit


class Handler(BaseHTTPRequestHandler):
    """Answer huggingface_hub as https://huggingface.co does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if self.hub.hangs:
            self.hub.end.wait()
            return None
        for start, (status, headers) in self.hub.answer.items():
            if path.startswith(start):
                return self.reply(status, **headers)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or resolve):
            return self.reply(404)
        name, what, revision = api.groups() if api else (resolve[1], "resolve", resolve[2])
        if name not in self.hub.models:
            return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        refs, commits = self.hub.models[name]
        commit = refs.get(revision or "main", revision)
        if commit not in commits:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        folder = commits[commit]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            return self.reply(
                200,
                json.dumps(
                    [
                        {
                            "type": "file",
                            "path": str(path.relative_to(folder)),
                            "size": path.stat().st_size,
                            "oid": etag(path),
                        }
                        for path in files
                    ]
                ).encode(),
                Content_Type="application/json",
            )
        if api:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            if "blobs=true" in self.path.lower():
                siblings = [{**file, "size": path.stat().st_size} for file, path in zip(siblings, files, strict=True)]
            body = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
            return self.reply(200, body, Content_Type="application/json")
        file = folder / resolve[3]
        if file not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.send(file, commit)

    do_HEAD = do_GET

    def send(self, path, commit):
        body, headers = path.read_bytes(), {"ETag": f'"{etag(path)}"', "X_Repo_Commit": commit}
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        if self.hub.broken and self.command == "GET" and str(path).endswith(self.hub.broken):
            self.close_connection = True
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin : len(body) // 2])
            return
        self.reply(206 if begin else 200, body[begin:], **headers)


def forget_connections():
    """Close open connections, which would be reused."""
    utils = huggingface_hub.utils
    (utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions)()  # the latter in old versions


def etag(path):
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
