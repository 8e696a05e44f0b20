"""Errors as OpenAI's API has them, whatever went wrong."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dera_peft.errors import DeRaError

logger = logging.getLogger(__name__)

INVALID, SERVER = "invalid_request_error", "server_error"
LONGEST = 2000  # characters of a message: one that repeats the input could be as long as that


class APIError(Exception):
    """
    An answer to a client's mistake.

    Args:
        message: for a person: what is wrong and the way out.
        status: of HTTP.
        param: which field of the request.
        code: a word for programs, as OpenAI has them.
        kind: the error's "type".
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind
        self.headers = headers

    def body(self) -> dict[str, Any]:
        message = self.message if len(self.message) <= LONGEST else self.message[:LONGEST] + " …"
        # half a character, which JSON's escapes can name, is no UTF-8
        message = message.encode("utf-8", "replace").decode("utf-8")
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def server_ends() -> APIError:
    return APIError("the server is ending", 503, code="server_ends", kind=SERVER, headers={"Retry-After": "10"})


def from_user_error(error: DeRaError, fields: Mapping[str, Any]) -> APIError:
    """
    A setting's message (`temperature=-1 must be …`) as an answer.

    Args:
        fields: of the request, one of which the message may begin with.
    """
    name = str(error).partition("=")[0].partition(":")[0]
    return APIError(str(error), param=name if name in fields else None)


def answer_errors(app: FastAPI) -> None:
    """Makes every error of `app`, a defect too, an answer of this form."""

    @app.exception_handler(APIError)
    async def told(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = error.detail
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        return APIError(message, error.status_code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return APIError("the server has failed; its log says why", 500, kind=SERVER).response()


def _of_validation(error: RequestValidationError) -> APIError:
    errors = error.errors()
    first = errors[0]
    if len(first["loc"]) > 1:  # of a field's alternatives the one that came furthest says most
        of_field = [each for each in errors if each["loc"][:2] == first["loc"][:2]]
        first = max(of_field, key=lambda each: (each["type"] == "too_long", len(each["loc"])))
    if first["type"] == "json_invalid":
        return APIError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        if first["type"] != "value_error":
            return APIError("the body must be a JSON object, with Content-Type: application/json")
        name = message.partition(":")[0]
        return APIError(message, param=name if name.isidentifier() else None)
    if first["type"] == "extra_forbidden":
        message = "this field is not known here, and may change the text"
    # beyond the field's name come the alternatives of its type
    where = place[0] + "".join(f"[{part}]" for part in place[1:] if part.isdigit())
    return APIError(f"{where}: {message}", param=place[0])
