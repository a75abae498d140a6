"""The one door to DeepSpeed: the optimizer and its groups, the engine, and the engine's state by parameter name.

State goes in and out by parameter name, in float32, whole: a checkpoint then depends neither on the number of processes
nor on the ZeRO stage, and holds no pickle.
"""

import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bevt_fast.config import AnyConfig, Optim, deepspeed_config
from bevt_fast.errors import ConfigError, MachineError
from bevt_fast.training.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "weight_avg"  # kept beside AdamW's moments, so that it is partitioned and saved as they are
# SPEC 5.2: names that are not decayed; all other biases and the mask token are
UNDECAYED = ("relative_position_bias_table", "absolute_pos_embed", "norm")
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips, and that leaves weights and moments untouched when the gradient norm is not finite.

    DeepSpeed's own wrappers (every ZeRO stage, bf16, fp16) do both; in float32 without ZeRO there is no wrapper, and
    its clipping would turn one NaN into NaN weights. `overflow` and `_global_grad_norm` are the names DeepSpeed reads.
    """

    def __init__(self, groups: list[dict[str, Any]], max_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.max_norm = max_norm or math.inf
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        return None if self.overflow else super().step(closure)


def parameter_groups(module: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Two groups, decayed and not (SPEC 5.2): a name with one of `UNDECAYED` in it is not decayed; biases as `optim`
    says.
    """
    groups: dict[float, list[nn.Parameter]] = {optim.weight_decay: [], 0.0: []}
    for name, parameter in module.named_parameters():
        undecayed = any(word in name for word in UNDECAYED) or (not optim.decay_biases and name.endswith("bias"))
        groups[0.0 if undecayed else optim.weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]


class Engine:
    """DeepSpeed's engine around the objective, and the few things the loop and the checkpoints ask of it."""

    def __init__(
        self,
        objective: nn.Module,
        config: AnyConfig,
        world: World,
        groups: list[dict[str, Any]] | None = None,
        has_average: bool = False,
    ) -> None:
        """`groups` None: those of pretraining; `lr_scale` of a group multiplies its rate. `has_average`: keep a moving
        average of the weights, which `average` moves.
        """
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning that there is no GPU
        import deepspeed

        _quiet_deepspeed(deepspeed)
        section = deepspeed_config(config, world.size)
        section.setdefault("zero_optimization", {}).setdefault("stage", 1)
        self.world = world
        self.stage = int(section["zero_optimization"]["stage"])
        self.dtype = DTYPES[config.train.precision]
        self._alone = self.stage == 0 and self.dtype == torch.float32
        if self._alone:
            section["gradient_clipping"] = 0.0
        if config.train.precision == "bf16":
            section["bf16"].setdefault("check_grad_overflow", True)  # off by default in some releases: NaN moments
        section.setdefault("steps_per_print", 2**62)
        options: dict[str, Any] = {
            "lr": 0.0,  # DeepSpeed may take a trial step to allocate its state; at rate 0 that changes no weight
            "betas": config.optim.betas,
            "eps": config.optim.eps,
            "fused": True,
        }
        groups = parameter_groups(objective, config.optim) if groups is None else groups
        optimizer = (
            ClippedAdamW(groups, config.optim.grad_clip, **options)
            if self._alone
            else torch.optim.AdamW(groups, **options)
        )
        try:
            made: Any = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=section, dist_init_required=True
            )
        except ValidationError as error:  # a value of the `deepspeed` section
            faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
            raise ConfigError(f"deepspeed: {error.title} refuses {'; '.join(faults)}") from error
        except (AssertionError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MachineError(f"DeepSpeed refuses the configuration: {reason}") from error
        self.engine, self.optimizer = made[:2]
        if self._alone and world.size == 1:
            self.engine.enable_backward_allreduce = False  # it would copy all gradients to and fro, and sum one
        self.inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        beside = getattr(config.train, "overlap_tokenizer", False) and world.device.type == "cuda"
        self.side = torch.cuda.Stream(world.device) if beside else None
        self.moment_names = (*MOMENTS, AVERAGE) if has_average else MOMENTS
        self._allocate_moments()
        self._set_adam_step(0)

    # -- the step ----------------------------------------------------------------------------------------------------

    def __call__(self, *arguments: Any) -> Any:
        return self.engine(*arguments)

    @property
    def objective(self) -> nn.Module:
        return self.engine.module

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        """Counts a micro-batch; DeepSpeed changes the weights on the last one of a step, and only then."""
        self.engine.step()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Move the average of the weights towards them by `share` of the way."""
        for tensor in self._flat_parameters():
            self.inner.state[tensor][AVERAGE].lerp_(tensor.detach(), share)

    @property
    def step_applied(self) -> bool:
        """Whether the step just taken changed the weights: not where the gradient norm was not finite. The same
        everywhere.
        """
        return not getattr(self.optimizer, "overflow", False)

    @property
    def scaler_is_searching(self) -> bool:
        """Whether a skipped step is the fp16 loss scaler at work, which still has room to shrink its scale."""
        return self.dtype == torch.float16 and float(self._scaler().cur_scale) > 1.0

    def grad_norm(self) -> float:
        """L2 norm of all gradients of the step just taken, before clipping; NaN where the step was skipped."""
        norm = self.engine.get_global_grad_norm()
        if norm is None or not self.step_applied:
            return math.nan
        return float(norm)

    # -- the state, by parameter name ----------------------------------------------------------------------------------

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The model's own names, so that `model.safetensors` loads into the model without the objective around it."""
        return list(self.objective.model.named_parameters())  # pyright: ignore

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the model, whole, float32, on the CPU. Collective: all processes must run through it."""
        return ((name, self._read(name, parameter, None)) for name, parameter in self._named())

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """Every moment of AdamW, named `parameter.exp_avg`, whole, float32, on the CPU. Collective."""
        for name, parameter in self._named():
            for moment in self.moment_names:
                yield f"{name}.{moment}", self._read(name, parameter, moment)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over the state that `weights` and `moments` gave.

        The module itself must have been loaded before the engine was made (it is partitioned now); this sets the
        float32 copies that a low-precision module is rounded from.
        """
        for name, parameter in self._named():
            self._write(name, parameter, weights[name], None)
            for moment in self.moment_names:
                self._write(name, parameter, moments[f"{name}.{moment}"], moment)

    def scalars(self) -> dict[str, Any]:
        """The counters of AdamW and of the fp16 loss scaler."""
        steps = [float(state["step"]) for state in self.inner.state.values() if "step" in state]
        scaler = self._scaler()
        return {
            "adam_step": max(steps, default=0.0),
            "loss_scaler": {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)},
        }

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self._set_adam_step(scalars["adam_step"])
        scaler = self._scaler()
        for key, value in scalars["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def _scaler(self) -> Any:
        return getattr(self.optimizer, "loss_scaler", None) or getattr(self.optimizer, "loss_scale_config", None)

    def _set_adam_step(self, step: float) -> None:
        for state in self.inner.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _flat_parameters(self) -> list[Tensor]:
        """The tensors AdamW really works on: whole parameters, or this process's flat float32 pieces of them."""
        for owner in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self.optimizer, owner):
                return list(getattr(self.optimizer, owner))
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def _allocate_moments(self) -> None:
        """AdamW allocates its moments in its first step; a checkpoint may be read before that. It is too late for ZeRO
        1 and 2 as well, which step one group after the other and look for the moments of all groups after the first."""
        for tensor in self._flat_parameters():
            state = self.inner.state[tensor]
            if "exp_avg" not in state:
                counter_device = tensor.device if self.inner.defaults.get("fused") else "cpu"
                state["step"] = torch.tensor(0.0, device=counter_device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
            if AVERAGE in self.moment_names:
                state[AVERAGE] = tensor.detach().clone()
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link:
            link()

    @functools.cached_property
    def _masters(self) -> dict[int, Tensor]:
        """Without ZeRO: from a module's parameter (by id) to the float32 tensor AdamW updates."""
        pairs = zip(getattr(self.optimizer, "fp16_groups", []), getattr(self.optimizer, "fp32_groups", []))
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs)}
        return masters or {id(parameter): parameter for parameter in self.objective.parameters()}

    def _read(self, name: str, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            master = self._masters[id(parameter)]
            value = master if moment is None else self.inner.state[master][moment]
        elif moment is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        if value is None:
            raise MachineError(f"this version of DeepSpeed does not show the float32 state of {name}")
        return value.detach().to("cpu", torch.float32, copy=True)

    def _write(self, name: str, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        from deepspeed import utils

        value = value.to(parameter.device)
        if self.stage == 0:
            master = self._masters[id(parameter)]
            target = master if moment is None else self.inner.state[master][moment]
            with torch.no_grad():
                target.copy_(value)
        elif self.stage == 3:
            size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            # the last process's piece is padded with zeros, which the whole value does not have
            whole = torch.nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            piece = whole[size * self.world.rank : size * (self.world.rank + 1)]
            if moment is None:
                utils.safe_set_local_fp32_param(parameter, piece)
            else:
                utils.safe_set_local_optimizer_state(parameter, piece, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)


def _quiet_deepspeed(deepspeed: Any) -> None:
    """Keep DeepSpeed to warnings, and off the compiler: its shared-memory all-reduce for CPUs would be built for half a
    minute on every new machine, needs g++, and serves inference; gloo does the work."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is about to change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
