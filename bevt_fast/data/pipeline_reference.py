"""From a decoded picture to what the encoder and the tokenizer see (SPEC 3.2 and 5.3), in NumPy and OpenCV.

This is the specification of `pipeline.py`. Workers hand out bytes (`clip_views`, `image_views`); the training device
turns them into numbers (`normalise`, `map_pixels`). Every parameter arrives in a Crop: nothing here is random.
"""

import functools

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bevt_fast.data.sampling import Crop

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # SPEC 5.3, of RGB in 0..255
GREY = np.array((0.2989, 0.587, 0.114), np.float32)  # SPEC 5.3
# OpenCV's 8-tap Lanczos half-way between two pixels, in 1/2048: where each pixel of an exactly halved picture falls
HALF_LANCZOS = (-26, 122, -340, 1267, 1267, -340, 122, -26)
BLOCK = 8  # rows of a halved picture that are made at once


def clip_views(frames: np.ndarray, crop: Crop, token_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, H, W, 3) uint8 -> pixels (T, S, S, 3) and token_pixels (T, s, s, 3), uint8; one crop for all."""
    pixels = clip_pixels(frames, crop)
    return pixels, np.stack([token_view(picture, token_size) for picture in pixels])


def clip_pixels(frames: np.ndarray, crop: Crop) -> np.ndarray:
    """The pixels of `clip_views`."""
    pixels = np.empty((len(frames), crop.size, crop.size, 3), np.uint8)
    for frame, picture in zip(frames, pixels):
        _crop(resized(frame, crop.height, crop.width), crop, picture)
    return pixels


def image_views(
    image: np.ndarray, crop: Crop, token_size: int, order: tuple[int, int, int] = (0, 1, 2)
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 -> pixels (S, S, 3) and token_pixels (s, s, 3), uint8, jittered as `crop.jitter` says.

    `order` is the order of brightness (0), contrast (1) and saturation (2). The tokens describe the jittered picture.
    """
    pixels = image_pixels(image, crop, order)
    return pixels, token_view(pixels, token_size)


def image_pixels(image: np.ndarray, crop: Crop, order: tuple[int, int, int] = (0, 1, 2)) -> np.ndarray:
    """The pixels of `image_views`."""
    picture, window = resized(image, crop.height, crop.width), _window(crop)
    picture = picture[window] if crop.jitter is None else jitter(picture, crop.jitter, order, window)
    return cv2.flip(picture, 1) if crop.flip else np.ascontiguousarray(picture)


def jitter(
    picture: np.ndarray,
    factors: tuple[float, float, float],
    order: tuple[int, int, int],
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> np.ndarray:
    """Brightness, contrast and saturation times `factors`, in `order`; float32 between, then 0..255 and truncated.

    Contrast moves away from the mean grey of the whole picture, saturation from each pixel's own grey (SPEC 5.3).
    Returns the `window` alone: what lies outside counts for the mean and no longer.
    """
    values = picture.astype(np.float32)
    for step in order:
        factor, grey = np.float32(factors[step]), np.float32(0)
        if step == 1:
            # the grey of the mean colour is the mean grey, in one pass over the picture
            grey = np.float32(np.array(cv2.mean(values)[:3]) @ GREY)
            values = values[window]
        elif step == 2:
            grey = cv2.transform(values, GREY[None])[..., None]
        values = values * factor + (1 - factor) * grey if step else values * factor
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def token_view(picture: np.ndarray, token_size: int) -> np.ndarray:
    """The tokenizer's copy of a crop (S, S, 3): OpenCV's Lanczos, without antialiasing, uint8 to uint8 (SPEC 3.2)."""
    if picture.shape[:2] != (2 * token_size, 2 * token_size) or token_size % BLOCK:
        return cv2.resize(picture, (token_size, token_size), interpolation=cv2.INTER_LANCZOS4)
    # the same bits in less time: OpenCV's integers, which float32 holds in the first pass and float64 in the second
    rows = _halved(picture.reshape(len(picture), -1), np.float32).reshape(token_size, -1, 3)
    columns = _halved(cv2.transpose(rows).reshape(len(picture), -1), np.float64)
    columns *= 2.0**-22
    columns += 0.5
    return cv2.transpose(np.clip(columns, 0, 255, out=columns).astype(np.uint8).reshape(token_size, -1, 3))


def _halved(rows: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """OpenCV's Lanczos of rows (2 n, m) in whole numbers, (n, m), 2048 times too large."""
    n, m = len(rows) // 2, rows.shape[1]
    padded = np.empty((2 * n + 7, m), dtype)
    padded[3:-4], padded[:3], padded[-4:] = rows, rows[0], rows[-1]
    # BLOCK rows at a time are a small matrix times the rows that they are made of
    taps, step = _taps(dtype), padded.strides[0]
    # not as_strided: it interns its names anew in every call, until CPython rebuilds its table of them in each worker
    windows = np.ndarray(
        (n // BLOCK, taps.shape[1], m), dtype, padded, strides=(2 * BLOCK * step, step, padded.itemsize)
    )
    return np.matmul(taps, windows).reshape(n, m)


@functools.cache
def _taps(dtype: type[np.floating]) -> np.ndarray:
    """(BLOCK, 2 BLOCK + 6): row i of a block is made of eight rows from 2 i on."""
    taps = np.zeros((BLOCK, 2 * BLOCK + 6), dtype)
    for i in range(BLOCK):
        taps[i, 2 * i : 2 * i + 8] = HALF_LANCZOS
    return taps


def half_token_view(pixels: UInt8[Tensor, "... S S 3"]) -> UInt8[Tensor, "... half half 3"]:
    """`token_view` at exactly half the size, for a whole batch on any device. The same bits: OpenCV's own integers.

    The taps' positive part is 2778 and their negative part 732, so sums stay below 255 * (2778² + 732²) < 2**31.
    """
    values = pixels.to(torch.int32).movedim(-1, -3)
    for _ in range(2):  # each pass halves the last axis and swaps the two
        end = values.shape[-1] // 2 * 2
        padded = torch.cat([values[..., :1]] * 3 + [values] + [values[..., -1:]] * 4, dim=-1)
        halved = torch.zeros_like(values[..., : end // 2])
        for tap, weight in enumerate(HALF_LANCZOS[:4]):  # the taps are symmetric
            pair = padded[..., tap : tap + end : 2] + padded[..., 7 - tap : 7 - tap + end : 2]
            halved.add_(pair, alpha=weight)
        values = halved.transpose(-1, -2)
    values = values.movedim(-3, -1)
    return ((values + (1 << 21)) >> 22).clamp(0, 255).to(torch.uint8)


def normalise(pixels: UInt8[Tensor, "*grid 3"], channels: int = -3) -> Float[Tensor, "*channels_within_grid"]:
    """What the encoder sees: RGB minus the mean, over the deviation (SPEC 5.3). `channels` is their axis, from the
    end: -3, or -4 for clips with the frames behind them.
    """
    if pixels.device.type == "cpu":
        return _looked_up(pixels, channels, normalise_table())
    shape = (3, *(1,) * (-channels - 1))
    mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(shape) for values in (MEAN, STD))
    # bytes are moved, not numbers of four times their size
    return pixels.movedim(-1, channels).contiguous().float().sub_(mean).div_(std)


@functools.cache
def normalise_table() -> np.ndarray:
    """What `normalise` makes of each byte: (3, 256) float32."""
    values = torch.arange(256, dtype=torch.float32)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1) for values in (MEAN, STD))
    return ((values - mean) / std).numpy()


@functools.cache
def map_table() -> np.ndarray:
    """What `map_pixels` makes of each byte of each channel: (3, 256) float32."""
    return torch.arange(256, dtype=torch.float32).div_(255).mul_(0.8).add_(0.1).repeat(3, 1).numpy()


def _looked_up(pixels: Tensor, channels: int, table: np.ndarray) -> Tensor:
    """Each byte of pixels (..., S, S, 3) as `table` (3, 256) has it, with the channels at `channels`: one pass over
    memory where arithmetic takes three.
    """
    pictures = pixels.contiguous().numpy()
    numbers = torch.empty(pixels.movedim(-1, channels).shape)
    places = numbers.movedim(channels, -3).numpy()  # the same memory, channels before rows
    for place in np.ndindex(pictures.shape[:-3]):
        for values, plane, row in zip(places[place], cv2.split(pictures[place]), table):
            cv2.LUT(plane, row, values)
    return numbers


def denormalise(pixels: Float[Tensor, "B 3 *grid"]) -> UInt8[Tensor, "B 3 *grid"]:
    """Back from what the encoder sees to a picture; the channels are the second axis, of images and clips alike."""
    shape = (1, 3, *(1,) * (pixels.ndim - 2))
    mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(shape) for values in (MEAN, STD))
    return (pixels.float() * std + mean).round().clamp(0, 255).to(torch.uint8)


def map_pixels(pixels: UInt8[Tensor, "... H W 3"]) -> Float[Tensor, "... 3 H W"]:
    """What the tokenizer sees: 0..255 moved into [0.1, 0.9], channels first (SPEC 3.2)."""
    if pixels.device.type == "cpu" and pixels.shape[-1] == 3:
        return _looked_up(pixels, -3, map_table())
    return pixels.movedim(-1, -3).contiguous().float().div_(255).mul_(0.8).add_(0.1)


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bicubic, which does not antialias (SPEC 5.3)."""
    if picture.shape[:2] == (height, width):
        return picture
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)


def _crop(picture: np.ndarray, crop: Crop, into: np.ndarray) -> np.ndarray:
    """Writes the window of a crop, flipped if it says so, `into` an array of its size."""
    window = picture[_window(crop)]
    if crop.flip:
        return cv2.flip(window, 1, into)
    into[:] = window
    return into


def _window(crop: Crop) -> tuple[slice, slice]:
    return slice(crop.top, crop.top + crop.size), slice(crop.left, crop.left + crop.size)
