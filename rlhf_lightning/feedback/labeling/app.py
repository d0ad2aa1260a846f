"""The labeling page as a Starlette application: static files, and one JSON request for every thing one can do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.overview import overview
from rlhf_lightning.feedback.labeling.refused import Refused
from rlhf_lightning.feedback.labeling.security import Guard, Links
from rlhf_lightning.feedback.labeling.service import Answer, Labeling

OVERVIEW = "overview"
"""Takes the place of an annotator's name in the links."""
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
STATIC = {
    file.name: (file.read_bytes(), TYPES[file.name.rpartition(".")[2]])
    for file in files("rlhf_lightning.feedback.labeling").joinpath("static").iterdir()
    if file.name.rpartition(".")[2] in TYPES
}
UNKNOWN = "This link is not known here. It may be of an earlier start: ask for the link that was printed last."
STALE = "This link was opened in another tab or browser. Labels go on there."
STATUS = {"unknown": 403, "stale": 409, "values": 400, "model": 502, "disk": 507}

Action = Callable[[Labeling, str, Answer], Answer | None]
ACTIONS: dict[str, Action] = {
    "state": lambda labeling, name, _: None,
    "label": lambda labeling, name, body: labeling.label(name, text(body, "item"), text(body, "request"), body),
    "skip": lambda labeling, name, body: labeling.skip(name, *texts(body, "item", "request", "reason")),
    "flag": lambda labeling, name, body: labeling.flag(name, *texts(body, "item", "request", "reason")),
    "undo": lambda labeling, name, body: {"undone": labeling.undo(name, text(body, "request"))},
    "group": lambda labeling, name, body: labeling.group(name, text(body, "request"), body.get("group")),
    "withdraw": lambda labeling, name, body: labeling.withdraw(name, text(body, "request")),
    "say": lambda labeling, name, body: labeling.say(name, text(body, "request"), text(body, "text")),
    "new": lambda labeling, name, body: labeling.new_conversation(name, text(body, "request")),
}
"""What an annotator can do -> what does it; the state that follows goes back with the answer."""
ABOVE: dict[str, Action] = {
    "state": lambda labeling, name, _: None,
    "withdraw": lambda labeling, name, body: labeling.withdraw(
        text(body, "annotator"), text(body, "request"), "who runs it"
    ),
}
"""The same for the overview."""


def application(labeling: Labeling, links: Links) -> Starlette:
    """Return the page of `labeling`, for the names that `links` has: annotators, and the overview."""

    async def page(request: Request) -> Response:
        name = request.path_params["name"]
        return served("overview.html" if name == OVERVIEW else "index.html")

    async def static(request: Request) -> Response:
        return served(request.path_params["file"])

    async def call(request: Request) -> JSONResponse:
        name, action = request.path_params["name"], request.path_params["action"]
        cookie = f"rlhf_{request.url.port or 80}"  # cookies of a host are those of all its ports
        try:
            body = await read(request)
            if action == "open":
                return await run_in_threadpool(opened, request, name, body, cookie)
            state = links.state(name, request.cookies.get(cookie), request.headers.get("x-tab"))
            if state != "open":
                raise Refused(state, STALE if state == "stale" else UNKNOWN)
            do = (ABOVE if name == OVERVIEW else ACTIONS).get(action)
            if do is None:
                raise Refused("values", f"There is no action {action!r}.")
            return JSONResponse(await run_in_threadpool(answered, do, name, body))
        except Refused as error:
            after = {"state": "", "unknown": "", "stale": ""}
            more = {} if error.reason in after else {"state": await run_in_threadpool(current, name)}
            return JSONResponse({"error": str(error), "reason": error.reason} | more, STATUS.get(error.reason, 409))
        except UserError as error:
            return JSONResponse({"error": str(error), "reason": "disk"}, STATUS["disk"])
        except asyncio.CancelledError:  # an answer was waited for when the server ended
            return JSONResponse({"error": "The server has ended.", "reason": "disk"}, 503)

    def opened(request: Request, name: str, body: Answer, cookie: str) -> JSONResponse:
        found = links.open(name, body.get("token"), request.cookies.get(cookie))
        if found is None:
            raise Refused("unknown", UNKNOWN)
        first = overview(labeling) if name == OVERVIEW else labeling.start(name)
        response = JSONResponse({"tab": found[1], "state": first})
        response.set_cookie(cookie, found[0], path=f"/a/{name}", httponly=True, samesite="strict")
        return response

    def answered(do: Action, name: str, body: Answer) -> Answer:
        more = do(labeling, name, body)
        return {"state": current(name)} | (more or {})

    def current(name: str) -> Answer:
        return overview(labeling) if name == OVERVIEW else labeling.state(name)

    return Starlette(
        routes=[
            Route("/a/{name}", page),
            Route("/a/{name}/{action}", call, methods=["POST"]),
            Route("/static/{file}", static),
        ],
        middleware=[Middleware(Guard)],
    )


def served(name: str) -> Response:
    """Return a static file."""
    if name not in STATIC:
        return JSONResponse({"error": "there is no such page"}, 404)
    content, kind = STATIC[name]
    return Response(content, media_type=kind)


async def read(request: Request) -> Answer:
    """Return the object in the body of a request."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused("values", "A request has an object in JSON.")
    return body


def text(body: Answer, name: str) -> str:
    """Return a text of a request."""
    value: Any = body.get(name)
    if not isinstance(value, str) or not value or (name == "request" and len(value) > 100):
        raise Refused("values", f"A request of this kind has a text {name!r}.")
    return value


def texts(body: Answer, *names: str) -> list[str]:
    """Return several texts of a request."""
    return [text(body, name) for name in names]
