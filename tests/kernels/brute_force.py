"""Window attention written from the specification alone: every pair of tokens is looked at, one after the other."""

import torch
import torch.nn.functional as F


def pairs(grid, window, shift, mask_shift, bias_index="true"):
    """For every (query, key) of a whole grid: the row of the bias table, and what is added to the logit (SPEC 1.4)."""
    t, h, w = grid
    used = [min(size, length) for size, length in zip(window, grid)]
    tokens = [(i, j, k) for i in range(t) for j in range(h) for k in range(w)]
    rows = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
    added = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64)
    places = [[(x - s) % length for x, s, length in zip(token, shift, grid)] for token in tokens]
    for a, here in enumerate(places):
        for b, there in enumerate(places):
            if [x // u for x, u in zip(here, used)] != [x // u for x, u in zip(there, used)]:
                continue
            inside_a, inside_b = ([x % u for x, u in zip(place, used)] for place in (here, there))
            rows[a, b] = _row(inside_a, inside_b, window, used, bias_index)
            regions = [_region(place, grid, used, mask_shift) for place in (here, there)]
            added[a, b] = 0.0 if regions[0] == regions[1] else -100.0
    return rows, added


def _row(a, b, window, used, bias_index):
    if bias_index == "official":  # the same place in the list of tokens, but of the nominal window
        a, b = (_unravel((x[0] * used[1] + x[1]) * used[2] + x[2], window) for x in (a, b))
    da, ha, wa = (x - y + size - 1 for x, y, size in zip(a, b, window))
    return (da * (2 * window[1] - 1) + ha) * (2 * window[2] - 1) + wa


def _unravel(place, window):
    return place // (window[1] * window[2]), place // window[2] % window[1], place % window[2]


def _region(place, grid, used, shift):
    region = []
    for x, length, size, step in zip(place, grid, used, shift):
        region.append(0 if not step or x < length - size else 1 if x < length - step else 2)
    return region


def attention(qkv, table, window, shift=(0, 0, 0), mask_shift=None, bias_index="true"):
    """(B, t, h, w, 3, nH, d) -> (B, t, h, w, nH, d): one attention over the grid, other windows at -inf."""
    grid, heads = tuple(qkv.shape[1:4]), qkv.shape[5]
    rows, added = pairs(grid, window, shift, shift if mask_shift is None else mask_shift, bias_index)
    bias = table[rows].permute(2, 0, 1) + added.to(table)
    q, k, v = qkv.flatten(1, 3).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(len(q), heads, -1, -1))
    return out.transpose(1, 2).unflatten(1, grid)
