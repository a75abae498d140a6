"""The moving average of the weights that SSv2 is scored with (SPEC 6.3)."""

MOMENTUM, WARMUP = 0.0002, 100  # mmcv's EMAHook as it comes


def share(micro_batch: int) -> float:
    """How far the average moves towards the weights after micro-batch `micro_batch` of the run (counted from 0).

    The warm-up never bites: its first value, 0.01, is above the momentum already (SPEC 6.3).
    """
    return min(MOMENTUM, (1 + micro_batch) / (WARMUP + micro_batch))
