"""How rewards ask a server: a deadline, retries, a bounded answer, and no redirect."""

import base64
import contextlib
import io
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent import futures
from http.client import HTTPException
from urllib.parse import urlsplit

from PIL import Image

from common.rewards.base import RewardError
from common.users_code import quoted, shortened

SERVER_NUMBERS = {"timeout": (1, 60, 86_400), "retries": (0, 5, 100), "concurrency": (1, 8, 256)}
"""Options of a reward on a server: least, default and most; timeout in seconds."""
LONGEST_ANSWER = 1 << 20
"""Bytes; descriptions and scores have hundreds, and a list of models some thousands."""


def within(seconds: float, call: Callable, close: Callable):
    """What `call()` returns, or a TimeoutError; close() then ends what it waits for.

    A socket's own time-out begins anew with every byte that comes.
    """
    future = futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except futures.TimeoutError:  # before Python 3.11 no OSError
        close()
        raise TimeoutError(f"no whole answer within {seconds} s") from None


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other fault: the key is for the named server alone."""

    def redirect_request(self, *of_the_request):
        return None


def noting(handler: type, sockets: list, deadline: float) -> type:
    """`handler` of urllib, which adds each connection's socket to `sockets`."""

    class Noting(handler):
        def do_open(self, http_class, request, **options):
            class Connection(http_class):
                def connect(self):
                    super().connect()
                    sockets.append(self.sock)
                    if time.monotonic() > deadline:  # whoever closes them may have been here before
                        self.close()
                        raise TimeoutError

            return super().do_open(Connection, request, **options)

    return Noting


def fetch(request: urllib.request.Request, seconds: float) -> tuple[int, str, bytes]:
    """Status, reason and body of an answer, up to a byte more than LONGEST_ANSWER.

    At the deadline the connection is closed, so that nothing goes on reading.
    """
    sockets, deadline = [], time.monotonic() + seconds
    schemes = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
    handlers = [noting(handler, sockets, deadline) for handler in schemes]
    opener = urllib.request.build_opener(NoRedirects, *handlers)

    def call() -> tuple[int, str, bytes]:
        try:
            with opener.open(request, timeout=seconds) as response:
                return response.status, response.reason, response.read(LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.reason, error.read(LONGEST_ANSWER + 1)

    def close() -> None:
        for connection in sockets:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    return within(seconds, call, close)


def bearer_token(variable: str) -> str:
    """The key in an environment variable, empty if there is none.

    Raises RewardError for one that cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):  # http.client's own error would quote it
        raise RewardError(f"{variable} has characters that no header can have; set it anew")
    return key


def ask_server(
    what: str, url: str, body: dict | None, timeout: float, retries: int, token: str = ""
):
    """The JSON that a server answers to a POST of `body`, or to a GET without one.

    Tried again, ever later, after faults that may pass; raises RewardError when it stays down, of
    `what`, "the VLM server" for one. `token` goes to the server as a bearer's.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(retries + 1):
        try:
            status, reason, answer = fetch(urllib.request.Request(url, data, headers), timeout)
            if status < 300 and len(answer) > LONGEST_ANSWER:
                fault = f"an answer of more than {LONGEST_ANSWER} bytes"
                break
            if status < 300:
                return json.loads(answer)
            fault = (
                f"HTTP {status} {shortened(reason)}: {shortened(answer.decode(errors='replace'))}"
            )
            if 300 <= status < 400:
                fault += "; a redirect is not followed: name the server where it is"
            if status < 500 and status not in (408, 409, 425, 429):
                break
        # No connection or a time-out, half an answer, not JSON or nested too deep.
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            reason = getattr(error, "reason", error)  # of a URLError, which has it in brackets
            fault = shortened(str(reason)) or type(error).__name__
            if isinstance(error, OSError):
                fault += "; is it running, and is this its address?"
        if attempt < retries:
            time.sleep(min(0.5 * 2**attempt, 30))
    where = f"{what} {shortened(url)}"
    raise RewardError(f"{where} failed {attempt + 1} times, at last with: {fault}")


def base64_png(picture: Image.Image) -> str:
    """A picture as a PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def whole_numbers(
    name: str, options: dict[str, str], known: dict[str, tuple[int, int, int]]
) -> dict[str, int]:
    """The numbers among a reward's options; `known` has the least, default and most of each.

    Raises RewardError for another value.
    """
    numbers = {}
    for option, (least, default, most) in known.items():
        text = options.get(option, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            what = f"{option}={shortened(text)} of {name}"
            raise RewardError(
                f"{what} must be a whole number of {least} or more, and at most {most}"
            )
        numbers[option] = int(text)
    return numbers


def is_url(text: str | None) -> bool:
    return text is not None and text.startswith(("http://", "https://"))


def check_url(url: str, example: str) -> None:
    """Raises RewardError, which shows an `example`, for one that no request can be sent to."""
    try:
        parts = urlsplit(url)
        ok = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not parts.fragment
        ok = ok and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, a bracket that is not closed
        ok = False
    if not ok:
        raise RewardError(f"{quoted(url)} is no URL of a server; write {example}")
