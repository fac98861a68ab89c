"""On the path of processes whose clock was set: they and SeaweedFS understand each other's times.

SeaweedFS is a Go program, whose clock nobody can set, and refuses requests that were signed at another time.
Python imports a module of this name before anything else.
"""

import os
from bisect import bisect
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

if os.environ.get("CLOCK_HISTORY"):
    import botocore.auth
    import botocore.parsers

    FILE = Path(os.environ["CLOCK_HISTORY"])
    plain = botocore.parsers.DEFAULT_TIMESTAMP_PARSER

    def history() -> list[tuple[float, float]]:
        """Real moments at which the clock was set, and how far ahead."""
        return [(float(at), float(ahead)) for at, ahead in map(str.split, FILE.read_text().splitlines())]

    def real_time(remove_tzinfo: bool = True) -> datetime:
        now = datetime.now(UTC) - timedelta(seconds=history()[-1][1])
        return now.replace(tzinfo=None) if remove_tzinfo else now

    def own_time(value: Any) -> datetime:
        moment, known = plain(value), history()
        number = bisect([at for at, _ in known], moment.timestamp() + 1) - 1
        return moment + timedelta(seconds=known[max(number, 0)][1])

    botocore.auth.get_current_datetime = real_time
    botocore.parsers.DEFAULT_TIMESTAMP_PARSER = own_time
