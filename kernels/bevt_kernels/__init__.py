"""The kernels wing: functions on tensors, each with its plain PyTorch reference."""
