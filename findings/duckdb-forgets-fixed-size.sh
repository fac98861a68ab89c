#!/usr/bin/env bash
# DuckDB 2.0.1 on Parquet of polars 2.1.0: an array of fixed size comes as a list, and its vector functions refuse it.
#
# Guess: FLOAT[4], since the size stands in the Arrow schema that polars puts into the file, and pyarrow brings it
#     back.
# Seen: FLOAT[]; array_cosine_similarity finds no function of that name for it. A cast to FLOAT[4] helps.
# latteflow: writes features as fixed-size arrays, which polars and pyarrow read as such; docs/formats.md has the cast
#     that DuckDB wants.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet duckdb==2.0.1 polars==2.1.0 pyarrow==26.0.1
venv/bin/python -I - <<'EOF'
import duckdb
import polars as pl
import pyarrow.parquet as pq

features = pl.Series([[1.0, 0.0, 0.0, 0.0]], dtype=pl.Array(pl.Float32, 4))
pl.DataFrame({"feature": features}).write_parquet("features.parquet")
of_arrow = pq.read_schema("features.parquet").field("feature").type
of_duckdb = duckdb.sql("SELECT typeof(feature) FROM 'features.parquet'").fetchall()[0][0]
print(of_arrow, "|", of_duckdb)
assert of_arrow.list_size == 4 and of_duckdb == "FLOAT[]"
try:
    duckdb.sql("SELECT array_cosine_similarity(feature, feature) FROM 'features.parquet'").fetchall()
except duckdb.BinderException as error:
    print(str(error).splitlines()[0])
else:
    raise SystemExit("DuckDB took the column as it is")
cast = "feature::FLOAT[4]"
assert duckdb.sql(f"SELECT array_cosine_similarity({cast}, {cast}) FROM 'features.parquet'").fetchall() == [(1.0,)]
EOF
