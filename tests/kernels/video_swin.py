"""Blocks that stand for Video Swin's and BEVT's: their names, attributes and meaning (SPEC 1.4, 1.5), our own writing.

Their source is no package; what `swap` relies on is what they promise: `forward_part1(x, mask_matrix, is_img)` of a
SwinTransformerBlock3D, the layer that makes one mask for all its blocks, and the `[:N, :N]` corner of the bias index.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def partition(x, window):
    """(B, *grid, C) -> (B*nW, N, C)."""
    grid, width = x.shape[1:-1], x.shape[-1]
    for axis, size in enumerate(window):
        x = x.unflatten(1 + 2 * axis, (grid[axis] // size, size))
    axes = range(1, 2 * len(window), 2)
    x = x.permute(0, *axes, *(axis + 1 for axis in axes), x.ndim - 1)
    return x.reshape(-1, torch.Size(window).numel(), width)


def reverse(windows, window, batch, grid):
    counts = [length // size for length, size in zip(grid, window)]
    x = windows.view(batch, *counts, *window, -1)
    order = [axis for pair in zip(range(1, len(grid) + 1), range(len(grid) + 1, 2 * len(grid) + 1)) for axis in pair]
    return x.permute(0, *order, x.ndim - 1).reshape(batch, *grid, -1)


def mask_of(grid, window, shift):
    """0 or -100 for every pair of tokens of every window: (nW, N, N)."""
    label = torch.zeros(grid)
    for axis, (size, step) in enumerate(zip(window, shift)):
        place = torch.arange(grid[axis])
        along = (place >= grid[axis] - size).float() + (place >= grid[axis] - step).float() if step else 0 * place
        label += along.view([-1 if a == axis else 1 for a in range(len(grid))]) * 10**axis
    label = partition(label[None, ..., None], window)[..., 0]
    return torch.where(label[:, :, None] == label[:, None, :], 0.0, -100.0)


def clipped(grid, window, shift):
    pairs = [(length, 0) if length <= size else (size, step) for length, size, step in zip(grid, window, shift)]
    return tuple(size for size, _ in pairs), tuple(step for _, step in pairs)


class WindowAttention3D(nn.Module):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        spans = [2 * size - 1 for size in window_size]
        self.relative_position_bias_table = nn.Parameter(0.3 * torch.randn(torch.Size(spans).numel(), num_heads))
        place = torch.cartesian_prod(*(torch.arange(size) for size in window_size))
        offset = place[:, None] - place[None] + torch.tensor(window_size) - 1
        index = (offset[..., 0] * spans[1] + offset[..., 1]) * spans[2] + offset[..., 2]
        self.register_buffer("relative_position_index", index)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x, mask=None):
        windows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scale * q @ k.mT
        rows = self.get_buffer("relative_position_index")[:tokens, :tokens]
        scores = scores + self.relative_position_bias_table[rows].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = self.attn_drop(self.softmax(scores))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(windows, tokens, width)))


class SwinTransformerBlock3D(nn.Module):
    def __init__(self, dim, num_heads, window_size, shift_size, use_checkpoint=False, **attention):
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint = window_size, shift_size, use_checkpoint
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention3D(dim, window_size, num_heads, **attention)
        self.drop_path = nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward_part1(self, x, mask_matrix, is_img=False):
        batch, *grid, _ = x.shape
        x = self.norm1(x)
        if is_img:  # neither padded nor clamped, and masked whatever the shift
            window, shift, mask = self.window_size[1:2] * 2, self.shift_size[1:], mask_matrix
        else:
            window, shift = clipped(grid, self.window_size, self.shift_size)
            mask = mask_matrix if any(shift) else None
            pad = [more for length, size in zip(grid[::-1], window[::-1]) for more in (0, -length % size)]
            x = F.pad(x, (0, 0, *pad))
        padded, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
        x = x.roll([-step for step in shift], axes)
        x = reverse(self.attn(partition(x, window), mask), window, batch, padded).roll(shift, axes)
        return x[(slice(None), *map(slice, grid))].contiguous()

    def forward(self, x, mask_matrix, is_img=False):
        if self.use_checkpoint:
            part = checkpoint(self.forward_part1, x, mask_matrix, is_img, use_reentrant=False)
        else:
            part = self.forward_part1(x, mask_matrix, is_img=is_img)
        x = x + self.drop_path(part)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BasicLayer(nn.Module):
    def __init__(self, dim, num_heads, window_size, depth=2, **block):
        super().__init__()
        self.window_size = window_size
        self.shift_size = tuple(size // 2 for size in window_size)
        shifts = [self.shift_size if number % 2 else (0, 0, 0) for number in range(depth)]
        blocks = [SwinTransformerBlock3D(dim, num_heads, window_size, shift, **block) for shift in shifts]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, is_img=False):
        grid = x.shape[1:-1]
        if is_img:
            mask = mask_of(tuple(grid), self.window_size[1:], self.shift_size[1:])
        else:
            window, shift = clipped(grid, self.window_size, self.shift_size)
            mask = mask_of(tuple(length + -length % size for length, size in zip(grid, window)), window, shift)
        for block in self.blocks:
            x = block(x, mask, is_img=is_img)
        return x
