"""The same rows with an image each as JSONL, Parquet and webdataset."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image


def write_inputs(folder: Path, count: int) -> dict[str, Path]:
    """Format -> file. Row n: {"id": n, "prompt": "question n"} and an image of 8 + n by 8 pixels.

    Row 2 has no prompt."""
    rows, images = [], []
    for n in range(count):
        rows.append({"id": n} | ({"prompt": f"question {n}"} if n != 2 else {}))
        Image.new("RGB", (8 + n, 8), (40 * n % 256, 90, 200)).save(folder / f"{n}.png")
        images.append((folder / f"{n}.png").read_bytes())
    paths = {
        "jsonl": folder / "rows.jsonl", "parquet": folder / "rows.parquet",
        "webdataset": folder / "rows.tar",
    }  # fmt: skip
    lines = [json.dumps(row | {"image": f"{n}.png"}) + "\n" for n, row in enumerate(rows)]
    paths["jsonl"].write_text("".join(lines))
    table = pyarrow.table(
        {
            "id": [row["id"] for row in rows],
            "prompt": [row.get("prompt") for row in rows],
            "image": [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)],
        }
    )
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=2)
    with tarfile.open(paths["webdataset"], "w") as archive:
        for n, (row, image) in enumerate(zip(rows, images, strict=True)):
            for suffix, data in (("png", image), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return paths
