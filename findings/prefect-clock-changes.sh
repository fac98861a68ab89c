#!/usr/bin/env bash
# Prefect 3.8.8: a cron schedule where clocks change: half past two comes at half past one, and an hour has no runs.
#
# Guess: in spring a run at 02:30 is left out or comes at 03:30; in autumn one every half hour runs in both hours.
# Seen: Berlin, 28 March 2027: `30 2 * * *` is due at 01:30, 23 hours after the run before. 31 October 2027: `*/30 * *
#     * *` has nothing between 02:30 (summer) and 03:00 (winter), which is an hour and a half.
# latteflow: a night at 02:30 runs once on both days; it goes by what is new since the last one, not by hours.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet "prefect==3.8.8" "fastapi==0.150.0" "sqlalchemy[asyncio]==2.0.58"
HOME=$folder PREFECT_HOME=$folder venv/bin/python -I - <<'EOF'
import asyncio
import datetime as dt

from prefect.server.schemas.schedules import CronSchedule


def due(cron: str, start: dt.datetime, runs: int) -> list[dt.datetime]:
    schedule = CronSchedule(cron=cron, timezone="Europe/Berlin")
    return asyncio.run(schedule.get_dates(runs, start=start.replace(tzinfo=dt.UTC)))


spring = due("30 2 * * *", dt.datetime(2027, 3, 27, 0), 3)
autumn = due("*/30 * * * *", dt.datetime(2027, 10, 31, 0), 4)
print(*spring, *autumn, sep="\n")
assert [f"{time:%d %H:%M%z}" for time in spring] == ["27 02:30+0100", "28 01:30+0100", "29 02:30+0200"]
waits = [(later.astimezone(dt.UTC) - time.astimezone(dt.UTC)) for time, later in zip(autumn, autumn[1:])]
print(*waits)
assert dt.timedelta(minutes=90) in waits
EOF
