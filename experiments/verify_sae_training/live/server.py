"""The server behind the live page: checks each request, hands it to the model's thread, answers in JSON.

    asyncio.run(serve(Site(live, folder, seconds=60), take_port(8710), ready=print))
"""
import asyncio
import json
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from lib.environment import InputError, first_line, in_one_line, log
from lib.schemas import COUNT, Misfit, Number, check
from live.access import HEADERS, NOT_FRAMED, cookie_name, refusal
from live.answers import Live, Order, Place, about, read, take_away, write
from live.pages import OPENING, served_page
from live.worker import Busy, Worker

HOST = "127.0.0.1"
LONGEST_TEXT = 20_000  # characters
LARGEST_BODY = 12 * LONGEST_TEXT + 1000  # bytes; JSON writes a character in at most twelve
LARGEST_HEADER, IDLE = 1 << 14, 120  # bytes; seconds
STRENGTH = Number(float, -100, 100)
SEED = Number(int, 0, 2**32 - 1)
UNTOLD = {404: "there is no such page", 405: "the request's method is not GET or POST as it should be"}
KINDS = {".js": "text/javascript", ".css": "text/css", ".json": "application/json"}


class Site(NamedTuple):
    """What is served."""

    live: Live
    folder: Path
    """Where concepts.html is, or will be."""
    seconds: float
    """The longest time for the two texts of one request."""


class Handler(RequestHandler):
    """What all answers share: who is let in, and errors in one line."""

    def initialize(self, site: Site, worker: Worker, token: str, port: int) -> None:
        self.site, self.worker, self.token, self.port = site, worker, token, port
        self.gone = threading.Event()

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        if why := refusal(self.request, self.port, self.token):
            raise HTTPError(403, why)

    def on_connection_close(self) -> None:
        self.gone.set()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": self.line_of(kwargs["exc_info"][1])}))

    def line_of(self, error: BaseException) -> str:
        if isinstance(error, HTTPError):
            return (error.log_message or UNTOLD.get(error.status_code, "the request is refused")) % error.args
        return in_one_line(error) or f"the server failed: {first_line(error)}"

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, HTTPError | StreamClosedError) and in_one_line(value) is None:
            log.error("a request failed", exc_info=(typ, value, tb))

    def body(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The request's JSON, checked."""
        try:
            value = json.loads(self.request.body)
            check(value, wanted)
            value["text"].encode()  # half a character can't be read
        except (ValueError, RecursionError):
            raise HTTPError(400, "the request is no JSON text") from None
        except Misfit as misfit:
            raise HTTPError(400, str(misfit)) from None
        if len(value["text"]) > LONGEST_TEXT:
            raise HTTPError(413, f"the text has more than {LONGEST_TEXT:,} characters; shorten it")
        return value

    def latent(self) -> Number:
        return Number(int, 0, self.site.live.encoder.sae.n_latents - 1)

    async def ask(self, work: Callable[[], Any]) -> Any:
        """What the model's thread answers; nothing is started for a reader who left."""
        try:
            return await self.worker.run(lambda: None if self.gone.is_set() else work())
        except Busy:
            raise HTTPError(503, "the model is busy; try again in a moment") from None
        except InputError as error:
            raise HTTPError(400, str(error)) from None

    def page(self, page: str) -> None:
        """A page, which says itself what it may load."""
        self.set_header("Content-Security-Policy", NOT_FRAMED)
        self.finish(page)

    def reply(self, found: Any) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(found))


class Nothing(Handler):
    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404)


class Opening(Handler):
    def get(self) -> None:
        """Swap the token in the URL for a cookie, and go on to the page."""
        self.set_cookie(cookie_name(self.port), self.token, httponly=True, samesite="Strict", path="/")
        self.page(OPENING)


class Page(Handler):
    def get(self) -> None:
        self.page(served_page(self.site.folder))


class File(Handler):
    def get(self, name: str) -> None:
        """A file of the panel, or of the page's data; the routes allow plain names only."""
        folder = self.site.folder / "concepts_data" if "/" in name else Path(__file__).parent
        path = folder / name.rpartition("/")[2]
        if not path.is_file() or path.is_symlink() or path.suffix not in KINDS:
            raise HTTPError(404)
        self.set_header("Content-Type", f"{KINDS[path.suffix]}; charset=utf-8")
        self.finish(path.read_bytes())


class About(Handler):
    def get(self) -> None:
        self.reply(about(self.site.live) | {"text_characters": LONGEST_TEXT})


class Read(Handler):
    async def post(self) -> None:
        body = self.body({"text": str, "latent": (self.latent(), None)})
        self.worker.newer()
        start = time.perf_counter()
        found = await self.ask(partial(read, self.site.live, body["text"], body["latent"]))
        if found is not None:
            self.reply(found | {"ms": round(1000 * (time.perf_counter() - start), 1)})


class Without(Handler):
    async def post(self) -> None:
        body = self.body({"text": str, "token": COUNT, "latent": self.latent(), "everywhere": bool})
        place = Place(body["text"], body["token"])
        found = await self.ask(partial(take_away, self.site.live, place, body["latent"], everywhere=body["everywhere"]))
        if found is not None:
            self.reply(found)


class Write(Handler):
    async def post(self) -> None:
        """One line of JSON after each token, for the text as it is and then for the edited one."""
        body = self.body({"text": str, "latent": self.latent(), "strength": STRENGTH, "seed": SEED})
        said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        newer, loop = self.worker.newer(), asyncio.get_running_loop()
        ends = [0.0]

        def stop() -> bool:
            return newer.is_set() or self.gone.is_set() or time.monotonic() > ends[0]

        def say(found: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(said.put_nowait, found)

        def work() -> None:
            ends[0] = time.monotonic() + self.site.seconds
            write(self.site.live, Order(body["text"], body["seed"]), body["latent"], body["strength"], stop=stop,
                  say=say)

        asked = asyncio.ensure_future(self.ask(work))
        asked.add_done_callback(lambda _: said.put_nowait(None))
        self.set_header("Content-Type", "application/x-ndjson")
        try:
            while (found := await said.get()) is not None:
                await self.tell(found)
            await asked
            if newer.is_set():
                await self.tell({"stopped": "stopped: there is a newer request"})
            elif time.monotonic() > ends[0]:
                await self.tell({"stopped": f"stopped after {self.site.seconds:g} seconds"})
        except StreamClosedError:
            self.gone.set()
        except Exception as error:
            if not self._headers_written:
                raise
            self.log_exception(type(error), error, error.__traceback__)
            await self.tell({"error": self.line_of(error)})

    async def tell(self, found: dict[str, Any]) -> None:
        self.write(json.dumps(found) + "\n")
        await self.flush()


def application(site: Site, worker: Worker, token: str, port: int) -> Application:
    shared = {"site": site, "worker": worker, "token": token, "port": port}
    routes: list[Any] = [
        (r"/", Opening), (r"/concepts.html", Page), (r"/about", About), (r"/read", Read), (r"/without", Without),
        (r"/write", Write), (r"/(live\.(?:js|css)|concepts_data/[A-Za-z0-9_][A-Za-z0-9_.\-]*)", File),
    ]
    return Application([(path, handler, shared) for path, handler in routes], default_handler_class=Nothing,
                       default_handler_args=shared, log_function=lambda handler: None)


def take_port(port: int) -> list[socket.socket]:
    """Sockets bound to a port of 127.0.0.1; port 0 takes any free one. Raises InputError if it is taken."""
    try:
        return bind_sockets(port, HOST)
    except OSError as error:
        raise InputError(f"PORT={port} can't be used ({error.strerror}); set another, or PORT=0 for any free one"
                         ) from None


def listen(site: Site, sockets: list[socket.socket]) -> tuple[HTTPServer, Worker, str]:
    """A server, started in the running loop, with its worker and the URL that opens the page."""
    port, token, worker = sockets[0].getsockname()[1], secrets.token_urlsafe(24), Worker()
    server = HTTPServer(application(site, worker, token, port), max_body_size=LARGEST_BODY,
                        max_header_size=LARGEST_HEADER, idle_connection_timeout=IDLE, body_timeout=IDLE)
    server.add_sockets(sockets)
    return server, worker, f"http://{HOST}:{port}/?token={token}"


async def serve(site: Site, sockets: list[socket.socket], ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. ready: called with the URL once it answers."""
    server, worker, url = listen(site, sockets)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    ready(url)
    await ended.wait()
    server.stop()
    worker.close()
    await server.close_all_connections()
