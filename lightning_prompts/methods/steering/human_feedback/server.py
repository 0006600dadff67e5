"""The server of the page, and the filter of its requests.

Any page in a browser can send requests to 127.0.0.1, and so can any user of this machine. So requests are answered only
if they name this server as their host, come from its own page, have the secret in its address, and use a route that the
page needs.
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
ROUTES = {  # of gradio, without those that upload files, describe the server or serve files that are not the page's
    "GET": r"/|/(assets|static)/.+|/theme\.css|/gradio_api/(heartbeat/\w+|queue/data)",
    "POST": r"/gradio_api/(run/\w+|queue/join)/?",
}
DRAINED = 2**16  # bytes of a refused request that are read and dropped
HEADERS = [
    (b"cache-control", b"no-store"),  # keeps images out of the browser's cache
    (b"referrer-policy", b"no-referrer"),  # the address is a secret
    (b"x-frame-options", b"DENY"),  # no other page may embed this one to capture clicks
    (b"x-content-type-options", b"nosniff"),
]


class RequestFilter:
    """An ASGI application that passes on the requests of the page, and refuses all others.

    Args:
        app: The application to protect, mounted at `prefix`.
        port: Port of the server.
        prefix: Secret part of the address, such as /secret.
        images: Folder of the images that the page shows.
    """

    def __init__(self, app: App, port: int, prefix: str, images: Path) -> None:
        self.app, self.prefix, self.images = app, prefix.encode(), images
        names = [f"{name}:{port}" for name in (HOST, "localhost")] + ([HOST, "localhost"] if port == 80 else [])
        self.names, self.port = [name.encode() for name in names], port

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on an allowed request, and refuse any other."""
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
        while more and size < DRAINED:  # closing a connection with unread bytes would lose the response
            message = await receive()
            more, size = message.get("more_body", False), size + len(message.get("body", b""))
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return the status and the reason of a refusal; None if the request is allowed."""
        hosts, origins = (
            [value.lower() for key, value in scope["headers"] if key == name] for name in (b"host", b"origin")
        )
        if len(hosts) != 1 or hosts[0] not in self.names:
            return 403, (
                f"Open this page as {HOST}:{self.port} or localhost:{self.port}; a tunnel must have this port on both "
                "ends.\n"
            )
        if any(origin != b"http://" + hosts[0] for origin in origins):
            return 403, "This request comes from another page.\n"
        path = str(scope["path"])
        secret, inside = path[: len(self.prefix)], path[len(self.prefix) :]
        if not secrets.compare_digest(secret.encode(errors="replace"), self.prefix) or not inside.startswith("/"):
            return 403, "Open the full address that the terminal shows.\n"
        allowed = re.fullmatch(ROUTES.get(scope["method"], "(?!)"), inside)
        if not allowed and not (scope["method"] == "GET" and self.is_image(inside)):
            return 404, "This page does not exist.\n"
        return None

    def is_image(self, path: str) -> bool:
        """Return whether a path names an image that the page shows."""
        match = re.fullmatch(r"/gradio_api/file=(.+)/\w+\.png", path)
        return match is not None and Path(match[1]) == self.images


class Server:
    """A server of one gradio page, in a thread of its own.

    Args:
        gradio: The gradio module.
        page: The page, whose components keep their files in `images`.
        port: Port on 127.0.0.1; 0 for the first free one from 7860.
        images: Folder of the images that the page shows.
        settings: Further arguments of `gradio.mount_gradio_app`.
    """

    def __init__(self, gradio: Any, page: Any, port: int, images: Path, **settings: Any) -> None:
        import uvicorn
        from fastapi import FastAPI

        self.socket = _listening(port)
        try:
            port = self.socket.getsockname()[1]
            prefix = f"/{secrets.token_urlsafe(24)}"
            self.address = f"http://{HOST}:{port}{prefix}/"
            app = gradio.mount_gradio_app(
                FastAPI(openapi_url=None), page, prefix, server_name=HOST, server_port=port, root_path=prefix,
                allowed_paths=[str(images)], ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
                **settings,
            )  # fmt: skip
            config = uvicorn.Config(
                RequestFilter(app, port, prefix, images), ws="none", proxy_headers=False, server_header=False,
                access_log=False, log_config=None, log_level="critical",
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
    """Return a socket that listens on a port; for 0 on the first free one."""
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
                    f"--model.chooser.port must be 1024 or above for this user, got {port}; give another port, or 0 "
                    "for a free one."
                ) from None
        else:
            return listening
    if port:
        raise UserError(f"Port {port} is in use; give --model.chooser.port another one, or 0 for a free one.")
    raise UserError(f"No port from {FIRST} to {FIRST + TRIED - 1} is free; give another one as --model.chooser.port.")
