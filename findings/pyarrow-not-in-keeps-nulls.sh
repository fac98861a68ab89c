#!/usr/bin/env bash
# pyarrow 26.0.1: the filter `not in` of a Parquet read keeps rows without a value, `!=` drops them.
#
# Guess: both drop them, as DuckDB and polars do.
# Seen: of a, b and null, ("x", "not in", ["a"]) gives b and null, ("x", "!=", "a") gives b.
# latteflow: filters in polars, and writes `ne_missing` where a null counts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet duckdb==2.0.1 polars==2.1.0 pyarrow==26.0.1
venv/bin/python -I - <<'EOF'
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

pq.write_table(pa.table({"x": ["a", "b", None]}), "x.parquet")
found = {
    "pyarrow not in": pq.read_table("x.parquet", filters=[("x", "not in", ["a"])])["x"].to_pylist(),
    "pyarrow !=": pq.read_table("x.parquet", filters=[("x", "!=", "a")])["x"].to_pylist(),
    "DuckDB": [x for (x,) in duckdb.sql("SELECT x FROM 'x.parquet' WHERE x NOT IN ('a')").fetchall()],
    "polars": pl.scan_parquet("x.parquet").filter(~pl.col("x").is_in(["a"])).collect()["x"].to_list(),
}
print(found)
assert found == {"pyarrow not in": ["b", None], "pyarrow !=": ["b"], "DuckDB": ["b"], "polars": ["b"]}
EOF
