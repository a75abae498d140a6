"""Training views of labelled clips: what is drawn, from a random.Random alone, and what is then done to the frames.

Everything is drawn once a clip and is the same in all of its frames (SPEC 6.1, 6.4). Frames are (T, H, W, 3) uint8 RGB.

Pictures are resized bilinearly: the official fine-tuning and test configurations leave mmcv's default, while those of
pretraining ask for bicubic (SPEC 5.3). The views of a test (`views.py`) are resized by the same function, so that a
classifier is judged on the pictures it was trained on.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

GREY = (128, 128, 128)  # what geometric operations fill with (SPEC 6.4)
ATTEMPTS = 10  # at a crop, and at a rectangle to erase, that fit


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


class Operation(NamedTuple):
    """One of `OPERATIONS`, and the numbers it was drawn with."""

    name: str
    value: float = 0.0
    place: tuple[float, float] = (0.0, 0.0)  # of a cutout's centre, in shares of width and height


class Strong(NamedTuple):
    """What RandAugment does to a clip: flip and crop (shares of top, right, bottom, left) before the operations."""

    flip: bool
    crop: tuple[float, float, float, float]
    operations: tuple[Operation, ...]


def draw_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """A crop of an area of `scale` of the picture and an aspect (width / height) of `ratio`, its logarithm uniform.

    After ten that do not fit, the largest square in the middle (SPEC 6.1: RandomResizedCrop).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        area = height * width * (scale[0] + rng.random() * (scale[1] - scale[0]))
        aspect = math.exp(low + rng.random() * (high - low))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def draw_erasing(size: int, share: float, rng: random.Random) -> Box:
    """The rectangle that `share` of the clips of side `size` lose: area 2 to 33 %, aspect 0.3 to 3.3 (SPEC 6.4); an
    empty one for the others.
    """
    if rng.random() >= share:
        return Box(0, 0, 0, 0)
    low, high = math.log(0.3), math.log(1 / 0.3)
    for _ in range(ATTEMPTS):
        area = size * size * (0.02 + rng.random() * (1 / 3 - 0.02))
        aspect = math.exp(low + rng.random() * (high - low))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < size and 0 < w < size:
            return Box(int(rng.random() * (size - h + 1)), int(rng.random() * (size - w + 1)), h, w)
    return Box(0, 0, 0, 0)


def draw_mix(alpha: float, rng: random.Random) -> float:
    """How much of a sample stays when it is mixed with another: Beta(alpha, alpha), or 1 (Zhang et al. 2018)."""
    return rng.betavariate(alpha, alpha) if alpha > 0 else 1.0


def draw_strong(n: int, m: int, hidden: bool, rng: random.Random) -> Strong:
    """`n` different operations of magnitude `m` of 30 in random order, each to a random side where it has two.

    With `hidden`, a flip with probability 0.5 and a crop of up to m / 224 a side before (SPEC X14). The numbers are
    drawn either way, so that the switch changes no other draw.
    """
    flip = rng.random() < 0.5
    crop = tuple(rng.random() * m / 224 for _ in range(4))
    drawn = []
    for name in rng.sample(sorted(OPERATIONS), n):
        sign, place = (1.0 if rng.random() < 0.5 else -1.0), (rng.random(), rng.random())
        magnitude, signed = MAGNITUDES.get(name, (0.0, False))
        drawn.append(Operation(name, magnitude * m / 30 * (sign if signed else 1.0), place))
    if not hidden:
        flip, crop = False, (0.0, 0.0, 0.0, 0.0)
    return Strong(flip, crop, tuple(drawn))  # pyright: ignore[reportArgumentType]


def cut(frames: np.ndarray, short_side: int, box: Box, size: int, flip: bool) -> np.ndarray:
    """Short side, crop, size, flip: (T, H, W, 3) -> (T, size, size, 3) (SPEC 6.1).

    `box` is in pixels of the rescaled picture.
    """
    height, width = rescaled(frames.shape[1], frames.shape[2], short_side)
    top, left, h, w = box
    pixels = np.empty((len(frames), size, size, 3), np.uint8)
    for frame, picture in zip(frames, pixels):
        window = resized(frame, height, width)[top : top + h, left : left + w]
        window = resized(window, size, size)
        picture[:] = cv2.flip(window, 1) if flip else window
    return pixels


def rescaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Rows and columns of a picture whose short side is `short_side`; rounding as in mmcv."""
    scale = short_side / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def strengthen(pixels: np.ndarray, strong: Strong) -> np.ndarray:
    """RandAugment on (T, S, S, 3)."""
    height, width = pixels.shape[1:3]
    top, right, bottom, left = (round(share * side) for share, side in zip(strong.crop, (height, width) * 2))
    out = np.empty_like(pixels)
    for frame, picture in zip(pixels, out):
        frame = cv2.flip(frame, 1) if strong.flip else frame
        image = Image.fromarray(resized(frame[top : height - bottom, left : width - right], height, width))
        for operation in strong.operations:
            image = OPERATIONS[operation.name](image, operation)
        picture[:] = image
    return out


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bilinear, which does not antialias."""
    if picture.shape[:2] == (height, width):
        return picture
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, operation: Operation):
    return enhancer(image).enhance(1 + operation.value)


def _moved(kind: str, image: Image.Image, operation: Operation) -> Image.Image:
    """Shear about the centre by degrees, or translate by a share of the side. SPEC leaves the interpolation open."""
    width, height = image.size
    tangent = math.tan(math.radians(operation.value))
    matrix = {
        "shear_x": (1, tangent, -tangent * height / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, tangent, 1, -tangent * width / 2),
        "translate_x": (1, 0, -operation.value * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -operation.value * height),
    }[kind]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


def _cutout(image: Image.Image, operation: Operation) -> Image.Image:
    """One grey square of a share of the side, its centre anywhere."""
    width, height = image.size
    half_w, half_h = operation.value * width / 2, operation.value * height / 2
    x, y = operation.place[0] * width, operation.place[1] * height
    box = (max(round(x - half_w), 0), max(round(y - half_h), 0), round(x + half_w), round(y + half_h))
    image = image.copy()
    image.paste(GREY, (box[0], box[1], min(box[2], width), min(box[3], height)))
    return image


def _rotated(image: Image.Image, operation: Operation) -> Image.Image:
    return image.rotate(operation.value, Image.Resampling.BILINEAR, fillcolor=GREY)


# SPEC 6.4: the value at magnitude 30, and whether its sign is random; operations without one are not in it
MAGNITUDES = {
    "rotate": (30.0, True),
    "posterize": (4.0, False),
    "solarize": (256.0, False),
    "colour": (0.9, True),
    "contrast": (0.9, True),
    "brightness": (0.9, True),
    "sharpness": (0.9, True),
    "shear_x": (math.degrees(0.3), True),
    "shear_y": (math.degrees(0.3), True),
    "translate_x": (0.33, True),
    "translate_y": (0.33, True),
    "cutout": (20 / 32, False),
}
OPERATIONS: dict[str, Callable[[Image.Image, Operation], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "rotate": _rotated,
    "posterize": lambda image, operation: ImageOps.posterize(image, int(8 - operation.value)),
    "solarize": lambda image, operation: ImageOps.solarize(image, 256 - int(operation.value)),
    "colour": functools.partial(_enhanced, ImageEnhance.Color),
    "contrast": functools.partial(_enhanced, ImageEnhance.Contrast),
    "brightness": functools.partial(_enhanced, ImageEnhance.Brightness),
    "sharpness": functools.partial(_enhanced, ImageEnhance.Sharpness),
    "shear_x": functools.partial(_moved, "shear_x"),
    "shear_y": functools.partial(_moved, "shear_y"),
    "translate_x": functools.partial(_moved, "translate_x"),
    "translate_y": functools.partial(_moved, "translate_y"),
    "cutout": _cutout,
    "blur": lambda image, _: image.filter(ImageFilter.BLUR),
    "smooth": lambda image, _: image.filter(ImageFilter.SMOOTH),
}
