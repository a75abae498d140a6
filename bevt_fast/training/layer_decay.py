"""Parameter groups of fine-tuning, as the official configurations really come out (SPEC 6.2).

mmcv lets the longest matching key decide both the rate and the decay of a parameter, and that makes three surprises,
kept here: bias tables run at the full rate without decay everywhere, norms of the encoder are decayed, and of K400 the
final norm alone is not.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from bevt_fast.finetune_config import FinetuneOptim
from bevt_fast.training.engine import UNDECAYED

TABLE = "relative_position_bias_table"


class Rule(NamedTuple):
    """What decides a parameter's group."""

    lr_scale: float
    decayed: bool


def layer(name: str, depths: Sequence[int]) -> int:
    """How many layers below the head a parameter of a Classifier lies: head 0, final norm and last block 1, ..., stem
    (blocks + 3 mergings + 1); 28 for depths 2, 2, 18, 2.
    """
    if not name.startswith("encoder."):
        return 0
    if name.startswith("encoder.norm."):
        return 1
    if name.startswith("encoder.stem."):
        return sum(depths) + len(depths)
    _, _, stage, kind, *rest = name.split(".")  # encoder.stage.2.blocks.17.norm1.weight, encoder.stage.2.merging...
    above = sum(depths[int(stage) + 1 :]) + len(depths) - 1 - int(stage)  # blocks and mergings
    return above if kind == "merging" else above + depths[int(stage)] - int(rest[0])


def rule(name: str, optim: FinetuneOptim, depths: Sequence[int]) -> Rule:
    """The rate and the decay of one parameter of a Classifier."""
    if TABLE in name:
        return Rule(1.0, False)
    if optim.layer_decay is not None:
        return Rule(optim.layer_decay ** layer(name, depths), not name.startswith("encoder.norm."))
    if optim.encoder_lr is not None:
        return Rule(optim.encoder_lr if name.startswith("encoder.") else 1.0, True)
    return Rule(1.0, not any(word in name for word in UNDECAYED))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], optim: FinetuneOptim, depths: Sequence[int]
) -> list[dict[str, Any]]:
    """AdamW's groups of the named parameters of a Classifier; `lr_scale` multiplies the rate of the step."""
    groups: dict[Rule, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        chosen = rule(name, optim, depths)
        if not optim.decay_biases and name.endswith("bias"):
            chosen = chosen._replace(decayed=False)
        groups.setdefault(chosen, []).append(parameter)
    return [
        {
            "params": members,
            "lr_scale": chosen.lr_scale,
            "weight_decay": optim.weight_decay if chosen.decayed else 0.0,
        }
        for chosen, members in groups.items()
    ]
