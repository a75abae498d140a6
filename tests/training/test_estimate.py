"""Figures from shapes equal the published ones, torch's own FLOP counter, and the model that is really built."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bevt_fast import config as configuration
from bevt_fast.data import sources
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig
from bevt_fast.training import estimate
from bevt_fast.training.estimate import StreamShape

IMAGE = StreamShape("images", 1, 224, 0.498)  # mean hidden share, SPEC 2.1 and 2.3
CLIP = StreamShape("clips", 16, 224, 0.374)
LONG = CLIP._replace(frames=32)
BASE = VideoSwinConfig.preset("base")
# windows that are clipped in time at 4 frames and in space in the last stages; depths with and without a shifted block
ODD = VideoSwinConfig(embed_dim=24, depths=(1, 2, 1, 2), heads=(2, 3, 4, 6), window=(2, 3, 3), mlp_ratio=3.0)


def giga(flops: float | None, digits: int) -> float:
    assert flops is not None
    return round(flops / 1e9, digits)


@pytest.mark.parametrize(
    "size, window, stream, gflop",
    [
        ("base", (8, 7, 7), IMAGE, 30.9),
        ("base", (8, 7, 7), CLIP, 281.3),
        ("base", (8, 7, 7), LONG, 562.7),
        ("base", (16, 7, 7), LONG, 640.7),
        ("tiny", (8, 7, 7), CLIP, 87.8),
        ("tiny", (8, 7, 7), LONG, 175.5),
        ("small", (8, 7, 7), LONG, 331.4),
        ("large", (8, 7, 7), LONG, 1206.5),
    ],
)
def test_encoder_flops_of_spec_8_1(size: str, window: tuple[int, int, int], stream: StreamShape, gflop: float) -> None:
    assert giga(estimate.encoder_flops(VideoSwinConfig.preset(size, window=window), stream), 1) == gflop


def test_stage_flops_of_spec_8_1() -> None:
    assert [giga(flops, 1) for flops in estimate.stage_flops(BASE, IMAGE)] == [2.8, 2.8, 22.8, 2.5]
    assert [giga(flops, 0) for flops in estimate.stage_flops(BASE, CLIP)] == [31, 26, 202, 21]


def test_decoder_head_and_tokenizer_flops_of_spec_8_1() -> None:
    assert giga(estimate.decoder_flops(BASE, IMAGE), 2) == 1.03
    assert giga(estimate.decoder_flops(BASE, CLIP), 1) == 14.8
    assert giga(estimate.head_flops(BASE, 8192, IMAGE.cells), 2) == 3.29
    assert giga(estimate.head_flops(BASE, 8192, CLIP.cells), 1) == 52.6
    assert giga(estimate.head_flops(BASE, 8192, IMAGE.hidden * IMAGE.cells), 2) == 1.64
    assert giga(estimate.head_flops(BASE, 8192, CLIP.hidden * CLIP.cells), 1) == 19.7
    assert giga(estimate.tokenizer_flops("dalle", 8192, 112), 1) == 52.1
    assert giga(estimate.costs(BASE, CLIP, "dalle", 8192).tokenizer, 1) == 833.9


def test_training_flops_of_spec_8_2_row_b() -> None:
    assert giga(estimate.costs(BASE, IMAGE, "dalle", 8192).training, 1) == 152.7
    assert giga(estimate.costs(BASE, CLIP, "dalle", 8192).training, 0) == 1781


def test_parameters_of_spec_1_1() -> None:
    decoder = 4_195_328 + 1_573_888
    assert estimate.parameters(BASE, 8192) == {
        "clip stem": 12_672,
        "image stem": 6_528,
        "mask token": 128,
        "four stages": 87_624_264,
        "final norm": 2_048,
        "image decoder": decoder,
        "clip decoder": decoder + 2_098_176,
        "token head": 8_396_800,
    }
    assert sum(estimate.parameters(BASE, 8192).values()) == 109_679_048
    assert estimate.tokenizer_parameters("dalle", 8192) == 53_786_240


@pytest.mark.parametrize(
    "size, window, count",
    [
        ("tiny", (8, 7, 7), 27_850_470),
        ("small", (16, 7, 7), 50_271_606),
        ("base", (16, 7, 7), 88_655_688),
        ("large", (8, 7, 7), 196_339_116),
    ],
)
def test_encoder_parameters_of_spec_1_1(size: str, window: tuple[int, int, int], count: int) -> None:
    parts = estimate.parameters(VideoSwinConfig.preset(size, window=window), 8192)
    assert parts["clip stem"] + parts["four stages"] + parts["final norm"] == count


@pytest.mark.parametrize("streams", [("images",), ("clips",), ("images", "clips")], ids="+".join)
def test_parameters_are_those_of_the_model(streams: tuple[str, ...]) -> None:
    names = {
        "encoder.stem": "clip stem",
        "encoder.stage": "four stages",
        "encoder.norm": "final norm",
        "image_stem": "image stem",
        "mask_token": "mask token",
        "image_decoder": "image decoder",
        "clip_decoder": "clip decoder",
        "head": "token head",
    }
    counts = Counter()
    for name, parameter in Bevt(ODD, vocab_size=50, streams=streams).named_parameters():
        counts[next(part for prefix, part in names.items() if name.startswith(prefix + "."))] += parameter.numel()
    assert estimate.parameters(ODD, 50, streams) == dict(counts)


@pytest.mark.parametrize("frames, side", [(10, 52), (4, 96), (3, 40)])
def test_clip_encoder_flops_are_torchs_count_with_padding_and_clipped_windows(frames: int, side: int) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        VideoSwin(ODD).stages(torch.zeros(1, 3, frames, side, side))
    assert estimate.encoder_flops(ODD, StreamShape("clips", frames, side, 0.5)) == counter.get_total_flops()


@pytest.mark.parametrize("stream", [StreamShape("images", 1, 96, 0.5), StreamShape("clips", 6, 96, 0.5)])
def test_forward_flops_are_torchs_count(stream: StreamShape) -> None:
    model = Bevt(ODD, vocab_size=50, streams=(stream.name,)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = _features(model, stream, torch.float32, 1)
        features = model.head(features.flatten(0, -2)[: stream.cells // 2])
    cost = estimate.costs(ODD, stream, "patch_kmeans", 50)
    assert cost.encoder + cost.decoder + cost.head == counter.get_total_flops()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stream", [StreamShape("images", 1, 96, 0.5), StreamShape("clips", 8, 96, 0.5)])
def test_activations_are_what_autograd_keeps_to_a_tenth(stream: StreamShape, precision: str) -> None:
    kept = [_kept_bytes(stream, estimate.BYTES[precision], batch) for batch in (1, 3)]
    estimated = estimate.activation_bytes(ODD, stream, 50, precision, checkpointing=False)
    assert abs(estimated / ((kept[1] - kept[0]) / 2) - 1) < 0.1  # "good to a tenth" is what the function promises


def test_checkpointing_keeps_less() -> None:
    plain, less = (
        estimate.activation_bytes(BASE, CLIP, 8192, "bf16", checkpointing) for checkpointing in (False, True)
    )
    assert less < plain / 3


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_state_is_that_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, Adam in mixed precision, 64 processes
    state = estimate.state_bytes(7_500_000_000, "bf16", stage, 64)
    assert round(sum(state.values()) / 1e9, 1) == gigabytes


def test_state_in_float32_without_zero_has_no_second_copy() -> None:
    assert sum(estimate.state_bytes(1, "fp32", 0, 4).values()) == 16  # weights, gradients, two moments


@pytest.fixture
def joint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> configuration.Config:
    """The joint recipe on a source whose data are not there."""
    (tmp_path / "no_data.py").write_text(
        "from bevt_fast.config import Section\nclass Options(Section):\n    frames: int = 1\n"
    )
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    stream = {"source": {"name": "no_data"}, "mask": {"name": "blockwise"}, "batch": 2048, "micro_batch": 64}
    clips = {"source": {"name": "no_data", "options": {"frames": 16}}, "mask": {"name": "tube"}}
    values = {
        "output": "nowhere",
        "images": stream,
        "clips": stream | clips | {"batch": 256, "micro_batch": 8},
        "tokenizer": {"name": "dalle", "options": {"weights": "none"}},
        "optim": {"lr": 1e-3},
        "train": {"steps": 141_000},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    return configuration.parse(configuration.Config, values, "test")


# spreads of one mask's hidden share (SPEC 2.1: 0.93 cells; SPEC 2.3: tubes of 4 to 8 steps, all lengths alike)
IMAGE_ERROR = 3 * 0.93 / 196 / estimate.MASKS**0.5
CLIP_ERROR = 3 * (2**0.5 / 8 * 0.498) / estimate.MASKS**0.5


def test_hidden_shares_and_frames_come_from_the_parts(joint: configuration.Config) -> None:
    images, clips = estimate.stream_shapes(joint)
    assert (images.frames, clips.frames, clips.side) == (1, 16, 224)
    assert abs(images.hidden - 97.53 / 196) < IMAGE_ERROR
    assert abs(clips.hidden - 0.374) < CLIP_ERROR + 0.0005  # printed to three digits


def test_a_step_is_the_batch_of_both_streams(joint: configuration.Config) -> None:
    # SPEC 8.2, row B, to its printed digits; the head's share is that of the masks drawn
    allowed = 256 * (0.5 + 3 * 52.6 * CLIP_ERROR) + 2048 * (0.05 + 3 * 3.29 * IMAGE_ERROR)
    assert abs(estimate.step_flops(joint) / 1e9 - (256 * 1781 + 2048 * 152.7)) < allowed
    images_only = joint.model_copy(update={"clips": None})
    assert estimate.step_flops(images_only) < 0.5 * estimate.step_flops(joint)


def test_the_report_says_shapes_parameters_flops_and_memory(joint: configuration.Config) -> None:
    text = estimate.report(joint, world_size=4)
    for figure in (
        "109,679,048", "53,786,240", "8 x 56 x 56 x 128", "1 x 7 x 7 x 1024", "windows of 8 x 7 x 7", "201.9 GFLOP",
        "833.9 GFLOP", "256 clips (8 x 8 x 4)", "2048 images (8 x 64 x 4)", "ZeRO 2, 4 processes", "141,000 steps",
    ):  # fmt: skip
        assert figure in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_tokenizer_of_unknown_layers_is_said_not_to_count() -> None:
    cost = estimate.costs(BASE, IMAGE, "another", 8192)
    assert cost.tokenizer is None
    assert cost.training == 3 * (cost.encoder + cost.decoder + cost.head)


def _features(model: Bevt, stream: StreamShape, dtype: torch.dtype, batch: int) -> torch.Tensor:
    """Decoder features of noise, the first half of the rows of cells hidden."""
    side = stream.side // 16
    frames = (stream.frames,) if stream.name == "clips" else ()
    mask = torch.zeros(batch, *(count // 2 for count in frames), side, side, dtype=torch.bool)
    mask[..., : side // 2, :] = True
    pixels = torch.randn(batch, 3, *frames, stream.side, stream.side, dtype=dtype)
    return model.clip_features(pixels, mask) if frames else model.image_features(pixels, mask)


def _kept_bytes(stream: StreamShape, size: int, batch: int) -> int:
    """Bytes of all storages that autograd saves for the backward pass, weights left out."""
    dtype = torch.float32 if size == 4 else torch.bfloat16
    model = Bevt(ODD, vocab_size=50, streams=(stream.name,)).to(dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = _features(model, stream, dtype, batch)
        mask = torch.zeros(features.shape[:-1], dtype=torch.bool)
        mask[..., : mask.shape[-2] // 2, :] = True
        logits = model.head(features[mask]).float()
        torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
    return sum(storage.nbytes() for storage in storages.values())
