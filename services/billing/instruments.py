"""The numbers that billing shows to Prometheus."""

from __future__ import annotations

from shared import telemetry


class Instruments:
    """Counters and gauges of one billing process. Built once, after telemetry is set up."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self.events = meter.create_counter(
            "roundhouse.billing.events", description="Usage facts taken, by result: new, known, rejected"
        )
        self.lag_s = meter.create_histogram(
            "roundhouse.billing.lag", unit="s", description="From the end of a job to the commit of its fact"
        )
        self.transactions = meter.create_counter(
            "roundhouse.billing.ledger.transactions", description="Ledger transactions posted, by kind"
        )
        self.unpriced = meter.create_gauge(
            "roundhouse.billing.requests.unpriced", description="Billable requests that no price covers"
        )
        self.unbalanced = meter.create_gauge(
            "roundhouse.billing.ledger.unbalanced",
            description="Transactions of the last hour that do not balance",
        )
        self.minutes_behind_s = meter.create_gauge(
            "roundhouse.billing.minutes.behind",
            unit="s",
            description="Since minutes were last posted completely",
        )
