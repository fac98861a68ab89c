"""Files of tensors that are written in blocks are those that the library writes at once."""

from pathlib import Path

import numpy as np

from latteflow.storage.tables import safetensors, write_safetensors


def test_blocks_make_the_file_that_the_library_makes(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    large = draws.normal(size=(50, 7)).astype(np.float32)
    small = {
        "centre": draws.normal(size=3).astype(np.float32),
        "tower.é.step": np.arange(3),
        "tower.half": draws.normal(size=(2, 3)).astype(np.float16),
        "tower.wide": draws.normal(size=5),
        "scale": np.array([1.5], np.float32),
        "number": np.array(3, np.int32),
    }
    for arrays in (small, {}):
        path = tmp_path / "file.safetensors"
        write_safetensors(path, arrays, "assignments", large.shape, (large[at : at + 8] for at in range(0, 50, 8)))
        assert path.read_bytes() == safetensors(**arrays, assignments=large)
