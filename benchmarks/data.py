"""The data suite: the cost of streaming from shards, compared with only decoding and augmenting, and of several views.

Both sides run in turn in one process, on one core. The result is the median of the ratios of all turns, because the
machine may be shared.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import views
from ssmpretrain.datamodules.decoding.decode import decode_rgb
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.image_shards import ImageShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.tar.index import index_path

BATCH = 64
_PROGRAM = """
import json, sys, time
start = time.perf_counter()
from ssmpretrain.datamodules.image_shards import ImageShards
imported = time.perf_counter()
data = ImageShards(sys.argv[1], batch_size=64, num_workers=int(sys.argv[2]))
data.setup("fit")
ready = time.perf_counter()
next(iter(data.train_dataloader()))
first = time.perf_counter()
print(json.dumps({"import_s": imported - start, "setup_s": ready - imported, "first_batch_s": first - ready}))
import os
sys.stdout.flush()
os._exit(0)
"""


def rows(images: int = 320, turns: int = 9, shards: int = 1000) -> list[dict[str, Any]]:
    """Run the whole suite, which takes a few minutes, and return its rows.

    Args:
        images: Number of JPEG images to read, a multiple of 64.
        turns: Turns of each comparison.
        shards: Number of local shards with indexes, for the time to the first batch.
    """
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    jpegs = photographs(images)
    with tempfile.TemporaryDirectory() as folder:
        return [
            *streaming_rows(jpegs, Path(folder), turns),
            *start_rows(jpegs, Path(folder), shards),
            *decoder_rows(jpegs[:64], turns),
            *views.rows(jpegs[:64], turns),
        ]


def photographs(count: int) -> list[bytes]:
    """Make JPEG images of 500 x 375 pixels, quality 90, about 65 kB each: crops of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        photo = photos[number % 2]
        width = int(torch.randint(photo.width // 2, photo.width + 1, (), generator=random))
        height = min(photo.height, width * 3 // 4)
        left = int(torch.randint(photo.width - width + 1, (), generator=random))
        top = int(torch.randint(photo.height - height + 1, (), generator=random))
        file = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).resize((500, 375)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def streaming_rows(jpegs: list[bytes], folder: Path, turns: int) -> Iterator[dict[str, Any]]:
    """Compare `ImageShards` with a loop over the same bytes in memory; decoder, augmentation, batches are the same."""
    with ShardWriter(folder / "shards", "train") as writer:
        for number, jpeg in enumerate(jpegs):
            writer.write(f"{number:06d}", {"jpg": jpeg, "cls": b"1"})
    for workers in (0, 1):
        data = ImageShards(str(folder / "shards"), batch_size=BATCH, num_workers=workers)
        data.setup("fit")
        ours: Any = data.train_dataloader()
        bare: Any = DataLoader(_Bare(data, jpegs), None, num_workers=workers, persistent_workers=workers > 0)
        assert len(list(bare)) == len(list(ours))  # this also starts the workers, which stay
        times = [(spent(bare), spent(ours)) for _ in range(turns)]
        ratios = [mine[1] / theirs[1] for theirs, mine in times]
        sides = list(zip(*times, strict=True))
        clock, processor = ([median(times[kind] for times in side) for side in sides] for kind in (0, 1))
        yield {
            "case": f"streaming, {workers} workers", "theirs_ms": 1e3 * processor[0] / len(jpegs),
            "ours_ms": 1e3 * processor[1] / len(jpegs), "ratio": median(ratios), "target": "<= 1.05",
            "spread": [min(ratios), max(ratios)], "ratio_of_wall_times": clock[1] / clock[0],
            "ratio_of_minima": min(mine[1] for _, mine in times) / min(theirs[1] for theirs, _ in times),
            "note": "processor time per image of all processes; the same from bytes in memory, in as many workers",
        }  # fmt: skip


class _Bare(Dataset[Tensor]):
    """Data set that only decodes and augments images in memory."""

    def __init__(self, data: ImageData, jpegs: list[bytes]) -> None:
        self.batcher, self.jpegs = data._train_batcher, jpegs

    def __len__(self) -> int:
        return len(self.jpegs) // BATCH

    def __getitem__(self, number: int) -> Tensor:
        train = self.batcher.transform.augmented
        if number >= len(self):
            raise IndexError
        images = [train(decode_rgb(jpeg)) for jpeg in self.jpegs[number * BATCH : (number + 1) * BATCH]]
        return torch.stack(images).float().sub_(self.batcher.mean).div_(self.batcher.std)


def spent(loader: Any) -> tuple[float, float]:
    """Measure an epoch: seconds by the clock, and seconds of processor time of this process and its workers."""
    workers = [worker.pid for worker in getattr(loader._iterator, "_workers", [])]
    start, before = time.perf_counter(), _processor_time(workers)
    for _ in loader:
        pass
    return time.perf_counter() - start, _processor_time(workers) - before


def _processor_time(processes: list[int]) -> float:
    others = [path.read_text() for pid in processes for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(int(text.split()[0]) for text in others) * 1e-9


def start_rows(jpegs: list[bytes], folder: Path, shards: int) -> Iterator[dict[str, Any]]:
    """Measure the time from the start of a process to the first batch of 64, on local shards with indexes."""
    many = folder / "many"
    with ShardWriter(many, "train") as writer:
        for number in range(8):
            writer.write(f"{number:06d}", {"jpg": jpegs[number % len(jpegs)], "cls": b"1"})
    first = many / "train-000000.tar"
    for number in range(1, shards):
        copy = many / f"train-{number:06d}.tar"
        shutil.copyfile(first, copy)
        shutil.copyfile(index_path(first), index_path(copy))
    for workers in (0, 1):
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            command = [sys.executable, "-c", _PROGRAM, str(many), str(workers)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append({"process_s": time.perf_counter() - start, **json.loads(out)})
        seconds = {name: median(run[name] for run in runs) for name in runs[0]}
        yield {
            "case": f"first batch, {shards:,} shards, {workers} workers", **seconds, "target": "<= 2",
            "ours_s": seconds["setup_s"] + seconds["first_batch_s"], "note": "medians of 5; imports are torch's",
        }  # fmt: skip


def decoder_rows(jpegs: list[bytes], turns: int) -> Iterator[dict[str, Any]]:
    """Time the decoding of a JPEG image to RGB by each installed decoder."""
    decoders, absent = _decoders()
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        for name, decode in decoders.items():
            times[name].append(timed(lambda decode=decode: [decode(jpeg) for jpeg in jpegs]) / len(jpegs))  # type: ignore[misc]
    base = times["torchvision"]
    for name, seconds in times.items():
        ratio = median(ours / theirs for ours, theirs in zip(seconds, base, strict=True))
        yield {"case": f"decode, {name}", "ours_ms": 1e3 * median(seconds), "ratio": ratio, "note": "of torchvision's"}
    for name, why in absent.items():
        yield {"case": f"decode, {name}", "absent": why}


def _decoders() -> tuple[dict[str, Callable[[bytes], Any]], dict[str, str]]:
    """Return the installed decoders of JPEG images, and the reasons why others are absent."""
    import numpy as np
    from PIL import Image

    def pillow(jpeg: bytes, draft: bool = False) -> Tensor:
        image = Image.open(io.BytesIO(jpeg))
        if draft:
            image.draft("RGB", (224, 224))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    name = "Pillow-SIMD" if ".post" in Image.__version__ else "Pillow"
    found = {"torchvision": decode_rgb, name: pillow, f"{name}, draft": lambda jpeg: pillow(jpeg, draft=True)}
    absent: dict[str, str] = {}
    try:
        import simplejpeg

        found["simplejpeg"] = lambda jpeg: torch.from_numpy(simplejpeg.decode_jpeg(jpeg)).permute(2, 0, 1)
    except ImportError as error:
        absent["simplejpeg"] = str(error)
    try:
        import turbojpeg

        turbo = turbojpeg.TurboJPEG()
        form = turbojpeg.TJPF_RGB
        found["PyTurboJPEG"] = lambda jpeg: torch.from_numpy(turbo.decode(jpeg, pixel_format=form)).permute(2, 0, 1)
    except (ImportError, RuntimeError, OSError) as error:
        absent["PyTurboJPEG"] = str(error).splitlines()[0]
    return found, absent


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows, one line each."""
    return "\n".join(f"{row['case']:<44}{_cell(row)}" for row in rows)


def _cell(row: dict[str, Any]) -> str:
    if "absent" in row:
        return f"not installed: {row['absent']}"
    if "ours_s" in row:
        return (
            f"setup {row['setup_s']:.2f} s + first batch {row['first_batch_s']:.2f} s = {row['ours_s']:.2f} s "
            f"({row['target']}); imports {row['import_s']:.2f} s"
        )
    spread = f", from {row['spread'][0]:.3f} to {row['spread'][1]:.3f}" if "spread" in row else ""
    beside = f" beside {row['theirs_ms']:.3f} ms" if "theirs_ms" in row else ""
    wall = f"; by the clock {row['ratio_of_wall_times']:.3f}" if "ratio_of_wall_times" in row else ""
    return f"{row['ours_ms']:.3f} ms{beside}, ratio {row['ratio']:.3f}{spread} {row.get('target', '')}{wall}".rstrip()
