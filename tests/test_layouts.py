# SPDX-License-Identifier: Apache-2.0
"""Block-sparse patterns: small ones written out, and what must hold for all."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_models import _layout_ops, layouts
from flash_models._block_layout import work_items
from flash_models.layouts import from_block_mask, from_config, grid_2d, local, local_global, tile_order


def drawing(layout):
    """Rows of '#' and '.', one per block of queries of head 0."""
    return ["".join("#" if listed else "." for listed in row) for row in layout.to_dense()[0].tolist()]


def test_dense(device):
    layout = layouts.dense(129, 64, block_size=64, device=device)
    assert drawing(layout) == ["#", "#", "#"]
    assert layout.row_start.tolist() == [[0, 1, 2, 3]] and layout.row_index.tolist() == [0, 0, 0]
    assert layout.col_start.tolist() == [[0, 3]] and layout.col_index.tolist() == [0, 1, 2]
    assert layout.density == 1.0 and layout.num_heads == 1 and layout.device.type == device.type
    assert (layout.block_size, layout.seqlen_q, layout.seqlen_k) == (64, 129, 64)


def test_local(device):
    layout = local(64 * 5, 64, block_size=64, device=device)
    assert drawing(layout) == ["##...", "###..", ".###.", "..###", "...##"]
    assert layout.row_start.tolist() == [[0, 2, 5, 8, 11, 13]]
    assert layout.row_index[:13].tolist() == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4]
    assert layout.density == 13 / 25
    assert layout.row_start.dtype == layout.row_index.dtype == torch.int32


@pytest.mark.parametrize("window, radius", [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_local_holds_every_pair_within_the_window_and_no_useless_block(device, window, radius):
    seqlen = 64 * 6 - 9
    layout = local(seqlen, window, block_size=64, device=device)
    token = torch.arange(seqlen, device=device)
    within = (token[:, None] - token).abs() <= window
    assert layout.token_mask()[0][within].all()
    block = torch.arange(6, device=device)
    assert torch.equal(layout.to_dense()[0], (block[:, None] - block).abs() <= radius)


def test_local_global(device):
    layout = local_global(64 * 6, 64, 1, block_size=64, device=device)
    assert drawing(layout) == ["######", "###...", "####..", "#.###.", "#..###", "#...##"]
    assert drawing(local_global(64 * 4, 0, 65, block_size=64, device=device)) == ["####", "####", "###.", "##.#"]


def test_grid_2d(device):
    # 2 x 3 tiles of 8 x 8 pixels behind one block of global tokens
    layout = grid_2d(16, 24, 1, n_global=64, device=device)
    assert layout.seqlen_q == layout.seqlen_k == 64 + 16 * 24
    assert drawing(layout) == ["#######", "###.##.", "#######", "#.##.##", "###.##.", "#######", "#.##.##"]
    assert drawing(grid_2d(16, 24, 0, device=device)) == [
        "#.....", ".#....", "..#...", "...#..", "....#.", ".....#",
    ]  # fmt: skip


@pytest.mark.parametrize("block_size", layouts.BLOCK_SIZES)
def test_grid_2d_sees_the_pixels_around(device, block_size):
    """In pixels: everything within 8 rows and 8 columns is seen, whatever the tile."""
    height, width = 32, 48
    order = tile_order(height, width, block_size, device)
    assert torch.equal(order.sort().values, torch.arange(height * width, device=device))
    y, x = order // width, order % width
    near = ((y[:, None] - y).abs() <= 8) & ((x[:, None] - x).abs() <= 8)
    mask = grid_2d(height, width, 1, block_size=block_size, device=device).token_mask()[0]
    assert mask[near].all() and not mask.all()


def test_tile_order():
    order = tile_order(16, 16, 64)
    assert order[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17]  # the second row of the first tile
    assert order[64:66].tolist() == [8, 9] and order[128:130].tolist() == [128, 129]
    assert tile_order(8, 32, 128)[[0, 15, 16, 127, 128]].tolist() == [0, 15, 32, 239, 16]


@pytest.mark.parametrize("heads", [None, 1, 3])
def test_from_block_mask(device, heads):
    mask = torch.rand((5, 7) if heads is None else (heads, 5, 7), device=device) < 0.4
    mask[..., 2, :] = False  # a row and a column of blocks without any
    mask[..., 3] = False
    layout = from_block_mask(mask, 5 * 128 - 100, 7 * 128, block_size=128)
    expected = mask if mask.dim() == 3 else mask[None]
    assert layout.num_heads == (heads or 1)
    assert torch.equal(layout.to_dense(), expected)
    # the transposed lists name the same blocks
    assert torch.equal(layouts.listed_blocks(layout.col_start, layout.col_index, 5).transpose(1, 2), expected)
    for start, index in ((layout.row_start, layout.row_index), (layout.col_start, layout.col_index)):
        for head in start.tolist():
            lists = [index[a:b].tolist() for a, b in zip(head, head[1:], strict=False)]
            assert all(numbers == sorted(set(numbers)) for numbers in lists)
    assert layout.density == pytest.approx(expected.float().mean().item())


CONFIGS = [
    ({"pattern": "dense"}, 300, lambda device: layouts.dense(300, device=device)),
    ({"pattern": "local", "window": 100}, 300, lambda device: local(300, 100, device=device)),
    (
        {"pattern": "local_global", "window": 64, "global": 70, "block_size": 64},
        400,
        lambda device: local_global(400, 64, 70, block_size=64, device=device),
    ),
    (
        {"pattern": "bigbird", "window": 128, "global": 70, "random": 2, "seed": 9},
        2000,
        lambda device: layouts.bigbird(2000, 128, 70, 2, 9, device=device),
    ),
    (
        {"pattern": "bigbird", "window": 64, "global": 0, "random": 1, "block_size": 64},
        900,
        lambda device: layouts.bigbird(900, 64, 0, 1, block_size=64, device=device),
    ),
    ({"pattern": "strided", "stride": 256}, 1500, lambda device: layouts.strided(1500, 256, device=device)),
    ({"pattern": "butterfly"}, 1500, lambda device: layouts.butterfly(1500, device=device)),
    (
        {"pattern": "butterfly", "window": 200, "global": 1, "block_size": 64},
        1500,
        lambda device: layouts.butterfly(1500, 200, 1, block_size=64, device=device),
    ),
    (
        {"pattern": "grid_2d", "radius": 1, "global": 64},
        64 + 24 * 24,
        lambda device: grid_2d(24, 24, 1, 64, device=device),
    ),
    (
        {"pattern": "grid_2d", "radius": 1, "height": 8, "width": 32, "block_size": 128},
        256,
        lambda device: grid_2d(8, 32, 1, block_size=128, device=device),
    ),
]


@pytest.mark.parametrize("config, seqlen, build", CONFIGS, ids=[c[0]["pattern"] for c in CONFIGS])
def test_from_config(device, config, seqlen, build):
    layout, expected = from_config(config, seqlen, seqlen, device), build(device)
    assert layout.block_size == expected.block_size and torch.equal(layout.to_dense(), expected.to_dense())
    assert from_config(dict(reversed(config.items())), seqlen, seqlen, device) is layout  # cached


def test_cached_layouts_serve_training_after_inference(device):
    with torch.inference_mode():
        layout = from_config({"pattern": "local", "window": 7}, 77, 77, device)
    assert not layout.row_index.is_inference()


@pytest.mark.parametrize(
    "config, message",
    [
        ("local", 'must be a dict with a "pattern"'),
        ({"window": 3}, 'must be a dict with a "pattern"'),
        ({"pattern": "spiral"}, "unknown block_sparse pattern 'spiral'; known patterns: dense, local"),
        ({"pattern": "local"}, r"'local' takes the fields \['window'\].*got \[\]"),
        ({"pattern": "local", "window": 3, "globl": 4}, r"got \['globl', 'window'\]"),
        ({"pattern": "local", "window": -3}, "'window' must be an integer of at least 0, got -3"),
        ({"pattern": "local", "window": 3.5}, "'window' must be an integer of at least 0, got 3.5"),
        ({"pattern": "local", "window": 3, "block_size": 32}, r"block_size must be one of \(64, 128\), got 32"),
        ({"pattern": "bigbird", "window": 3, "global": 4}, r"takes the fields \['window', 'global', 'random'\] and"),
        ({"pattern": "strided", "stride": 100}, "stride must be a positive multiple of block_size 128.*got 100"),
        ({"pattern": "strided", "stride": 0}, "stride must be a positive multiple of block_size 128.*got 0"),
        ({"pattern": "grid_2d", "radius": 1, "height": 8}, "both of height and width"),
        ({"pattern": "grid_2d", "radius": 1}, "a square image, got 65 tokens"),
        ({"pattern": "grid_2d", "radius": 1, "height": 8, "width": 16}, "an image of 8 x 16 pixels, got 65 tokens"),
        ({"pattern": "grid_2d", "radius": 1, "global": 1}, "n_global must be a multiple of block_size 64"),
    ],
)
def test_config_errors_say_what_to_do(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, 65, 65)


def test_pattern_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"8 x 16 pixels .* do not divide 8 x 24"):
        tile_order(8, 24, 128)
    with pytest.raises(ValueError, match="one length, got seqlen_q=1, seqlen_k=64"):
        from_config({"pattern": "local", "window": 3}, 1, 64)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) or \(heads, 2, 3\).*got torch.bool of shape \(3, 2\)"):
        from_block_mask(torch.ones(3, 2, dtype=torch.bool), 128, 192, block_size=64)
    with pytest.raises(ValueError, match="seqlen must be a positive number of tokens, got 0"):
        local(0, 3)


PLOTS = {
    "shared": lambda: (grid_2d(64, 64, 1, 64), 1),
    "equal_heads": lambda: (from_block_mask(torch.eye(8, dtype=torch.bool).expand(3, 8, 8), 512, 512, 64), 1),
    "per_head": lambda: (layouts.per_head([local(500, 0), layouts.butterfly(500)], num_heads=4), 2),
    "many": lambda: (from_block_mask(torch.eye(20, dtype=torch.bool).view(20, 4, 5), 256, 320, 64), 12),
    "large": lambda: (local_global(2**17, 256, 64, block_size=64), 1),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plot(name, tmp_path):
    """One panel for each pattern that a head has, at most 12, and something drawn in each."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    layout, panels = PLOTS[name]()
    path = tmp_path / "layout.png"
    layout.plot(path)
    picture = image.open(path).convert("RGB")
    assert picture.width >= 700 and picture.height >= 600
    if panels > 1:
        assert picture.width >= 500 * min(panels, 4) and picture.height >= 500 * (panels // 4)
    blue = sum(count for count, (r, g, b) in picture.getcolors(2**24) if b - r > 100)
    assert blue > 300 * panels


class Ops(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def build_all(device):
    mask = torch.ones(4, 4, dtype=torch.bool, device=device)
    made = [
        local_global(4096, 256, 64, device=device),
        layouts.bigbird(4096, 256, 64, 3, device=device),
        layouts.strided(4096, 512, device=device),
        layouts.butterfly(4096, device=device),
    ]
    mixture = layouts.per_head(made, num_heads=8)
    for layout in (*made, mixture, from_block_mask(mask, 512, 512), grid_2d(64, 64, 1, 64, device=device)):
        layout.to_dense()
        assert work_items(layout).shape[1] == work_items(layout, transposed=True).shape[1] == 4


def test_built_without_a_sort_or_a_wait(device):
    """No operator that sorts, and none whose result the host must read: those do not run without data either."""

    def plain(device):
        start, _ = _layout_ops._block_lists(torch.ones(1, 4, 4, dtype=torch.bool, device=device), 16, False, 1, 1)
        _layout_ops._work_items(start, 2, 8)
        _layout_ops._random_blocks(start, 40, 1, 1, 3, 5)

    with Ops() as ops:
        build_all(device)
        plain(device)
    assert ops.names >= {"block_lists", "random_blocks", "work_items", "searchsorted"}
    assert not ops.names & {"sort", "argsort", "topk", "unique", "nonzero", "_local_scalar_dense", "masked_select"}
    build_all("meta")
    plain("meta")
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            build_all(device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_that_is_too_old_takes_plain_pytorch(monkeypatch):
    old = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(_layout_ops.fragment, "impl", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = _layout_ops._with_plain(torch.ops.flash_models.work_items.default, lambda tensor, *rest: rest)
    monkeypatch.setattr(_layout_ops, "no_kernel_reason", lambda device: "older than Ampere")
    assert call(old, 2, 8) == (2, 8)
    monkeypatch.setattr(_layout_ops, "no_kernel_reason", lambda device: None)
    with pytest.raises(RuntimeError, match="work_items"):  # the op, which takes tensors alone
        call(old, 2, 8)
