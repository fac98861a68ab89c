#!/usr/bin/env bash
# DuckDB 2.0.1 on Parquet of pyarrow 26.0.1 or polars 2.1.0: rows with NaN are found or not, by what the writer noted.
#
# Guess: the same rows with and without statistics.
# Seen: DuckDB takes NaN for larger than all numbers. Both writers leave NaN out of a row group's maximum, so `x > 5`
#     skips a group that has one; `max(x)` of the same rows is 2 in pyarrow's file and NaN in polars'. Without
#     statistics the row is found. polars finds it in every file.
# latteflow: turns NaN into null before it writes scores of texts, so that all readers of that table find the same
#     rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet duckdb==2.0.1 polars==2.1.0 pyarrow==26.0.1
venv/bin/python -I - <<'EOF'
import math

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

table = pa.table({"row": [0, 1, 2], "x": [1.0, 2.0, math.nan]})
pq.write_table(table, "with.parquet")
pq.write_table(table, "without.parquet", write_statistics=False)
pl.from_arrow(table).write_parquet("polars.parquet")
found = {}
for name in ("with", "without", "polars"):
    above = duckdb.sql(f"SELECT row FROM '{name}.parquet' WHERE x > 5").fetchall()
    most = duckdb.sql(f"SELECT max(x) FROM '{name}.parquet'").fetchall()[0][0]
    lazily = pl.scan_parquet(f"{name}.parquet").filter(pl.col("x") > 5).collect()["row"].to_list()
    found[name] = (above, str(most), lazily)
    print(f"{name}: DuckDB finds {above}, maximum {most}; polars finds {lazily}")
assert found == {
    "with": ([], "2.0", [2]),
    "without": ([(2,)], "nan", [2]),
    "polars": ([], "nan", [2]),
}
EOF
