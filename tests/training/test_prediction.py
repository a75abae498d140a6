"""Predictions from data sheets: the published roofline, the settings that fit, and what is said without memory."""

import math
from typing import Any

import pytest
import torch

from bevt_fast import config as configuration
from bevt_fast.errors import ConfigError
from bevt_fast.training import estimate, gpus, memory, metrics, prediction, roofline
from bevt_fast.training.estimate import StreamShape
from bevt_fast.training.memory import Place
from tests.training.command import ROOT

H100 = gpus.named("H100")
# the mean shares of the recipe's masks, as the sources of the figures below take them
STREAMS = [StreamShape("images", 1, 224, 0.498), StreamShape("clips", 16, 224, 0.374, tokenized=0.75)]


def recipe(name: str, *overrides: str) -> configuration.Config:
    return configuration.load(ROOT / "configs" / f"{name}.json", overrides)


def unit(nominal: bool) -> dict[str, float]:
    """Microseconds of a clip and eight images by part."""
    config = recipe("joint")
    images, clips = (roofline.sample_seconds(config, stream, H100, nominal) for stream in STREAMS)
    return {part: 1e6 * (8 * images[part] + clips[part]) for part in clips}


def test_the_official_work_is_the_published_roofline_of_an_h100() -> None:
    found = unit(nominal=True)
    blocks = "products, norms and GELU of the blocks"
    # the published table is a sum of entries rounded to 0.1 us, its images eight times one that is: 1 % covers that
    published = {blocks: 1350 + 1349, "attention": 206 + 180, "decoder and token head": 387, "tokenizer": 1583}
    assert {part: found[part] for part in published} == pytest.approx(published, rel=0.015)
    # that table leaves the stem out
    assert sum(found.values()) - found["stem"] == pytest.approx(5055, rel=0.01)


def test_exact_skipping_is_the_published_one_less_what_else_is_skipped() -> None:
    found, all_scores = unit(nominal=False), 52.1e9 * 0.126 / H100.sustained("bf16")
    # beyond the published 4566 us: the tokenizer's last layer on hidden cells only ...
    scores = 1e6 * all_scores * (16 * (0.75 - 0.374) + 8 * (1 - 0.498))
    # ... while the decoder doubles space for visible cells too (0.41 GF an image, 3.29 a clip, three times)
    doubling = 1e6 * 3 * (8 * 0.41e9 * (1 - 0.498) + 3.29e9 * (1 - 0.374)) / H100.sustained("bf16")
    assert sum(found.values()) - found["stem"] + scores - doubling == pytest.approx(4566, rel=0.01)
    assert sum(found.values()) == pytest.approx(4566, rel=0.02)


def test_the_roofline_of_attention_is_the_published_one() -> None:
    shape = roofline.VideoSwinConfig.preset("base")
    _, attention = roofline.block_parts(shape, STREAMS[1], 2)
    forward, backward = (sum(part[n].seconds(H100, "bf16") for part in attention) for n in (0, 1))
    # taken there at 1.755 GHz, here at the clock of the data sheet's peak
    assert 1e6 * forward == pytest.approx(82 * 1.755 / 1.83, rel=0.01)
    assert 1e6 * backward == pytest.approx(124, rel=0.01)
    assert sum(part[0].flops for part in attention) == pytest.approx(39.0e9, rel=0.01)


def test_recomputed_blocks_take_their_forward_time_again() -> None:
    config = recipe("clip")
    once, twice = (roofline.sample_seconds(config, STREAMS[1], H100, recompute=again) for again in (False, True))
    assert 1e6 * (sum(twice.values()) - sum(once.values())) == pytest.approx(465 + 82, rel=0.02)
    checkpointed = recipe("clip", "model.activation_checkpointing=true")
    assert roofline.sample_seconds(checkpointed, STREAMS[1], H100) == twice


@pytest.mark.parametrize("gpu", gpus.KNOWN, ids=lambda gpu: gpu.name)
def test_data_sheets_agree_with_themselves_and_with_the_logs_mfu(gpu: gpus.Gpu) -> None:
    each = gpu.peak("bf16") / (gpu.processors * gpu.gigahertz * 1e9)  # FLOP a clock and multiprocessor
    assert 2 ** round(math.log2(each)) == pytest.approx(each, rel=0.02)
    assert gpus.named(gpu.name.lower()) is gpu
    device = {"H100": "NVIDIA H100 80GB HBM3", "A100": "NVIDIA A100-SXM4-80GB"}.get(gpu.name, f"NVIDIA {gpu.device}")
    if peak := metrics.peak_flops(device):
        assert peak == pytest.approx(gpu.peak("bf16"), rel=2e-3)


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20"])
def test_a_gpu_that_is_like_a_known_one_is_not_it(device: str) -> None:
    assert gpus.of_device(device) is None


@pytest.mark.parametrize(
    "name", ["H1000", "", " ", "nvidia", "../../etc/passwd", "(", "A100" * 1000, "RTX 4090 Laptop"]
)
def test_an_unknown_gpu_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"known are: B200, H200.*RTX-5090"):
        gpus.named(name)


@pytest.mark.parametrize("name", ["joint", "image", "clip", "demo"])
@pytest.mark.parametrize("gpu", ["H100", "rtx 4090", "B200", "V100-16GB"])
def test_every_recipe_is_predicted_on_every_gpu(name: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MASKS", 20)
    for stage, precision, world_size in ((0, "fp32", 1), (1, "bf16", 2), (2, "fp16", 4), (3, "bf16", 4)):
        config = recipe(name, f"deepspeed.zero_optimization.stage={stage}", f"train.precision={precision}")
        sizes = {s: stream.batch // world_size for s, stream in config.streams.items()}
        if any(stream.batch % (stream.micro_batch * world_size) for stream in config.streams.values()):
            config = memory.with_micro_batches(config, sizes)
        streams, chosen = estimate.stream_shapes(config), gpus.named(gpu)
        lines = prediction.memory_lines(config, streams, world_size, chosen)
        lines += prediction.time_lines(config, streams, world_size, chosen)
        assert all(len(line) <= 120 for line in lines), max(lines, key=len)
        text = "\n".join(lines)
        assert "not measured" in text or "nothing here is measured" in text
        assert ("has no bf16" in text) == (gpu == "V100-16GB" and precision == "bf16")
        bound = roofline.bound(config, streams, chosen, world_size)
        assert 0 < bound.peak < bound.seconds


def test_processes_share_the_work() -> None:
    config = recipe("joint")
    one, four = (roofline.bound(config, STREAMS, H100, world_size) for world_size in (1, 4))
    assert one.seconds == pytest.approx(4 * four.seconds, rel=1e-9)
    assert one.peak == pytest.approx(4 * four.peak)
    # PERFORMANCE: 2.9 days for units of 2.75 TFLOP; here they are of 2.70, as the tokenizer's last layer skips too
    days = prediction.days(config, STREAMS, {"clips": 240_640, "images": 1}, 1, H100)
    assert "141,000 steps" in days and "2.85 days at the goal" in days


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("gpu", ["RTX-3090", "H200"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(gpu: str, world_size: int) -> None:
    config, place = recipe("joint"), Place.of(gpus.named(gpu))
    found = memory.largest_micro_batch(config, STREAMS, world_size, place)
    assert found and found["images"] == 8 * found["clips"] and 256 % (found["clips"] * world_size) == 0

    def needed(k: int) -> float:
        sizes = {"clips": k * found["clips"], "images": k * found["images"]}
        return memory.needed(memory.with_micro_batches(config, sizes), STREAMS, world_size, place)

    assert needed(1) <= memory.USABLE * place.memory
    assert memory.USABLE * place.memory < needed(2) or found["clips"] * world_size == 256  # all of it
    configuration.accumulation(memory.with_micro_batches(config, found), world_size)  # may be trained


def test_nothing_fits_into_nothing() -> None:
    tiny = Place("a toy", 2**20, True, True)
    assert memory.largest_micro_batch(recipe("joint"), STREAMS, 1, tiny) is None


@pytest.mark.parametrize("changes", [(), ("train.precision=fp32",), ("model.activation_checkpointing=true",)])
@pytest.mark.parametrize("world_size", [1, 4])
def test_three_settings_need_less_and_may_be_set(changes: tuple[str, ...], world_size: int) -> None:
    config, place = recipe("joint", *changes), Place.of(gpus.named("A10"))
    now = memory.needed(config, STREAMS, world_size, place)
    found = memory.remedies(config, STREAMS, world_size, place)
    assert len(found) == 3
    for setting in found:
        changed = recipe("joint", *changes, *setting.keys.split())
        configuration.accumulation(changed, world_size)
        shapes = [s._replace(side=changed.streams[s.name].view.size) for s in STREAMS]
        assert memory.needed(changed, shapes, world_size, place) == pytest.approx(setting.bytes)
        assert setting.bytes < now


# -- out of memory ----------------------------------------------------------------------------------------------------

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
LIBRARY = RuntimeError("CUDA error: out of memory")


def raises(error: BaseException) -> Any:
    def build(*_: object) -> None:
        raise error

    return build


@pytest.mark.parametrize("error", [CUDA, HOST, LIBRARY, MemoryError()], ids=["cuda", "cpu", "library", "python"])
def test_out_of_memory_ends_with_the_estimate_and_three_settings(
    error: BaseException, settings, here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bevt_fast.training.run.build", raises(error))
    done = here(settings())
    assert done.code == 6 and done.error.count("\n") == 1, done.error
    assert "a micro-batch of 2 images and 2 clips needs about" in done.error and "this machine has" in done.error
    assert done.error.count(" GiB)") == 3 and "--set images.micro_batch=1 --set clips.micro_batch=1" in done.error
    assert "model.activation_checkpointing=true" in done.error
    assert ("more lines" in done.error) is False


def test_another_error_is_not_out_of_memory(settings, here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bevt_fast.training.run.build", raises(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        here(settings())


def test_on_a_gpu_machine_the_hosts_memory_is_another_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = prediction.out_of_memory(recipe("joint"), HOST)
    assert said and "data.workers" in said and "micro_batch" not in said


def test_gpu_is_an_option_of_a_dry_run_only(settings, here) -> None:
    done = here(settings(), "--gpu", "H100")
    assert done.code == 2 and "--dry-run" in done.error
    done = here(settings(), "--dry-run", "--gpu", "H1000")
    assert done.code == 2 and "known are: B200" in done.error and done.error.count("\n") == 1
