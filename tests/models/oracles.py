"""Other people's Swin transformers, and the names that carry our weights into them."""

import pytest
import torch

WITHIN_A_BLOCK = ((".mlp.0.", ".mlp.fc1."), (".mlp.3.", ".mlp.fc2."))


def torchvision_models():
    """torchvision.models, whose Swin is pure Python; its compiled part may fail to load beside CPU torch."""
    import torch.library

    register = torch.library.register_fake

    def without_torchvision_ops(op, *args, **options):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **options)

    torch.library.register_fake = without_torchvision_ops
    try:
        return pytest.importorskip("torchvision.models", reason="torchvision is an oracle of the [test] extra")
    finally:
        torch.library.register_fake = register


def official_names(state_dict, clips=True) -> dict[str, torch.Tensor]:
    """torchvision's swin names as the official ones: stages and mergings alternate in `features`."""
    renamed = {}
    for key, value in state_dict.items():
        if clips or not key.startswith("features"):
            first = 0
        else:
            first = 1
            key = key.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        if key.startswith("features."):
            _, number, *rest = key.split(".")
            stage, merging = divmod(int(number) - first, 2)
            key = ".".join([f"layers.{stage}", "downsample" if merging else "blocks", *rest])
        for theirs, official in WITHIN_A_BLOCK:
            key = key.replace(theirs, official)
        renamed[key] = value
    return renamed


def randomise(module):
    """Every parameter away from its start, so that no norm, bias or table can be left out unnoticed."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim < 2 or "relative_position_bias_table" in name:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return module.eval()


def torchvision_features(model, pixels, clips=True):
    """The outputs of the four stages before merging, and after the final norm."""
    outputs = []
    numbers = (0, 2, 4, 6) if clips else (1, 3, 5, 7)
    hooks = [model.features[n].register_forward_hook(lambda m, i, out: outputs.append(out)) for n in numbers]
    model(pixels)
    for hook in hooks:
        hook.remove()
    return [*outputs, model.norm(outputs[-1])]
