"""How sure an exported model is and how often it is right, with its temperature and without; labels only measure.

latteflow export domains/demo.yaml runs/demo-model
python -m benchmarks.calibration runs/demo-model data/demo/test data/demo/labels.csv
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import polars as pl

from latteflow.models.judge import metrics
from latteflow.models.towers.folder import SETTINGS_FILE
from latteflow.tasks.ship.predict import predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path, help="CSV with path, relative to its folder, and class")
    given = parser.parse_args()
    labels = pl.read_csv(given.labels)
    below = f"{given.images.resolve().relative_to(given.labels.resolve().parent)}/"
    labels = labels.with_columns(pl.col("path").str.strip_prefix(below))
    settings = json.loads((given.model / SETTINGS_FILE).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        plain = shutil.copytree(given.model, Path(scratch, "plain"))
        (plain / SETTINGS_FILE).write_text(json.dumps({**settings, "temperature": 1.0}))
        sys.stdout.write(f"{'':12}  temperature  top-1  confidence  error  unknown\n")
        for name, folder in (("as it is", plain), ("calibrated", given.model)):
            out = f"{scratch}/answers.parquet"
            predict(folder, str(given.images), out)
            table = pl.read_parquet(out).with_columns(pl.col("class").cast(pl.String))
            both = table.join(labels.rename({"class": "truth"}), on="path")
            correct = (both["class"] == both["truth"]).to_numpy()
            confidence = both["probability"].cast(pl.Float64).to_numpy()
            error = metrics.calibration_error(metrics.reliability(confidence, correct))
            unknown = "" if both["unknown"].null_count() else f"{both['unknown'].mean():.1%}"
            heat = settings.get("temperature", 1.0) if folder is given.model else 1.0
            sys.stdout.write(
                f"{name:12}  {heat:11.2f}  {correct.mean():5.1%}  {confidence.mean():10.1%}  {error:5.3f}  {unknown:>7}"
                "\n"
            )


if __name__ == "__main__":
    main()
