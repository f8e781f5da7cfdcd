"""warmctl and the forecaster itself, with a real etcd and Redis."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.backing import Backing
from tests.forecaster.process import forecaster
from tests.sdk.cluster_state import spec
from tests.sdk.conftest import Warmctl
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

HOUR = 3600


async def test_what_is_imported_is_drawn_forecast_and_scored(
    warmctl: Warmctl, etcd: Backing, redis_server: Backing, store: Store, keys: Keys, tmp_path: Path
) -> None:
    await store.put(keys.model("qwen"), spec("qwen"))
    file = tmp_path / "windows.csv"
    begin = 1_000_000_800  # a multiple of half an hour
    rows = [f"qwen,{begin + at * HOUR // 2},{4 + at // 24 % 2},6" for at in range(192)]
    file.write_text("\n".join(["model,window_start,load,peak", *rows]))
    published = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
    await published.start()
    hourly = {"window_s": HOUR, "season_s": 24 * HOUR}
    async with forecaster(etcd.address, redis_server.address, keys.prefix, tmp_path / "data", **hourly):
        await published.wait_for(lambda items: "qwen" in items)
        imported = await warmctl("forecast", "import", str(file), "--shift-to-now", "-o", "json")
        assert imported.status == 0, imported.err
        assert imported.json["windows"] == 96  # of the forecaster's, each of two in the file
        assert imported.json["end_unix_s"] <= time.time()
        await published.wait_for(lambda items: items["qwen"].windows[0].mean_load.p50 > 3)

        shown = (await warmctl("forecast", "qwen", "--past", "1w", "-o", "json")).json
        known = [window["actual"] for window in shown["history"] if window["actual"]]
        assert len(known) >= 96
        assert {actual["mean_load"] for actual in known} >= {4, 5}
        assert {actual["peak_load"] for actual in known} >= {6}
        assert 3 < shown["forecast"][0]["mean_load"]["p50"] < 6
        drawn = await warmctl("forecast", "qwen", "--past", "1w")
        assert (drawn.status, drawn.err) == (0, "")
        assert "what came" in drawn.out

        announced = await warmctl("calendar", "add", "qwen", "--at", "now", "--for", "1d", "--load", "40")
        assert announced.status == 0
        await published.wait_for(lambda items: items["qwen"].windows[1].mean_load.p50 >= 40)
        assert (await warmctl("forecast", "score")).status == 0
        assert (await warmctl("forecast", "predictor", "-o", "json")).json["champion"]["name"] == "published"
        again = await warmctl("forecast", "predictor", "--restore")
        assert (again.status, again.err.startswith("Error: ")) == (1, True)
    await published.close()
