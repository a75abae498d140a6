"""Judge a classifier, ask it about videos, or take its features; alone, or by deepspeed, torchrun or srun.

python bevt_fast/evaluate.py --checkpoint runs/k400
torchrun --nproc-per-node 8 bevt_fast/evaluate.py --checkpoint runs/ssv2 --crops 3 --temporal
python bevt_fast/evaluate.py --checkpoint swin3d_b.pth --size base --classes 400 --data val.txt --clips 4 --crops 3
python bevt_fast/evaluate.py predict --checkpoint runs/k400 clip.mp4 --top 5
python bevt_fast/evaluate.py extract --checkpoint runs/joint VIDEOS --out features.npz
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]
else:  # run as a module of a clone that may not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from bevt_fast.errors import ConfigError, DataError, MachineError, outcome

if TYPE_CHECKING:
    from bevt_fast.data.sources import Source
    from bevt_fast.data.views import Views
    from bevt_fast.training.distributed import World
    from bevt_fast.training.restored import Restored
    from bevt_fast.training.scoring import Scores

PROGRAMS = ("predict", "extract")
FEATURES = (".npz", ".parquet")
PREDICTIONS = (".json", ".csv")


def command_line(argv: list[str]) -> argparse.Namespace:
    """The options. The first word says which program: `predict`, `extract`, or without either the evaluation."""
    from bevt_fast.training.described import add_options

    program = argv[0] if argv and argv[0] in PROGRAMS else None
    summary, examples = str(__doc__).split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="evaluate.py" if program is None else f"evaluate.py {program}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    _add_view_options(parser)
    if program is None:
        _add_evaluation(parser)
    else:
        parser.add_argument("data", metavar="PATH", help="a video, a folder of videos, or a list of them")
        parser.set_defaults(source=None)
    if program == "predict":
        parser.add_argument("--top", type=_count, default=5, metavar="K", help="classes to name (default: %(default)s)")
        parser.add_argument("--class-names", metavar="FILE", help="names by class, where the checkpoint has none")
        parser.add_argument("--out", metavar="FILE", help="the answers, .json or .csv (default: the screen)")
    if program == "extract":
        parser.add_argument("--out", required=True, metavar="FILE", help="the features, .npz or .parquet")
        parser.add_argument(
            "--stage", choices=("1", "2", "3", "4", "pooled", "all"), default="pooled",
            help="of a stage, averaged over its grid, or of the norm after the last one (default: %(default)s)",
        )  # fmt: skip
    parser.set_defaults(run={"predict": predict, "extract": extract}.get(program or "", evaluate))
    return parser.parse_args(argv[1:] if program else argv)


def _add_view_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", type=_count, metavar="N", help="test clips of a video (default: the config's)")
    parser.add_argument("--crops", type=int, choices=(1, 3), help="crops of a clip (default: the config's)")
    parser.add_argument("--pixels", type=_count, metavar="N", help="side of a crop (default: the config's)")
    parser.add_argument("--frames", type=_count, metavar="N", help="of a clip of --data (default: the config's)")
    parser.add_argument("--stride", type=_count, metavar="N", help="frames from one of a clip to the next")
    parser.add_argument("--mode", choices=("interval", "uniform"), help="how a clip's frames are drawn")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="(default: bf16 on a GPU, else fp32)")
    parser.add_argument("--micro-batch", type=_count, default=8, metavar="N", help="views at once (%(default)s)")
    parser.add_argument("--workers", type=int, choices=range(257), default=2, metavar="N", help="reading processes")
    parser.add_argument("--threads", type=_count, metavar="N", help="of torch on a CPU (default: cores / processes)")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="PATH", help="labelled videos: a list, or a folder of one folder a class")
    parser.add_argument("--source", metavar="JSON", help='{"name": ..., "options": ...} or a file of it')
    parser.add_argument(
        "--temporal", action="store_true", help="also with a single frame, and with shuffled frames (paper, Table 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what --temporal draws (default: %(default)s)")
    parser.add_argument("--class-names", metavar="FILE", help="names by class, where data and checkpoint have none")
    parser.add_argument("--out", metavar="DIR", help="tables and pictures (default: RUN/evaluation)")


def evaluate(options: argparse.Namespace, world: "World") -> None:
    """Score the videos of a source, and report."""
    from bevt_fast.data.views import TEMPORAL
    from bevt_fast.training import score_report, scoring, test_data

    restored, source, views = _opened(options, labelled=True)
    scoring.check_labels(source, restored.description.classes or 0)
    test_data.check_class_names(restored, source)
    found: dict[str, Any] = {}
    plain = None
    for temporal in TEMPORAL if options.temporal else TEMPORAL[:1]:
        scores = _score(restored, source, views, world, options, temporal)
        plain = plain or scores
        found[temporal] = score_report.measures(scores)
    if plain is None or not world.is_main:
        return
    _say_bad(plain.bad)
    print("\n".join(score_report.lines(found, views)))
    results = {"checkpoint": str(restored.path), "source": source.name, "videos": len(source)}
    results |= {"views": views._asdict(), "frames": source.frames._asdict() if source.frames else None}
    results |= found["normal"]
    if len(found) > 1:
        results |= {"temporal": found, "drops": score_report.drops(found), "seed": options.seed}
    out = Path(options.out) if options.out else restored.run / "evaluation" if restored.run else None
    if out is None:
        return
    names = test_data.names_of(restored, options.class_names) or source.classes
    try:
        missing = score_report.write(out, results, plain, names)
    except OSError as error:
        raise MachineError(
            f"cannot write the results to {out}: {error.strerror or error}; name another --out"
        ) from None
    print("\n".join([*missing, f"wrote {out}"]))


def predict(options: argparse.Namespace, world: "World") -> None:
    """Name the most probable classes of each video."""
    from bevt_fast.training import answers, test_data

    _require_suffix(options.out, PREDICTIONS)
    restored, source, views = _opened(options)
    names = test_data.names_of(restored, options.class_names)
    scores = _score(restored, source, views, world, options)
    if world.is_main:
        _say_bad(scores.bad)
        said = answers.write_predictions(options.out, scores, source, names, options.top)
        print("\n".join(said))


def extract(options: argparse.Namespace, world: "World") -> None:
    """Write the features of each video."""
    from bevt_fast.training import answers, restored, scoring

    _require_suffix(options.out, FEATURES)
    model, source, views = _opened(options, needs_classes=False)
    reader, dtype = scoring.ViewReader(source, views), restored.precision(options.precision, world.device)
    encoder = model.classifier.encoder.to(world.device, dtype)
    found = scoring.averaged(
        lambda pixels: answers.features(encoder, pixels, options.stage),
        reader,
        world,
        workers=options.workers,
        micro_batch=options.micro_batch,
        dtype=dtype,
    )
    _require_some(found, source)
    if world.is_main:
        _say_bad(found.bad)
        answers.write_features(Path(options.out), found, source)
        print(f"wrote {options.out}: {tuple(found.probabilities.shape)}, a row a video")


def _opened(
    options: argparse.Namespace, needs_classes: bool = True, labelled: bool = False
) -> "tuple[Restored, Source, Views]":
    """The model, the videos, and how they are looked at. `labelled`: their labels must be classes of the model."""
    from bevt_fast.config import parse
    from bevt_fast.data.sources import ClipOptions
    from bevt_fast.training import described, restored, test_data

    model = restored.restore(described.given_of(options), needs_classes)
    drawn = {name: value for name in ("frames", "stride", "mode") if (value := getattr(options, name)) is not None}
    if drawn and options.data is None:
        raise ConfigError(f"--{next(iter(drawn))} belongs to --data; a source says itself how frames are drawn")
    clip = parse(ClipOptions, model.description.clip.model_dump() | drawn, "--data")
    classes = getattr(options, "class_names", None) or (model.description.classes if labelled else None)
    source = test_data.open_source(model, clip, options.data, options.source, classes)
    views = test_data.views_of(model, options.clips, options.crops, options.pixels)
    views.check(source.frames)
    return model, source, views


def _score(
    model: "Restored",
    source: "Source",
    views: "Views",
    world: "World",
    options: argparse.Namespace,
    temporal: Any = "normal",
) -> "Scores":
    """Scores of at least one video."""
    from bevt_fast.training import restored, scoring

    dtype = restored.precision(options.precision, world.device)
    scores = scoring.score(
        model.classifier.to(world.device, dtype),
        source,
        views,
        world,
        temporal=temporal,
        seed=getattr(options, "seed", 0),
        workers=options.workers,
        micro_batch=options.micro_batch,
        dtype=dtype,
    )
    _require_some(scores, source)
    return scores


def _require_some(scores: "Scores", source: "Source") -> None:
    if not len(scores.indices):
        first = scores.bad[0]
        raise DataError(
            f"none of the {len(source)} videos of {source.name} can be read, the first is {first['path']} "
            f"({first['kind']}: {first['reason']})"
        )


def _say_bad(bad: list[dict[str, Any]]) -> None:
    for record in bad[:5]:
        print(f"not scored: {record['path']} ({record['kind']}: {record['reason']})", file=sys.stderr)
    if len(bad) > 5:
        print(f"not scored: {len(bad) - 5} more", file=sys.stderr)


def _require_suffix(name: str | None, suffixes: tuple[str, ...]) -> None:
    if name is not None and Path(name).suffix not in suffixes:
        raise ConfigError(f"--out {name}: expected a name that ends in {' or '.join(suffixes)}")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the program the command line names. Returns the exit code."""
    options = command_line(sys.argv[1:] if argv is None else argv)
    return outcome(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from bevt_fast.training import distributed

    world = distributed.start(options.threads)
    try:
        options.run(options, world)
    finally:
        distributed.leave()


if __name__ == "__main__":
    sys.exit(main())
