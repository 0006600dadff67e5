"""The server of the page, and the door that every request to it passes.

Any page that a browser shows can send requests to 127.0.0.1, and any person of this machine can, too. So requests are answered
only if they name this server as their host, come from its own page, know the secret of this run that its address has, and ask
for what the page needs.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HOST, FIRST, TRIED = "127.0.0.1", 7860, 100
NEEDED = {  # of gradio's routes, without those that take files, tell of the server or give files that are not the page's
    "GET": r"/|/(assets|static)/.+|/theme\.css|/gradio_api/(heartbeat/\w+|queue/data)",
    "POST": r"/gradio_api/(run/\w+|queue/join)/?",
}
DRAINED = 2**16  # bytes of a refused request that are read and forgotten
HEADERS = [
    (b"cache-control", b"no-store"),  # what was drawn is not to stay in the browser's files
    (b"referrer-policy", b"no-referrer"),  # the address is a secret
    (b"x-frame-options", b"DENY"),  # no other page is to lead the person's clicks here
    (b"x-content-type-options", b"nosniff"),
]


class Door:
    """An ASGI application that lets those requests through that the page makes, and refuses all others.

    Args:
        app: The application behind it, mounted at `prefix`.
        port: Where it is reached.
        prefix: The part of the address that is secret, such as /secret.
        pictures: The folder of the pictures that the page shows.
    """

    def __init__(self, app: App, port: int, prefix: str, pictures: Path) -> None:
        self.app, self.prefix, self.pictures = app, prefix.encode(), pictures
        names = [f"{name}:{port}" for name in (HOST, "localhost")] + ([HOST, "localhost"] if port == 80 else [])
        self.names, self.port = [name.encode() for name in names], port

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is None:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", []), *HEADERS]
                await send(message)

            await self.app(scope, receive, answer)
            return
        more, size = True, 0
        while more and size < DRAINED:  # a connection that is closed with something unread loses the answer
            message = await receive()
            more, size = message.get("more_body", False), size + len(message.get("body", b""))
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def refusal(self, scope: Message) -> tuple[int, str] | None:
        """Why a request is not answered, with the status that says so; None if it is."""
        hosts, origins = (
            [value.lower() for key, value in scope["headers"] if key == name] for name in (b"host", b"origin")
        )
        if len(hosts) != 1 or hosts[0] not in self.names:
            return 403, (
                f"This page is reached as {HOST}:{self.port} or localhost:{self.port}; a tunnel must have this port on both ends.\n"
            )
        if any(origin != b"http://" + hosts[0] for origin in origins):
            return 403, "This request comes from another page.\n"
        path = str(scope["path"])
        secret, inside = path[: len(self.prefix)], path[len(self.prefix) :]
        if not secrets.compare_digest(secret.encode(errors="replace"), self.prefix) or not inside.startswith("/"):
            return 403, "Open the whole address that the terminal names.\n"
        needed = re.fullmatch(NEEDED.get(scope["method"], "(?!)"), inside)
        if not needed and not (scope["method"] == "GET" and self.is_picture(inside)):
            return 404, "The page has nothing there.\n"
        return None

    def is_picture(self, path: str) -> bool:
        """Whether a path names a picture that the page shows."""
        found = re.fullmatch(r"/gradio_api/file=(.+)/\w+\.png", path)
        return found is not None and Path(found[1]) == self.pictures


class Server:
    """A server of one gradio page, in a thread of its own.

    Args:
        gradio: The module.
        page: The page, whose parts keep their files in `pictures`.
        port: Where it listens on 127.0.0.1; 0 for the first free one from 7860.
        pictures: The folder of the pictures that it shows.
        settings: Further ones of `gradio.mount_gradio_app`.
    """

    def __init__(self, gradio: Any, page: Any, port: int, pictures: Path, **settings: Any) -> None:
        import uvicorn
        from fastapi import FastAPI

        self.socket = _listening(port)
        try:
            port = self.socket.getsockname()[1]
            prefix = f"/{secrets.token_urlsafe(24)}"
            self.address = f"http://{HOST}:{port}{prefix}/"
            app = gradio.mount_gradio_app(
                FastAPI(openapi_url=None), page, prefix, server_name=HOST, server_port=port, root_path=prefix,
                allowed_paths=[str(pictures)], ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, **settings,
            )  # fmt: skip
            config = uvicorn.Config(
                Door(app, port, prefix, pictures), ws="none", proxy_headers=False, server_header=False, access_log=False,
                log_config=None, log_level="critical",
            )  # fmt: skip
            self.server = uvicorn.Server(config)
            self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
            self.thread.start()
            while not self.server.started and self.thread.is_alive():
                time.sleep(0.01)
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """End all connections and stop."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=5)
        self.socket.close()


def _listening(port: int) -> socket.socket:
    """A socket that listens on a port; for 0 on the first free one."""
    for tried in [port] if port else range(FIRST, FIRST + TRIED):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, tried))
            listening.listen()
        except OSError as error:
            listening.close()
            if port and isinstance(error, PermissionError):
                raise UserError(
                    f"Port {port} cannot be listened on by this user; give --model.chooser.port one from 1024, or 0 to take one that is free."
                ) from None
        else:
            return listening
    if port:
        raise UserError(f"Port {port} is in use; give --model.chooser.port another one, or 0 to take one that is free.")
    raise UserError(f"No port from {FIRST} to {FIRST + TRIED - 1} is free; give --model.chooser.port another one.")
