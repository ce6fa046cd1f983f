"""One small tree of failures: what the module's table says is so, and an error survives the wire."""

from __future__ import annotations

import re
from http import HTTPStatus

import grpc
import pytest

from baton.core import errors
from baton.core.errors import BY_CODE, BatonError, InternalError, InvalidRequest, NotSupported, SetupError, from_code

CLASSES = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BatonError)}
ROWS = re.findall(r"^ {6,}(\w+) .*? (\d{3}) +([A-Z_]+)$", errors.__doc__ or "", re.MULTILINE)


def test_the_table_in_the_module_is_true_and_complete() -> None:
    told = {name: (int(status), code) for name, status, code in ROWS}
    real = {n: (c.http_status, c.grpc_status) for n, c in CLASSES.items() if not issubclass(c, SetupError)}
    del real["BatonError"]
    assert told == real


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_failure_maps_to_a_real_status_of_both_protocols(cls: type[BatonError]) -> None:
    assert cls.grpc_status in grpc.StatusCode.__members__
    assert cls.http_status == 499 or HTTPStatus(cls.http_status) >= 400


@pytest.mark.parametrize("cls", [c for c in CLASSES.values() if c is not BatonError])
def test_an_error_that_crossed_the_wire_is_the_same_class(cls: type[BatonError]) -> None:
    back = from_code(cls.code, "what, why, what to do", "max_tokens")
    assert type(back) is cls
    assert (back.message, back.param, str(back)) == ("what, why, what to do", "max_tokens", "what, why, what to do")


def test_codes_are_unique() -> None:
    assert len(BY_CODE) == len(CLASSES) - 1, "BatonError shares its code with InternalError, and nobody else shares one"


def test_an_unknown_code_is_an_internal_error_and_keeps_its_message() -> None:
    error = from_code("from_the_future", "hello")
    assert type(error) is InternalError
    assert error.message == "hello"


def test_what_is_not_supported_is_also_the_clients_to_change() -> None:
    assert issubclass(NotSupported, InvalidRequest)
