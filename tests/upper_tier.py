"""A device that is a copy in this process, for pipelines."""

from __future__ import annotations

from tests.test_tier_relay import Upper
from tests.test_tiers import InProcess


class Device(Upper):
    """Its carrier over one hop is that of the tests of streaming."""

    carrier = InProcess.carrier  # type: ignore[assignment]
