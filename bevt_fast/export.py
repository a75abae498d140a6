"""A classifier in the names and forms of others: official, torchvision, safetensors, torch.export, ONNX.

python bevt_fast/export.py --checkpoint runs/k400 --to safetensors --out exported
python bevt_fast/export.py --checkpoint runs/k400 --to official --out k400.pth
python bevt_fast/export.py --checkpoint runs/k400 --to torchvision --out swin3d_b.pth
python bevt_fast/export.py --checkpoint swin3d_b.pth --size base --classes 400 --to safetensors --out exported
python bevt_fast/export.py --checkpoint runs/k400 --to onnx --out k400.onnx

Every form is read back before the program ends: names give the same bits, programs the same logits.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]
else:  # run as a module of a clone that may not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from bevt_fast.errors import ConfigError, MachineError, outcome

if TYPE_CHECKING:
    from bevt_fast.training.restored import Restored

TARGETS = ("safetensors", "official", "torchvision", "torch_export", "onnx")
SUFFIXES = {
    "official": (".pth", ".pt", ".safetensors"),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "torch_export": (".pt2",),
    "onnx": (".onnx",),
}


def command_line(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    from bevt_fast.training.described import add_options

    summary, examples = str(__doc__).split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--to", required=True, metavar="FORM", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--out", required=True, metavar="PATH", help="the file, or for safetensors the folder")
    parser.add_argument("--frames", type=int, metavar="N", help="of a clip, for torch_export and onnx (the config's)")
    parser.add_argument("--pixels", type=int, metavar="N", help="a side, for torch_export and onnx (the config's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def export(options: argparse.Namespace) -> list[str]:
    """Write the form that was asked for, read it back, compare. Returns what to say."""
    out = Path(options.out)
    _check_target(options.to, out, options.overwrite)
    from bevt_fast.training import exported
    from bevt_fast.training.described import given_of
    from bevt_fast.training.restored import restore

    restored = restore(given_of(options))
    try:
        if options.to == "safetensors":
            return exported.write_directory(restored, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        if options.to in ("official", "torchvision"):
            return exported.write_names(restored, out, options.to)
        clip = _example(restored, options.frames, options.pixels)
        write = exported.write_program if options.to == "torch_export" else exported.write_onnx
        return write(restored.classifier, out, clip)
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror or error}; name another --out") from None


def _check_target(target: str, out: Path, overwrite: bool) -> None:
    """Raises ConfigError for a form there is not, or a place that does not suit it."""
    if target not in TARGETS:
        import difflib

        near = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no form {target!r} to export to; there are: {', '.join(TARGETS)}{hint}")
    if target != "safetensors" and out.suffix not in SUFFIXES[target]:
        raise ConfigError(f"--out {out}: {target} is a file that ends in {' or '.join(SUFFIXES[target])}")
    if target == "safetensors" and out.suffix:
        raise ConfigError(f"--out {out}: safetensors is a folder of config.json and model.safetensors; name a folder")
    there = (out / "model.safetensors").exists() if target == "safetensors" else out.exists()
    if there and not overwrite:
        raise ConfigError(f"{out} is there already; name another --out, or add --overwrite to replace it")


def _example(restored: "Restored", frames: int | None, pixels: int | None) -> tuple[int, int, int]:
    """The shape of the one clip a program is traced with: frames, height, width."""
    side = pixels if pixels is not None else restored.description.test.size
    count = frames if frames is not None else restored.description.clip.frames
    if count < 1 or side < 1:
        raise ConfigError(f"a clip has 1 or more frames and pixels, not {count} and {side}")
    return count, side, side


def main(argv: list[str] | None = None) -> int:
    """Export as the command line says. Returns the exit code."""
    options = command_line(argv)
    return outcome(lambda: print("\n".join(export(options))))


if __name__ == "__main__":
    sys.exit(main())
