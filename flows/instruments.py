"""What the service counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Instruments:
    """Counters of one service; none has a name that a client chose."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("latteflow_requests", "Requests to /predict, by status.", ["status"], registry=own)
        self.seconds = Histogram("latteflow_request_seconds", "From the first byte to the answer.", registry=own)
        self.under_way = Gauge("latteflow_requests_under_way", "Requests that are here and not answered.", registry=own)
        self.images = Counter("latteflow_images", "Images, answered or refused.", ["result"], registry=own)
        self.unknown = Counter("latteflow_unknown_images", "Answered images that seem of no class.", registry=own)
        batches = [1, 2, 4, 8, 16, 32]
        self.batch = Histogram(
            "latteflow_batch_images", "Images that went through the model together.", buckets=batches, registry=own
        )
        self.model = Gauge("latteflow_model", "1 for the model that answers.", ["model", "fingerprint"], registry=own)
        self.reloads = Counter("latteflow_reloads", "Models taken up on SIGHUP, or refused.", ["result"], registry=own)

    def page(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

    def serves(self, name: str, fingerprint: str) -> None:
        """From now on this model answers."""
        self.model.clear()
        self.model.labels(name, fingerprint).set(1)


class Measured:
    """ASGI: counts the requests to ``/predict`` and how long they take, whoever answers them."""

    def __init__(self, app: ASGIApp, instruments: Instruments) -> None:
        self._app, self._instruments = app, instruments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._instruments.requests.labels(str(message["status"])).inc()
                self._instruments.seconds.observe(time.perf_counter() - begin)
            await send(message)

        await self._app(scope, receive, counted)
