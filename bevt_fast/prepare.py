"""Make what a run reads, and check it: a tokenizer for your own data, DALL-E's weights as plain tensors, demo data.

python bevt_fast/prepare.py tokenizer --data VIDEOS --data IMAGES --out data/tokenizer.safetensors
python bevt_fast/prepare.py convert encoder.pkl data/encoder.safetensors
python bevt_fast/prepare.py moving_shapes
python bevt_fast/prepare.py verify --config configs/joint.json
python bevt_fast/prepare.py transcode --data VIDEOS --out VIDEOS_256
python bevt_fast/prepare.py tokens --config configs/joint.json --views 4 --out data/tokens
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

from bevt_fast.errors import ConfigError, DataError, outcome

if TYPE_CHECKING:
    from bevt_fast.data.sources import Source

    Programs = argparse._SubParsersAction[argparse.ArgumentParser]

HELD_OUT = 5  # every fifth file is kept out of the fit, to see how the codebook does on what it has not seen
SHAPES = {
    "clips": "training clips", "images": "training images", "test_clips": "test clips", "test_images": "test images",
    "size": "pixels a side", "length": "frames a clip", "objects": "objects a scene", "seed": "",
}  # fmt: skip
# files of images, the source that reads them, and its option that names them
PACKED = {".tar": ("webdataset", "shards"), ".parquet": ("parquet", "files")}
TRANSCODE = """Write videos once more, smaller and with the frames of a clip side by side: 0, 8, 16, ..., then 1, 9, ...
A clip of that stride is decoded from a tenth of the frames; training sees the same numbers of frames as before, and any
other stride works too. A plain player shows the phases one after another; --layout plain keeps the ordinary order."""
TRANSCODE_NUMBERS = (
    ("short-side", 256, "pixels of the shorter side at most; nothing is enlarged"),
    ("stride", 8, "frames from one of a clip to the next, as the source's `stride`"),
    ("gop", 4, "frames from keyframe to keyframe"),
    ("crf", 18, "quality on the codec's own scale, less is better"),
)


def command_line() -> argparse.ArgumentParser:
    """The programs and their options."""
    summary, examples = str(__doc__).split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    programs = parser.add_subparsers(required=True, metavar="tokenizer|convert|moving_shapes|verify|transcode|tokens")
    for add in (_add_tokenizer, _add_convert, _add_moving_shapes, _add_verify, _add_transcode, _add_tokens):
        add(programs)
    return parser


def _add_tokenizer(programs: "Programs") -> None:
    tokenizer = programs.add_parser("tokenizer", help="fit a tokenizer (patch_kmeans) to your own videos and images")
    tokenizer.add_argument(
        "--data", action="append", required=True, metavar="PATH",
        help="a folder of videos, images, or tar shards or parquet files of images; one of these; a list; repeatable",
    )  # fmt: skip
    tokenizer.add_argument("--out", required=True, metavar="FILE", help="the weights to write (.safetensors)")
    tokenizer.add_argument("--codes", type=_count, default=128, help="ids in the codebook (default: %(default)s)")
    tokenizer.add_argument(
        "--size", type=_count, default=96, help="pixels a side of the run's view, 16 a cell (%(default)s)"
    )
    tokenizer.add_argument("--samples", type=_count, default=1024, help="pictures to fit to (%(default)s)")
    tokenizer.add_argument("--seed", type=int, default=0)
    tokenizer.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    tokenizer.set_defaults(run=fit_tokenizer)


def _add_convert(programs: "Programs") -> None:
    convert = programs.add_parser(
        "convert", help="turn DALL-E's pickled encoder into safetensors; nothing of it is run"
    )
    convert.add_argument("source", metavar="SRC", help="encoder.pkl, in either format of torch.save")
    convert.add_argument("target", metavar="DST", help="the file to write (.safetensors)")
    convert.add_argument("--sha256", metavar="DIGEST", help="refuse a source with another SHA-256 digest")
    convert.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    convert.set_defaults(run=convert_encoder)


def _add_moving_shapes(programs: "Programs") -> None:
    shapes = programs.add_parser("moving_shapes", help="write the demo's data: real VP9 clips and JPEG images")
    shapes.add_argument("--root", default="data/moving_shapes", help="where (default: %(default)s)")
    for name, meaning in SHAPES.items():
        shapes.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    shapes.add_argument("--motions", nargs="+", metavar="NAME", help="of the clips, e.g. right left (all eight)")
    shapes.set_defaults(run=write_moving_shapes)


def _add_verify(programs: "Programs") -> None:
    verify = programs.add_parser("verify", help="open every file of the data, report on each, list those that are good")
    verify.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="as for tokenizer; repeatable, beside --config or not",
    )
    verify.add_argument("--config", metavar="FILE", help="every source of this run, held-out ones too")
    verify.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
    verify.add_argument("--out", default="data/verified", metavar="DIR", help="the reports (default: %(default)s)")
    verify.add_argument(
        "--depth", choices=("headers", "ends", "full"), default="ends",
        help="decode nothing but the first frame, the first, middle and last keyframe group, or all (%(default)s)",
    )  # fmt: skip
    verify.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="(default: every core)")
    verify.add_argument(
        "--timeout", type=_count, default=120, metavar="S", help="seconds a file may take (%(default)s)"
    )
    verify.set_defaults(run=verify_data)


def _add_transcode(programs: "Programs") -> None:
    transcode = programs.add_parser(
        "transcode", help="write videos once more, so that a clip is decoded from few frames", description=TRANSCODE
    )
    transcode.add_argument(
        "--data", action="append", required=True, metavar="PATH", help="videos: a folder, list or moving_shapes folder"
    )
    transcode.add_argument("--out", required=True, metavar="DIR", help="where; a finished file is kept if run again")
    for name, default, meaning in TRANSCODE_NUMBERS:
        transcode.add_argument(f"--{name}", type=_count, default=default, help=f"{meaning} (%(default)s)")
    transcode.add_argument("--codec", choices=("h264", "vp9", "hevc", "mjpeg"), default="h264", help="(%(default)s)")
    transcode.add_argument("--layout", choices=("phases", "plain"), default="phases", help="order of the frames")
    transcode.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    transcode.add_argument("--no-check", dest="check", action="store_false", help="do not compare with the source")
    transcode.set_defaults(run=transcode_videos)


def _add_tokens(programs: "Programs") -> None:
    tokens = programs.add_parser("tokens", help="ask the tokenizer once, before training (data.token_cache)")
    tokens.add_argument("--config", required=True, metavar="FILE", help="the run that the cache is for")
    tokens.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training; repeatable")
    tokens.add_argument("--out", required=True, metavar="DIR", help="where; the same command completes a cache there")
    tokens.add_argument("--views", type=_count, metavar="K", help="views of each sample (default: data.views)")
    tokens.add_argument("--device", choices=("cuda", "cpu"), help="of the tokenizer (default: cuda where there is one)")
    tokens.add_argument("--batch", type=_count, default=32, metavar="N", help="views at a time (%(default)s)")
    tokens.add_argument("--workers", type=int, choices=range(257), metavar="N", help="reading processes (data.workers)")
    tokens.set_defaults(run=cache_tokens)


def fit_tokenizer(options: argparse.Namespace) -> None:
    """Fit patch_kmeans to the data, and say how evenly its ids are used on files it was not fitted to."""
    _refuse_to_overwrite(options.out, options.overwrite)
    import torch

    from bevt_fast import tokenizers
    from bevt_fast.config import Part, View, parse
    from bevt_fast.tokenizers import _weights_file
    from bevt_fast.training import tokenizer_fit

    # as SPEC 5.3 has it: the short side is between the crop and 8/7 of it
    view = parse(View, {"size": options.size, "short_side": [options.size, options.size * 8 // 7]}, "--size")
    found = [source for path in options.data for source in _sources(Path(path))]
    to_fit, to_test = zip(*(_split(source) for source in found))
    views, held_out = (
        list(tokenizer_fit.sample_views({f"{i}": (source, view) for i, source in enumerate(part)}, seed, count))
        for part, seed, count in (
            (to_fit, options.seed, options.samples),
            (to_test, options.seed + 1, options.samples // 4),
        )
    )
    part = Part(name="patch_kmeans", options={"weights": options.out, "vocab_size": options.codes})
    start = time.perf_counter()
    tokenizer_fit.fit_tokenizer(views, part, options.seed, ", ".join(options.data))
    seconds = time.perf_counter() - start
    print(f"fitted {options.codes} ids to {sum(map(len, views)):,} pictures in {seconds:.1f} s")
    if held_out:
        ids = tokenizers.build(part)(torch.cat(held_out))
        used, perplexity, commonest = tokenizer_fit.codebook_usage(ids, options.codes)
        seen = (
            "" if all(len(source) >= HELD_OUT for source in found) else " (too few files to keep some out of the fit)"
        )
        print(
            f"on {len(ids):,} held-out pictures{seen}: {used} ids used, perplexity {perplexity:.1f}, "
            f"the commonest id names {100 * commonest:.1f} % of the cells"
        )
    print(f"wrote {options.out}, SHA-256 {_weights_file.digest(options.out)}")
    _say_how_to_use("demo", part.model_dump())


def convert_encoder(options: argparse.Namespace) -> None:
    """Read DALL-E's encoder, write it as safetensors, read that back and compare the bits."""
    _refuse_to_overwrite(options.target, options.overwrite)
    import torch

    from bevt_fast.tokenizers import _weights_file, dalle

    tensors = dalle.read(options.source, options.sha256)
    encoder = dalle.from_tensors(tensors, options.source)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"read {options.source}: {len(tensors)} tensors, {count:,} parameters, {encoder.vocab_size} ids, "
        f"SHA-256 {_weights_file.digest(options.source)}"
    )
    encoder.save(options.target)
    written = dalle.read(options.target)
    if not all(torch.equal(written[name], weight) for name, weight in encoder.state_dict().items()):
        raise DataError(f"{options.target} does not read back as it was written; check the disk and convert again")
    digest, size = _weights_file.digest(options.target), Path(options.target).stat().st_size
    print(f"wrote {options.target}: the same bits, {size:,} bytes, SHA-256 {digest}")
    part = {"weights": options.target, "sha256": digest, "vocab_size": encoder.vocab_size}
    _say_how_to_use("joint", {"name": "dalle", "options": part})


def write_moving_shapes(options: argparse.Namespace) -> None:
    """Write the demo's data, unless it is there."""
    from bevt_fast.config import parse
    from bevt_fast.data.sources import moving_shapes

    given = {name: value for name in ("root", "motions", *SHAPES) if (value := getattr(options, name)) is not None}
    part = parse(moving_shapes.Options, given, "moving_shapes")
    place = moving_shapes.ensure(part)
    print(
        f"{place} holds {part.clips} + {part.test_clips} clips and {part.images} + {part.test_images} images "
        f"(training + test), {part.size} pixels a side; {place / 'annotations.csv'} lists them"
    )
    print("train on it: python bevt_fast/train.py --config configs/demo.json")


def verify_data(options: argparse.Namespace) -> None:
    """Check every file of the data, and write a report and lists of the good ones."""
    from bevt_fast.config import load
    from bevt_fast.data.verify import run

    listed = run.of_config(load(options.config, options.set)) if options.config else []
    listed += run.of_data([found for path in options.data for found in _sources(Path(path), run.ALMOST_ALL)])
    how = run.How(options.depth, options.workers, options.timeout)
    run.verify(listed, Path(options.out), how, options.config)


def cache_tokens(options: argparse.Namespace) -> None:
    """Make or complete the token cache of a run, and say how to use it."""
    from bevt_fast.training import token_targets

    token_targets.program(options)


def transcode_videos(options: argparse.Namespace) -> None:
    """Write the videos of --data once more, and say how to train on them."""
    from bevt_fast.data import coding, transcode

    sizes = {name: getattr(options, name) for name in ("short_side", "gop", "crf", "codec")}
    recipe = coding.Recipe(stride=options.stride if options.layout == "phases" else 1, **sizes)
    if len(options.data) > 1:
        raise ConfigError("transcode takes one --data at a time; run it once for each")
    (options.data,) = options.data
    transcode.program(_sources(Path(options.data)), options, recipe)


def _sources(path: Path, may_be_missing: float = 0.5) -> list["Source"]:
    """What is at `path`: videos, images, or both. Raises DataError if it is nothing of these."""
    from bevt_fast.config import Part
    from bevt_fast.data import sources
    from bevt_fast.data.annotations import read_list
    from bevt_fast.data.folders import IMAGES, VIDEOS, walk, where_they_are

    parts = []
    if (path / "dataset.json").is_file():
        recipe = _recipe(path / "dataset.json")
        parts = [
            Part(name="moving_shapes", options=recipe | {"root": str(path), "kind": kind})
            for kind in ("clips", "images")
        ]
    elif path.is_dir():
        kinds = {"clips": VIDEOS, "images": IMAGES}
        parts = [
            Part(name="file_list", options={"root": str(path), "kind": kind})
            for kind, suffixes in kinds.items()
            if walk(path, suffixes)
        ]
        parts += [
            Part(name=name, options={"root": str(path)}) for end, (name, _) in PACKED.items() if walk(path, (end,))
        ]
        if not parts:
            raise DataError(
                f"the folder {path} holds no videos, no images, and no .tar or .parquet files of images; give the "
                "folder they are in"
            )
    elif path.is_file() and path.suffix in PACKED:
        name, option = PACKED[path.suffix]
        parts = [Part(name=name, options={"root": str(path.parent), option: path.name})]
    elif path.is_file():
        names = read_list(path).paths
        base = where_they_are(names, path.absolute().parent, path.absolute().parent.parent, Path.cwd())
        kind = "images" if names[0].lower().endswith(IMAGES) else "clips"
        parts = [Part(name="file_list", options={"root": str(base), "list": str(path.absolute()), "kind": kind})]
    else:
        raise DataError(f"there is nothing at {path}; give a folder of videos or images, or a list of them")
    found = [sources.build(part) for part in parts]
    for source in found:
        sources.preflight(source, may_be_missing)
    return found


def _recipe(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not that of a moving_shapes folder; give a folder of videos or images") from None


def _split(source: "Source") -> tuple["Source", "Source"]:
    """The files to fit to and those to test on; both are all files where there are fewer than five."""
    if len(source) < HELD_OUT:
        return source, source

    kept_out = [i for i in range(len(source)) if i % HELD_OUT == HELD_OUT - 1]
    fitted = [i for i in range(len(source)) if i % HELD_OUT != HELD_OUT - 1]
    return source.take(fitted), source.take(kept_out)


def _refuse_to_overwrite(path: str, overwrite: bool) -> None:
    # checkpoints trained with a tokenizer mean nothing under another one of the same name
    if Path(path).exists() and not overwrite:
        raise DataError(f"{path} is there already; name another file, or add --overwrite to replace it")


def _say_how_to_use(config: str, part: dict) -> None:
    setting = shlex.quote(f"tokenizer={json.dumps(part)}")
    print(f"use it: python bevt_fast/train.py --config configs/{config}.json --set {setting}")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the program the command line names. Returns the exit code."""
    options = command_line().parse_args(argv)
    return outcome(lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
