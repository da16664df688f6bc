"""
Write the Python sources of the running interpreter's standard library, as bytes:

    python data/pycode/prepare.py

This is real text on any machine, without a network. Writes train.bin, val.bin (every 20th file in
sorted order) and meta.json.
"""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import clear_errors, configure
from nanorecur.dataset import write_dataset

out_dir = ""  # folder to write; "": the folder of this script
configure(globals())

library = Path(sysconfig.get_paths()["stdlib"])
skip = {"site-packages", "dist-packages", "__pycache__"}  # folders that are not of the library
paths = sorted(path.relative_to(library) for path in library.rglob("*.py"))
paths = [path for path in paths if not skip & set(path.parts)]
texts = {
    "train": ((library / path).read_bytes() for i, path in enumerate(paths) if i % 20),
    "val": ((library / path).read_bytes() for i, path in enumerate(paths) if i % 20 == 0),
}
with clear_errors():
    write_dataset(out_dir or Path(__file__).parent, {"tokenizer": "bytes"}, texts)
