"""What warming was worth, as the metrics say."""

from __future__ import annotations

from prometheus_client import REGISTRY

from services.gpu_agent.prewarming import Prewarming


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"warmserve_gpu_agent_{name}_total", labels) or 0.0


def test_what_was_copied_is_used_or_wasted_but_not_both() -> None:
    account = Prewarming("accounted")
    account.copied(100)
    account.lost(30)
    account.woken(70, 100)
    account.lost(70)  # after it has served, that is no waste
    account.woken(0, 100)
    account.woken(100, 100)
    account.copied(50)
    account.lost(80)  # of which 50 were never used
    assert count("prewarmed_bytes_wasted", model="accounted") == 80
    assert [count("prewarmed_bytes_used", model="accounted", found=found) for found in ("all", "some")] == [100, 70]
    assert [count("wakes", model="accounted", found=found) for found in ("all", "some", "none")] == [1, 1, 1]
