"""--dry-run of fine-tuning: what would learn, at which rates, from which start and files; no DeepSpeed, no step."""

from collections.abc import Iterator

import torch

from bevt_fast.config import accumulation
from bevt_fast.data.labelled import LabelledLoader
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.probes import Probe
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import distributed, finetune_memory, layer_decay, prediction
from bevt_fast.training.base_run import speak
from bevt_fast.training.finetune_parts import check_parts, open_classifier, open_heldout, open_labelled


def describe(config: FinetuneConfig, gpu: str | None = None) -> Iterator[str]:
    """Parameters, groups, memory on a GPU by its name, files and the first micro-batch, a paragraph at a time.

    Raises what the run itself would, and ConfigError for an unknown GPU.
    """
    speak(is_main=True)
    prediction.chosen_gpu(gpu)
    world_size = distributed.world_size_from_environment()
    check_parts(config)
    with torch.device("meta"):
        yield groups(config, Classifier.of(config))
    if config.train.mode != "knn":
        yield f"{accumulation(config, world_size)} micro-batches of {config.data.micro_batch} clips a step and process"
        yield finetune_memory.describe(config, world_size, gpu)
    source = open_labelled(config)
    heldout = open_heldout(config, source)
    yield f"data.source: {len(source):,} clips of {source.name} under {source.root}"
    if heldout is not None:
        yield f"data.heldout: {len(heldout):,} clips of {heldout.name} under {heldout.root}"
    open_classifier(config)  # says what became of every key of the start
    batches = LabelledLoader(config, source, world_size=world_size)
    try:
        batch = next(batches)
        bad = [f"bad file: {record['path']}: {record['kind']}: {record['reason']}" for record in batches.bad_files]
    finally:
        batches.close()
    shapes = [f"{name}: {tuple(value.shape)} {str(value.dtype)[6:]}" for name, value in batch._asdict().items()]
    yield "\n".join(["first micro-batch:", *shapes, *bad])


def groups(config: FinetuneConfig, classifier: Classifier) -> str:
    """How many parameters learn at which rate and decay."""
    if config.train.mode == "knn":
        return "nothing learns: the labels of the nearest training clips decide"
    model = classifier if config.train.mode == "finetune" else Probe(classifier)
    found = layer_decay.parameter_groups(
        model.named_parameters(), config.optim, VideoSwinConfig.of(config.model).depths
    )
    lines = [f"{sum(p.numel() for p in model.parameters()):,} parameters learn, in groups"]
    for group in sorted(found, key=lambda group: -group["lr_scale"]):
        count = sum(parameter.numel() for parameter in group["params"])
        rate = config.optim.lr * group["lr_scale"]
        lines.append(f"  lr {rate:.3e}  weight decay {group['weight_decay']:g}  {count:>12,}")
    return "\n".join(lines)
