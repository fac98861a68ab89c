"""A client of `latteflow serve` for Locust: asks about one image after the other, on one connection.

`python -m benchmarks.load` starts it, and says by the environment which images and where the figures go.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from locust import FastHttpUser, events, task

_IMAGES = [path.read_bytes() for path in sorted(Path(os.environ["LOAD_IMAGES"]).iterdir())[:16]]


class Client(FastHttpUser):
    """Sends the next image when the answer is here."""

    number = 0

    @task
    def predict(self) -> None:
        """Any answer but 200 with a prediction is an error, and so is none."""
        self.number += 1
        data = _IMAGES[self.number % len(_IMAGES)]
        with self.client.post(
            "/predict", data=data, headers={"Content-Type": "image/jpeg"}, catch_response=True
        ) as answer:
            if answer.status_code == 200 and "predictions" in (answer.text or ""):
                answer.success()


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    total = environment.stats.total
    found = {
        "answers": total.num_requests - total.num_failures,
        "errors": {str(each.error): each.occurrences for each in environment.stats.errors.values()},
        "seconds": total.last_request_timestamp - total.start_time,
        "times_ms": {str(time): number for time, number in total.response_times.items()},
    }
    Path(os.environ["LOAD_FIGURES"]).write_text(json.dumps(found))
