"""Drawn scenes with two independent labels: a hue, seen in any frame, and a motion, seen in none.

A scene is a background and a few objects on a torus (what leaves on the right enters on the left). An object's state is

    s = (x, y, turn, growth), each coordinate on a circle of length 1;  radius = low * (high / low) ** growth

and every motion moves one coordinate at the object's own speed v, forwards or backwards: frame k of n frames shows

    s_k = (s + sign * v * (k - (n - 1) / 2)) mod 1      in the moving coordinate, s in the others.

One frame. `draw_scene` is not told the motion and draws s uniformly, independent of all else. Adding a constant modulo
1 leaves the uniform law as it is. So at every k the state, and with it the picture, has the same law under all eight
motions: a single frame says nothing about the motion.

Shuffled frames. k - (n - 1) / 2 changes its sign when time turns round, so frame k of a motion is frame n - 1 - k of
its reverse in the same scene: both show the same set of frames. For every d-th frame the two sets differ by a constant
number of frames, which the uniform law of s takes up as above. So without the order of time a motion and its reverse
cannot be told apart.

The price: an object that has grown to the largest radius goes on at the smallest.
"""

import colorsys
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# reverses stand side by side: motion m backwards is m ^ 1; y counts downwards, so turn counts clockwise
MOTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise", "grow", "shrink")
HUES = ("red", "amber", "chartreuse", "green", "cyan", "blue", "violet", "magenta")  # i * 45 degrees

RADIUS = (0.12, 0.27)  # of the side; below a half, so that an object never meets itself around the torus
# shares of the circle per frame: 0.9 to 1.5 pixels of 96, 5 to 9 degrees, 2.5 to 4 % of the radius
SPEEDS = ((0.0094, 0.0156), (0.0094, 0.0156), (5 / 360, 9 / 360), (0.03, 0.05))
# ranges of HSV: duller scenery, brighter objects, so that the hue that counts is the objects'
SCENERY = ((0.0, 1.0), (0.1, 0.6), (0.3, 0.8))
BRIGHT = ((0.75, 1.0), (0.8, 1.0))
DARKER = (0.35, 0.6)  # value of the dark colour of a texture, as a share of the light one's
WAVES = 0.015  # amplitude on a scale of 0 to 1; stronger waves make hidden cells hard to guess


class State(NamedTuple):
    """Where an object is: four coordinates in [0, 1), each on a circle."""

    x: float
    y: float
    turn: float
    growth: float


@dataclass(frozen=True, kw_only=True)
class Object:
    """One coloured shape. `speeds` holds one for each coordinate of the state, so that no motion is named here."""

    middle: State  # at the middle of the clip
    speeds: tuple[float, ...]  # per frame
    shape: int
    texture: int
    light: tuple[float, ...]  # RGB in [0, 1]
    dark: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background from one colour to another, with weak waves, and the objects before it, the last one in front."""

    colours: tuple[tuple[float, ...], ...]  # two, RGB in [0, 1]
    slope: float  # direction of the change of colour, radians
    waves: tuple[tuple[int, int, float], ...]  # cycles across, cycles down, phase
    objects: tuple[Object, ...]


def draw_scene(rng: np.random.Generator, hue: int, objects: int) -> Scene:
    """A scene whose objects have hue `hue` of `HUES`. All else is drawn, whatever the motion will be."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(rng.random())

    def integer(count: int) -> int:
        return int(rng.integers(count))

    def coloured_object() -> Object:
        middle = State(*(uniform(0, 1) for _ in State._fields))
        speeds = tuple(uniform(*bounds) for bounds in SPEEDS)
        # a fifth of the distance to the next hue at most
        angle = (hue + uniform(-0.2, 0.2)) / len(HUES) % 1
        saturation, value = (uniform(*bounds) for bounds in BRIGHT)
        return Object(
            middle=middle,
            speeds=speeds,
            shape=integer(len(SHAPES)),
            texture=integer(len(TEXTURES)),
            light=colorsys.hsv_to_rgb(angle, saturation, value),
            dark=colorsys.hsv_to_rgb(angle, saturation, value * uniform(*DARKER)),
        )

    return Scene(
        colours=tuple(colorsys.hsv_to_rgb(*(uniform(*bounds) for bounds in SCENERY)) for _ in range(2)),
        slope=uniform(0, 2 * math.pi),
        waves=tuple((integer(3), integer(3), uniform(0, 2 * math.pi)) for _ in range(2)),
        objects=tuple(coloured_object() for _ in range(objects)),
    )


def state(item: Object, motion: int, offset: float) -> State:
    """The state `offset` frames after the middle of the clip, under `motion`: an index of `MOTIONS`."""
    axis, sign = motion // 2, 1 - 2 * (motion % 2)
    values = list(item.middle)
    values[axis] = (values[axis] + sign * item.speeds[axis] * offset) % 1.0
    return State(*values)


def render_clip(scene: Scene, motion: int, size: int, length: int) -> np.ndarray:
    """The frames of a clip: (length, size, size, 3) uint8 RGB."""
    background = _background(scene, size)
    return np.stack([_frame(background, scene, motion, k - (length - 1) / 2) for k in range(length)])


def render_frame(scene: Scene, motion: int, size: int, offset: float = 0.0) -> np.ndarray:
    """The scene `offset` frames after the middle of the clip, where all motions meet: (size, size, 3) uint8 RGB."""
    return _frame(_background(scene, size), scene, motion, offset)


def _frame(background: np.ndarray, scene: Scene, motion: int, offset: float) -> np.ndarray:
    canvas = background.copy()
    for item in scene.objects:
        _paint(canvas, item, state(item, motion, offset))
    return (canvas * 255 + 0.5).astype(np.uint8)


def _background(scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) float32 in [0, 1]."""
    across = (np.arange(size, dtype=np.float32) + 0.5) / size
    down = across[:, None]
    along = math.cos(scene.slope) * (across - 0.5) + math.sin(scene.slope) * (down - 0.5)
    share = np.clip(0.5 + along, 0, 1)
    waves = np.zeros((size, size), dtype=np.float32)
    for right, below, phase in scene.waves:
        waves += np.sin(2 * math.pi * (right * across + below * down) + phase)
    first, second = (np.array(colour, dtype=np.float32) for colour in scene.colours)
    return np.clip(first + share[..., None] * (second - first) + WAVES * waves[..., None], 0, 1)


def _paint(canvas: np.ndarray, item: Object, at: State) -> None:
    """Draws an object onto the canvas (size, size, 3), in place, around the torus."""
    size = len(canvas)
    radius = size * RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** at.growth
    # python floats: a float64 scalar would promote every float32 array below
    x, y, reach = at.x * size, at.y * size, math.ceil(radius * 1.25) + 1
    columns = np.arange(math.floor(x) - reach, math.floor(x) + reach + 1)
    rows = np.arange(math.floor(y) - reach, math.floor(y) + reach + 1)
    across = (columns.astype(np.float32) + 0.5 - x) / radius
    down = (rows.astype(np.float32)[:, None] + 0.5 - y) / radius
    cosine, sine = math.cos(2 * math.pi * at.turn), math.sin(2 * math.pi * at.turn)
    u, v = cosine * across + sine * down, cosine * down - sine * across
    # coverage of a pixel from its distance to the outline; one pixel is 1 / radius
    alpha = np.clip(0.5 - SHAPES[item.shape](u, v) * radius, 0, 1)[..., None]
    shade = np.clip(0.5 + TEXTURES[item.texture](u, v) * 3, 0, 1)[..., None]
    light, dark = np.array(item.light, dtype=np.float32), np.array(item.dark, dtype=np.float32)
    place = np.ix_(rows % size, columns % size)
    below = canvas[place]
    canvas[place] = below + alpha * (dark + shade * (light - dark) - below)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, inner: float) -> np.ndarray:
    angles = [2 * math.pi * k / sides for k in range(sides)]
    return np.max([math.cos(a) * u + math.sin(a) * v for a in angles], axis=0) - inner


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    wide, narrow = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    return np.maximum(wide - 1.05, narrow - 0.42)


# signed distance to the outline, in radii, of coordinates in radii: negative inside; areas alike, none beyond 1.25
SHAPES = (
    lambda u, v: np.sqrt(u * u + v * v) - 0.95,
    lambda u, v: _polygon(u, v, 4, 0.84),
    lambda u, v: _polygon(u, v, 3, 0.62),
    _cross,
)
# positive where the light colour is; none looks the same after less than a quarter turn
TEXTURES = (
    lambda u, v: np.sin(2 * math.pi * u),
    lambda u, v: np.sin(math.pi * u) * np.sin(math.pi * v) * 2,
    lambda u, v: v * 2,
    lambda u, v: 0.6 + np.cos(2 * math.pi * u) + np.cos(2 * math.pi * v),
)
