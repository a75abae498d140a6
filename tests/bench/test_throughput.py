"""The step benchmark: the official step beside our model (written apart: that is the check), its gate, its files."""

import csv
import sys
from typing import Any

import pytest
import torch

from bench import throughput, throughput_memory, throughput_parts, throughput_plot
from bench import throughput_contenders as field_of
from bench.official_step import OfficialModel
from bench.official_tokenizer import HiddenCells, OfficialTokenizer
from bench.throughput_contenders import BLOCKS, COMPILED, HIDDEN, KINDER, LADDER, OFFICIAL, OURS
from bench.throughput_state import State
from bevt_fast.data.batch import Clips, Images, JointBatch
from bevt_fast.errors import MachineError
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.tokenizers.dalle import Dalle
from bevt_fast.train import hidden_targets

QUICK = ["--quick", "--device", "cpu", "--engine", "plain", "--units", "1", "--rounds", "1"]
BARE = [*QUICK, "--no-compile", "--detail", "none"]


def batch(side=64, frames=4, clips=2, images=3) -> Any:
    draw = torch.Generator().manual_seed(0)
    grid = side // 16

    def token_pixels(*shape):
        return torch.rand(*shape, 3, side // 2, side // 2, generator=draw) * 0.8 + 0.1

    image_mask = torch.rand(images, grid, grid, generator=draw) < 0.5
    clip_mask = torch.rand(clips, frames // 2, grid, grid, generator=draw) < 0.4
    clip_mask[0, 0] = False  # frames that hide nothing
    return JointBatch(
        Images(torch.randn(images, 3, side, side, generator=draw), token_pixels(images), image_mask),
        Clips(torch.randn(clips, 3, frames, side, side, generator=draw), token_pixels(clips, frames), clip_mask),
    )


def pair(window=(8, 2, 2), images: Any = "t1", index: Any = "true", drop_path=0.4):
    """Our objective and the official step over the same weights, none of them at its start."""
    shape = VideoSwinConfig(embed_dim=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=window, drop_path=drop_path)
    torch.manual_seed(0)
    objective = JointObjective(Bevt(shape, 64, image_attention=images, bias_index=index), 0.7, 1.3).train()
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = dict(objective.model.named_parameters())
    return objective, OfficialModel(weights, shape, images, index, (0.7, 1.3))


@pytest.mark.parametrize(
    ("window", "side", "images", "index"),
    [
        ((8, 2, 2), 64, "t1", "true"),  # every stage but the last is shifted
        ((8, 2, 2), 64, "official", "official"),
        ((2, 3, 3), 96, "t1", "official"),  # the last stages clip the window
        ((1, 3, 3), 64, "t1", "true"),  # shifted in time nowhere, padded in space
        ((2, 4, 4), 64, "t1", "true"),
    ],
)
def test_the_official_step_and_ours_agree_in_losses_and_every_gradient(window, side, images, index):
    objective, official = pair(window, images, index)
    given, tokenizer = batch(side, frames=6), Dalle(8, 64)
    found = {}
    for name in ("ours", "official"):
        torch.manual_seed(1)
        if name == "ours":
            losses = objective(given, hidden_targets(tokenizer, given))
        else:
            losses = official.step_losses(given, OfficialTokenizer(tokenizer.state_dict())(given))
        objective.zero_grad()
        losses.total.backward()
        gradients = {key: p.grad.clone() for key, p in objective.named_parameters() if p.grad is not None}
        found[name] = ([value.detach() for value in losses], gradients)
    torch.testing.assert_close(found["official"][0], found["ours"][0], rtol=1e-5, atol=0)
    assert found["official"][1].keys() == found["ours"][1].keys() == dict(objective.named_parameters()).keys()
    for name, gradient in found["official"][1].items():
        error = (gradient - found["ours"][1][name]).abs().max() / gradient.abs().max().clamp(min=1e-20)
        assert error < 1e-4, f"{name}: {error:.1e}"  # float32 sums in another order


def test_the_same_samples_are_dropped_whoever_draws():
    objective, official = pair(drop_path=0.9)
    given = batch()
    ids = OfficialTokenizer(Dalle(8, 64).state_dict())(given)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        one = objective(given, ids).total
        after = torch.rand(1)
        torch.manual_seed(seed)
        two = official.step_losses(given, ids).total
        assert torch.equal(torch.rand(1), after)  # as many draws
        torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
        losses.append(one.item())
    assert losses[0] == losses[1] != losses[2]


def test_every_tokenizer_names_the_hidden_cells_alike():
    given, tokenizer = batch(), Dalle(8, 64)
    weights = tokenizer.state_dict()
    ours: Any = hidden_targets(tokenizer, given)
    clip_mask = given.clips.mask.repeat_interleave(2, dim=1)
    for other in (OfficialTokenizer(weights), OfficialTokenizer(weights, 4), HiddenCells(weights, 3)):
        found: Any = other(given)
        assert torch.equal(found.images[given.images.mask], ours.images[given.images.mask])
        assert torch.equal(found.clips[clip_mask], ours.clips[clip_mask])
    assert torch.equal(found.clips, ours.clips) and torch.equal(found.images, ours.images)  # 0 where nothing is hidden


class BareEngine:
    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def __call__(self, *given: Any) -> Any:
        return self.objective(*given)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None: ...


@pytest.mark.parametrize("in_turn", [False, True])
def test_what_is_differentiated_is_the_backward_pass(in_turn):
    objective, _ = pair()
    objective.in_turn = in_turn
    given, tokenizer, seen = batch(), Dalle(8, 64), []
    owner = field_of.Joint(BareEngine(objective), tokenizer, objective)
    contender: Any = field_of.Contender(OURS, None, None, None, owner=owner)  # pyright: ignore[reportArgumentType]
    marks = throughput_parts.Marks(torch.device("cpu"))
    objective.model.head.weight.register_hook(lambda gradient: seen.append(marks.open[-1]))
    with throughput_parts.marked(contender, marks):
        losses = owner.engine(given, hidden_targets(owner.tokenizer, given))
        owner.engine.backward(losses.total)
    assert seen == [throughput_parts.BACKWARD] * (2 if in_turn else 1)
    assert set(throughput_parts.PARTS) - {p for p, ms in marks.sums().items() if ms} == {throughput_parts.OPTIMIZER}


def test_a_rehearsal_writes_the_files_and_a_contender_that_cannot_run_is_a_row(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        throughput_memory, "ask", lambda command: asked.append(command) or {"peak_mib": 300.0, "before_mib": 200.0}
    )
    assert throughput.main([*QUICK, "--no-compile", "--detail", "all", "--profile", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert [command[-2:] for command in asked] == [["--only", name] for name in LADDER]
    with (tmp_path / "throughput.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(field_of.NAMES)
    assert (rows[COMPILED]["status"], rows[COMPILED]["reason"]) == ("cannot run", "left out by --no-compile")
    for name in LADDER:
        row = rows[name]
        assert row["status"] == "ok" and float(row["median_ms"]) > 0 and float(row["times_official"]) > 0, name
        assert float(row["loss_difference"]) <= 1e-5 and float(row["token_agreement"]) == 1
        assert float(row["peak_mib"]) > float(row["before_mib"]) > 0
        assert "tokenizer" in row["parts"] and "backward" in row["parts"]
    assert rows[OURS]["mfu"] == ""  # no peak is known for a CPU
    report = (tmp_path / "throughput.md").read_text()
    assert "cannot run: left out by --no-compile" in report and "V100" not in report
    assert (tmp_path / "throughput.png").stat().st_size > 1000 and (tmp_path / "throughput_trace.json").exists()
    assert said[-1].startswith("ours: ") and "x the official step" in said[-1] and "peak memory" in said[-1]


@pytest.mark.parametrize("wrong", ["loss", "token"])
def test_no_speed_is_printed_for_a_contender_that_takes_another_step(tmp_path, capsys, monkeypatch, wrong):
    build = throughput.build

    def spoiled(name, *arguments):
        contender = build(name, *arguments)
        if name == KINDER:
            step: Any = contender.step
            seen: Any = contender.seen
            if wrong == "token":
                contender.seen = lambda: seen()._replace(images=seen().images + 1)
            else:
                contender.step = lambda given: type(losses := step(given))(*(value * (1 + 3e-5) for value in losses))
        return contender

    monkeypatch.setattr(throughput, "build", spoiled)
    assert throughput.main([*BARE, "--contenders", "main", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "no speed is printed" in said.splitlines()[-1] and KINDER in said.splitlines()[-1]
    assert "ms a unit" not in said and not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_a_row_with_its_reason(tmp_path, capsys, monkeypatch):
    def no_compiler(function, **options):
        def fail(*arguments):
            raise RuntimeError("no C++ compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    chosen = [*QUICK, "--detail", "none", "--contenders", "main", "--out", str(tmp_path)]
    assert throughput.main(chosen) == 0
    assert f"{COMPILED} cannot run: RuntimeError: no C++ compiler here" in capsys.readouterr().out
    with (tmp_path / "throughput.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert rows[COMPILED]["median_ms"] == "" and rows[BLOCKS]["reason"] == "left out by --contenders main"


def test_a_step_that_does_not_fit_ends_with_three_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput_memory, "free", lambda device: 1e6)
    assert throughput.main([*BARE, "--out", str(tmp_path)]) == MachineError.exit_code == 6
    said = capsys.readouterr().err
    assert said.startswith("error: a step of ") and said.count("\n") == 1
    for setting in ("micro_batch=", "activation_checkpointing=true", "--units 1"):
        assert setting in said


def test_the_rest_goes_on_where_only_the_official_step_does_not_fit(tmp_path, capsys, monkeypatch):
    build = throughput.build

    def full(name, *arguments):
        contender = build(name, *arguments)
        if name == OFFICIAL:

            def step(given):
                raise torch.OutOfMemoryError("CUDA out of memory")

            contender.step = step
        return contender

    monkeypatch.setattr(throughput, "build", full)
    assert throughput.main([*BARE, "--contenders", "main", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{OFFICIAL} cannot run: OutOfMemoryError" in said and "the official step not timed" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--size", "huge"], 2, "invalid choice: 'huge'"),
        (["--speed"], 2, "unrecognized arguments: --speed"),
        (["--units", "0"], 2, "'0' is not a whole number above 0"),
        (["--rounds", "-3"], 2, "not a whole number above 0"),
        (["--steps", "1"], 2, "at least 2"),
        (["--config", "nowhere.json"], 2, "cannot read the configuration nowhere.json"),
        (["--set", "model.drop_path=0.5"], 2, "name one with --config"),
        (["--tokenizer", "nowhere.safetensors"], 3, "nowhere.safetensors"),
        (["--out", "/dev/null/results"], 2, "/dev/null/results"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, arguments, code, words):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(throughput.main(["--out", str(tmp_path), "--quick", "--device", "cpu", *arguments]))
    said = capsys.readouterr().err
    assert ended.value.code == code and words in said and "Traceback" not in said


def test_a_configuration_of_the_repository_decides_sizes_precision_and_tokenizer(tmp_path, capsys):
    chosen = ["--config", "configs/demo.json", "--device", "cpu", "--engine", "plain", "--contenders", "main"]
    chosen += ["--no-compile", "--units", "1", "--detail", "none", "--rounds", "1", "--out", str(tmp_path)]
    chosen += ["--set", "tokenizer.options.weights=nowhere/centroids.safetensors"]  # the demo leaves some
    assert throughput.main(chosen) == 0
    said = capsys.readouterr().out
    assert "8 images of 1 x 96^2 and 1 clips of 8 x 96^2, Swin width 24, fp32" in said
    assert "patch_kmeans with random centroids (nowhere/centroids.safetensors is not there)" in said
    work = throughput.prepare(throughput.options(chosen))
    with pytest.raises(field_of.CannotRun, match="the layers of patch_kmeans are not known"):
        field_of.build(HIDDEN, work, State(work), "plain", None)


def test_low_precision_is_held_to_what_rounding_does_to_the_official_step(tmp_path, capsys):
    chosen = [*BARE, "--contenders", "main", "--precision", "bf16", "--out", str(tmp_path)]
    assert throughput.main(chosen) == 0
    assert "twice what bfloat16 does to the official step's losses" in capsys.readouterr().out


def test_a_figure_of_nothing_says_so(tmp_path):
    source = tmp_path / "throughput.csv"
    source.write_text("contender,median_ms\nours,\n")
    assert "has no times" in (throughput_plot.ladder(source, tmp_path / "x.png") or "")


def test_a_process_of_its_own_tells_its_peak(tmp_path):
    command = [sys.executable, throughput.__file__, *BARE, "--out", str(tmp_path), "--only", OURS]
    found = throughput_memory.ask(command)
    assert found["peak_mib"] > found["before_mib"] > 50


def test_a_memory_child_that_dies_is_a_reason():
    assert "exit code" in throughput_memory.ask(["false"])["reason"]
    assert throughput_memory.is_out_of_memory(RuntimeError("can't allocate memory: you tried"))
    assert not throughput_memory.is_out_of_memory(RuntimeError("shape"))
