"""What bad files cost: the benchmark's files with damaged ones among them, and what `verify` leaves of that list."""

import contextlib
import io
import json
from pathlib import Path

from bench.loader_contenders import Workload
from bevt_fast.data.sources import Source
from bevt_fast.data.sources.file_list import Options, build
from bevt_fast.data.verify import run
from bevt_fast.errors import DataError

EVERY = 9  # good files a bad one: a tenth of the list is bad


def damaged(workload: Workload, folder: Path) -> Source:
    """The files of a workload and a ninth as many damaged copies of them, spread evenly, in a list in `folder`."""
    place = folder / f"damaged_{workload.stream}"
    file = place / "list.jsonl"
    if not file.exists():
        place.mkdir(parents=True)
        entries = []
        for index in range(len(workload.source)):
            path = Path(str(workload.source.path(index))).absolute()
            if index % EVERY == 0:
                number = index // EVERY
                bad = place / f"{number:06}{path.suffix}"
                bad.write_bytes(_spoilt(path.read_bytes(), number))
                entries.append(str(bad))
            entries.append(str(path))
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return _listed(workload, file)


def verified(workload: Workload, folder: Path) -> Source:
    """What `verify` leaves of the damaged list."""
    out = folder / f"verified_{workload.stream}"
    good = out / f"{workload.stream}_source.jsonl"
    if not good.exists():
        listed = [run.Listed(f"{workload.stream}.source", damaged(workload, folder))]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(DataError):  # it names the bad files
            run.verify(listed, out, run.How("ends"), None)
    return _listed(workload, good)


def _spoilt(content: bytes, number: int) -> bytes:
    """A file as transfers and disks leave it: cut in half, empty, no media at all, or with changed bytes within."""
    middle = len(content) // 2
    changed = bytes(byte ^ 0x5A for byte in content[middle : middle + 4096])
    broken = content[:middle] + changed + content[middle + len(changed) :]
    return (content[:middle], b"", b"<html>404 not found</html>" * 99, broken)[number % 4]


def _listed(workload: Workload, file: Path) -> Source:
    frames = workload.source.frames
    drawn = frames._asdict() if frames else {}
    drawn = {("frames" if name == "count" else name): value for name, value in drawn.items()}
    kind = "clips" if frames else "images"
    return build(Options(root=str(file.parent), list=str(file), kind=kind, **drawn))
