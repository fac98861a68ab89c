#!/usr/bin/env bash
# polars 2.1.0: the sum of an Int32 column is Int32 and wraps, while those of Int8 and Int16 are widened.
#
# Guess: 64 bits for all of them, as in numpy, Arrow and DuckDB.
# Seen: 2147483647 + 1 = -2147483648, eager, grouped and from Parquet, without a warning; four times 127 as Int8 = 508.
# latteflow: adds its Int32 token counts, of each part of a stage, as Int64, and the parts as Python integers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet polars==2.1.0 pyarrow==26.0.1
venv/bin/python -I - <<'EOF'
import polars as pl
import pyarrow.compute as pc

tokens = pl.DataFrame({"tokens": pl.Series([2**31 - 1, 1], dtype=pl.Int32)})
tokens.write_parquet("tokens.parquet")
sums = {
    "eager": tokens["tokens"].sum(),
    "grouped": tokens.group_by(pl.lit(0)).agg(pl.sum("tokens"))["tokens"].item(),
    "Parquet": pl.scan_parquet("tokens.parquet").select(pl.sum("tokens")).collect().item(),
    "widened first": tokens["tokens"].cast(pl.Int64).sum(),
    "Arrow": pc.sum(tokens["tokens"].to_arrow()).as_py(),
    "four Int8": pl.Series([127] * 4, dtype=pl.Int8).sum(),
}
print(sums)
assert [*sums.values()] == [-(2**31)] * 3 + [2**31] * 2 + [508]
EOF
