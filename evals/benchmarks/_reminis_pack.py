"""Run with reminis's own interpreter: BASE TUNED, two safetensors files. Prints one JSON line on its lossless pack."""

import json
import sys
import tempfile
import time
from pathlib import Path

import reminis  # type: ignore[import-not-found]

with tempfile.TemporaryDirectory() as temporary:
    base, tuned, pack = (str(Path(temporary, name)) for name in ("base.db", "tuned.db", "pack.db"))
    for source, database in zip(sys.argv[1:3], (base, tuned), strict=True):
        reminis.safetensors_to_sqlite(source, database, verbose=False)
    begun = time.perf_counter()
    found = reminis.diff_models(base, tuned, pack, verbose=False)
    seconds = time.perf_counter() - begun
    if found["lossy"]:
        sys.exit("reminis made a lossy pack")
    # Of the tensors alone, without the pages of its database; and of the file.
    sizes = {"stored_bytes": found["delta_stored_bytes"], "file_bytes": Path(pack).stat().st_size}
    print(json.dumps(sizes | {"diff_seconds": seconds}))
