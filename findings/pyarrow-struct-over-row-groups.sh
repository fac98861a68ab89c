#!/usr/bin/env bash
# pyarrow 26.0.1: of a struct with a dictionary inside, no batch is read that lies in two row groups.
#
# Guess: where a file can be read by row groups, batches of any size can be.
# Seen: "Nested data conversions not implemented for chunked array outputs", from `iter_batches` with a size that does
#     not divide the groups; one group at a time, all rows come. A dictionary outside of a struct, and plain bytes
#     inside of one, come in any batches.
# latteflow: reads tables one row group at a time, and so takes images in such structs too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pyarrow==26.0.1
venv/bin/python -I - <<'EOF'
import pyarrow as pa
import pyarrow.parquet as pq

pictures = [b"one", b"two", b"three", b"four"]


def rows_read(column: pa.Array, groups: list[list[int]]) -> int | str:
    pq.write_table(pa.table({"image": column}), "images.parquet", row_group_size=3)
    file = pq.ParquetFile("images.parquet")
    try:
        return sum(batch.num_rows for group in groups for batch in file.iter_batches(2, group))
    except pa.ArrowNotImplementedError as error:
        return str(error)


seen = {}
for kind in (pa.binary(), pa.dictionary(pa.int32(), pa.binary())):
    plain = pa.array(pictures, kind)
    for column in (plain, pa.StructArray.from_arrays([plain], ["bytes"])):
        seen[str(column.type)] = [rows_read(column, groups) for groups in ([[0, 1]], [[0], [1]])]
for what, found in seen.items():
    print(what, "together", found[0], "apart", found[1])
*others, (together, apart) = seen.values()
assert others == [[4, 4]] * 3
assert together == "Nested data conversions not implemented for chunked array outputs" and apart == 4
EOF
