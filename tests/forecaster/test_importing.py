"""Windows as others send them: what is wrong is named, what is shorter is joined."""

from __future__ import annotations

import numpy as np
import pytest

from services.common.grpc_frame import StatusError
from services.forecaster.importing import Import
from warmserve.v1 import forecast_pb2

NOW_S = 3000.0


def window(start: int, load: float = 1.0, length: float = 0.0) -> forecast_pb2.HistoryWindow:
    actual = forecast_pb2.LoadSample(mean_load=load, peak_load=2 * load)
    return forecast_pb2.HistoryWindow(start_unix_s=start, window_s=length, actual=actual)


def request(
    *windows: forecast_pb2.HistoryWindow, model: str = "m", window_s: float = 300.0
) -> forecast_pb2.ImportHistoryRequest:
    return forecast_pb2.ImportHistoryRequest(model=model, window_s=window_s, windows=windows)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (request(model=""), "model name"),
        (request(window_s=600), "cannot be joined to those of 300 s"),
        (request(window_s=70), "cannot be joined"),
        (request(window_s=0), "cannot be joined"),
        (request(window_s=float("nan")), "cannot be joined"),
        (request(window(300), window(601)), "begins at 601: it does not begin at a multiple of 300 s"),
        (request(window(-300)), "begin at a multiple"),
        (request(window(2700), window(3000)), "begins at 3000: it has not ended yet"),
        (request(window(300, -1)), "mean_load is -1, and must be 0 or more"),
        (request(window(300, float("nan"))), "mean_load is nan"),
        (request(window(300, float("inf"))), "mean_load is inf"),
        (request(window(300, length=60)), "its length is 60 s and not 300 s"),
        (request(forecast_pb2.HistoryWindow(start_unix_s=300)), "leave windows out of which nothing is known"),
    ],
)
def test_what_is_wrong_is_named(wrong: forecast_pb2.ImportHistoryRequest, says: str) -> None:
    with pytest.raises(StatusError, match=says):
        Import(300, NOW_S).take(wrong)


def test_one_model_has_windows_of_one_length() -> None:
    new = Import(300, NOW_S)
    new.take(request(window(300)))
    new.take(request(window(300), model="n", window_s=100))
    with pytest.raises(StatusError, match="must have one length"):
        new.take(request(window(300), window_s=100))


def test_windows_come_in_any_order_and_the_later_of_two_counts() -> None:
    new = Import(300, NOW_S)
    new.take(request(window(900, 3), window(300, 1), window(900, 4)))
    new.take(request(window(0, 9)))
    numbers, values = new.joined()["m"]
    assert numbers.tolist() == [0, 1, 3]
    assert values[:, 0].tolist() == [9, 1, 4]


def test_shorter_windows_are_joined_where_half_is_known() -> None:
    new = Import(300, NOW_S)
    # All three of the first window, two of the second, one of the third.
    new.take(request(*(window(100 * at, at) for at in (0, 1, 2, 3, 5, 7)), window_s=100))
    numbers, values = new.joined()["m"]
    assert numbers.tolist() == [0, 1]
    np.testing.assert_allclose(values[:, 0], [1, 4])
    np.testing.assert_allclose(values[:, 1], [4, 10])


def test_nothing_is_nothing() -> None:
    new = Import(300, NOW_S)
    assert new.joined() == {}
    new.take(request())
    assert new.joined() == {}
