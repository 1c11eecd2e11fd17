# SPDX-License-Identifier: Apache-2.0
"""What each block-sparse pattern promises, for many lengths, against its definition block by block."""

import itertools

import pytest
import torch
from test_layouts import drawing

from flash_models.layouts import (
    bigbird,
    butterfly,
    dense,
    from_block_mask,
    from_config,
    grid_2d,
    local,
    local_global,
    per_head,
    strided,
)

NUM_BLOCKS = [1, 2, 3, 5, 8, 13, 16, 33]


def defined(num_blocks, listed):
    """The mask of blocks for which `listed(i, j)`, bool (1, n, n)."""
    return torch.tensor([[[bool(listed(i, j)) for j in range(num_blocks)] for i in range(num_blocks)]])


def check_lists(layout):
    """Both lists are ascending, within bounds, and name the same blocks. Returns these: bool (Hl, nq, nk)."""
    mask = layout.to_dense().cpu()
    for blocks, start, index in (
        (mask, layout.row_start, layout.row_index),
        (mask.transpose(1, 2), layout.col_start, layout.col_index),
    ):
        assert start.dtype == index.dtype == torch.int32 and start.is_contiguous() and index.is_contiguous()
        for starts, lines in zip(start.tolist(), blocks, strict=True):
            for (begin, end), line in zip(itertools.pairwise(starts), lines, strict=True):
                assert index[begin:end].tolist() == line.nonzero().flatten().tolist()
    assert mask.sum() <= layout.max_listed
    assert layout.density == pytest.approx(mask.float().mean().item())
    return mask


@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
@pytest.mark.parametrize("reach, global_blocks", [(0, 0), (1, 0), (0, 2), (2, 1), (40, 1), (1, 40)])
def test_local_global_and_butterfly(device, num_blocks, reach, global_blocks):
    seqlen = num_blocks * 64 - 5
    options = {"window": 64 * reach, "n_global": 64 * global_blocks, "block_size": 64, "device": device}

    def near_or_global(i, j):
        return abs(i - j) <= reach or min(i, j) < global_blocks

    def butterfly_too(i, j):
        return near_or_global(i, j) or (i ^ j).bit_count() <= 1

    assert torch.equal(check_lists(local_global(seqlen, **options)), defined(num_blocks, near_or_global))
    assert torch.equal(check_lists(butterfly(seqlen, **options)), defined(num_blocks, butterfly_too))


def test_butterfly(device):
    assert drawing(butterfly(64 * 8, block_size=64, device=device)) == [
        "###.#...",
        "##.#.#..",
        "#.##..#.",
        ".###...#",
        "#...###.",
        ".#..##.#",
        "..#.#.##",
        "...#.###",
    ]


@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
def test_butterfly_connects_all_blocks(num_blocks):
    """In as many layers as the block numbers have bits, also where n is no power of two."""
    mask = butterfly(num_blocks * 64, block_size=64).to_dense()[0].float()
    connected = torch.linalg.matrix_power(mask, max(1, (num_blocks - 1).bit_length()))
    assert (connected > 0).all()


def test_strided(device):
    layout = strided(64 * 8, 64 * 3, block_size=64, device=device)
    assert drawing(layout) == [
        "####..#.",
        "#####..#",
        "######..",
        "#######.",
        ".#######",
        "..######",
        "#..#####",
        ".#..####",
    ]


@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
@pytest.mark.parametrize("step", [1, 2, 3, 50])
def test_strided_holds_its_definition_in_tokens(device, num_blocks, step):
    layout = strided(num_blocks * 64 - 9, step * 64, block_size=64, device=device)
    mask = check_lists(layout)
    assert torch.equal(mask, defined(num_blocks, lambda i, j: abs(i - j) <= step or (i - j) % step == 0))
    token = torch.arange(layout.seqlen_q, device=device)
    apart = (token[:, None] - token).abs()
    assert layout.token_mask()[0][(apart <= step * 64) | (apart % (step * 64) == 0)].all()
    assert (mask[0].float() @ mask[0].float() > 0).all()  # any two blocks are connected over a third


def test_bigbird(device):
    """The random blocks are the same on every device and in every version."""
    assert drawing(bigbird(64 * 12, 64, 1, 2, block_size=64, device=device)) == [
        "############",
        "###.#.....#.",
        "####.#....#.",
        "#.###..#..#.",
        "#..####....#",
        "#.#.###....#",
        "##...###.#..",
        "#..#..###..#",
        "#...#.####..",
        "##....#.###.",
        "##...#...###",
        "#...#...#.##",
    ]


@pytest.mark.parametrize("num_blocks", NUM_BLOCKS)
@pytest.mark.parametrize("reach, global_blocks, n_random", [(1, 1, 3), (0, 0, 2), (2, 0, 1), (1, 3, 0), (0, 1, 50)])
def test_bigbird_has_window_global_and_random_blocks(device, num_blocks, reach, global_blocks, n_random):
    sizes = {"window": 64 * reach, "n_global": 64 * global_blocks, "block_size": 64, "device": device}
    mask = check_lists(bigbird(num_blocks * 64 - 1, n_random=n_random, **sizes))
    fixed = local_global(num_blocks * 64, **sizes).to_dense().cpu()
    assert mask[fixed].all()
    free = num_blocks - fixed.sum(-1)
    assert torch.equal((mask & ~fixed).sum(-1), free.clamp(max=n_random))


def test_bigbird_draws_all_blocks_alike():
    n, seeds = 20, 400
    layouts = [bigbird(n * 64, 64, 64, 3, seed, block_size=64) for seed in range(seeds)]
    drawn = torch.stack([layout.to_dense()[0] for layout in layouts]).float()
    fixed = local_global(n * 64, 64, 64, block_size=64).to_dense()[0]
    expected = (3 / (n - fixed.sum(-1)))[:, None].expand(n, n)
    deviation = (expected * (1 - expected) / seeds) ** 0.5
    # parts of unequal length (of 16 blocks: 5, 5 and 6) draw their blocks with probabilities that are up to 1/9 off
    allowed = 4.5 * deviation + expected / 9
    assert ((drawn.mean(0) - expected).abs() <= allowed)[~fixed].all()
    assert not torch.equal(drawn[0], drawn[1])


def test_per_head(device):
    options = {"block_size": 64, "device": device}
    first, second = local(300, 0, **options), bigbird(300, 0, 0, 2, **options)
    layout = per_head([first, second, first], num_heads=6)
    assert layout.num_heads == 6 and layout.names[1] == second.names[0]
    mask = check_lists(layout)
    for head, expected in enumerate((first, second, first) * 2):
        assert torch.equal(mask[head], expected.to_dense()[0].cpu())
    assert layout.row_index.numel() == first.row_index.numel() + second.row_index.numel()  # heads share the lists
    assert per_head([first, first], num_heads=4) is first
    symmetric = per_head([first, butterfly(300, **options)])
    check_lists(symmetric)
    assert symmetric.col_index is symmetric.row_index


def test_per_head_of_config(device):
    heads = [
        {"pattern": "bigbird", "window": 64, "global": 64, "random": 1, "seed": 5},
        {"pattern": "strided", "stride": 128},
        {"pattern": "grid_2d", "radius": 1, "global": 64},
        {"pattern": "strided", "stride": 128},
    ]
    config = {"pattern": "per_head", "heads": heads, "block_size": 64}
    seqlen = 64 + 32 * 32
    layout = from_config(config, seqlen, seqlen, device, num_heads=8)
    assert from_config(config, seqlen, seqlen, device, num_heads=8) is layout  # cached
    assert from_config(config, seqlen, seqlen, device).num_heads == 4
    made = [from_config({**head, "block_size": 64}, seqlen, seqlen, device).to_dense()[0] for head in heads]
    assert torch.equal(layout.to_dense(), torch.stack(made * 2)) and layout.block_size == 64
    assert layout.row_index.numel() < sum(head.numel() for head in made)  # the strided heads share, and lists are short


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("block_size", [64, 128])
def test_every_row_and_column_lists_a_block(device, seqlen, block_size):
    options = {"block_size": block_size, "device": device}
    made = [
        dense(seqlen, **options),
        local(seqlen, 0, **options),
        local_global(seqlen, 100, 10, **options),
        bigbird(seqlen, 0, 0, 1, seed=3, **options),
        strided(seqlen, 256, **options),
        butterfly(seqlen, **options),
        grid_2d(16, 16, 0, **options),
    ]
    for layout in [*made, per_head(made[:-1])]:
        mask = check_lists(layout)
        assert mask.any(-1).all() and mask.any(-2).all()


def test_lists_are_as_long_as_the_pattern_not_as_the_matrix():
    """256K tokens: 4,096 x 4,096 blocks of 64."""
    layout = local_global(2**18, 256, 64, block_size=64)
    listed = layout.row_start[0, -1].item()
    assert listed <= layout.row_index.numel() <= 1.01 * listed and layout.col_index is layout.row_index
    twelve = per_head([layout, strided(2**18, 4096, block_size=64)], num_heads=12)
    assert twelve.row_index.numel() < 2**20 and twelve.density < 0.05


def test_errors_say_what_to_do():
    first, second = local(300, 0, block_size=64), local(301, 0, block_size=64)
    with pytest.raises(ValueError, match=r"must agree in \(block_size.*\(64, 300, 300, 'cpu'\) and \(64, 301, 301"):
        per_head([first, second])
    with pytest.raises(ValueError, match="at least one layout"):
        per_head([])
    with pytest.raises(ValueError, match=r"of one pattern for all heads; got layouts of \[1, 2\] heads"):
        per_head([first, from_block_mask(torch.ones(2, 5, 5, dtype=torch.bool), 300, 300, 64)])
    with pytest.raises(ValueError, match="2 patterns do not repeat over 5 heads"):
        per_head([first, local(300, 64, block_size=64)], num_heads=5)
    with pytest.raises(ValueError, match="stride must be a positive multiple of block_size 64.*got 100"):
        strided(300, 100, block_size=64)
    with pytest.raises(ValueError, match="n_random must be an integer of at least 0, got -1"):
        bigbird(300, 0, 0, -1)
    with pytest.raises(ValueError, match="1 x 65536 x 65536 blocks of 64 tokens .* expected fewer than 2"):
        butterfly(2**22, block_size=64)


@pytest.mark.parametrize(
    "heads, message",
    [
        ({"pattern": "local", "window": 3}, "'heads' must be a list of patterns"),
        ([], "'heads' must be a list of patterns"),
        ([{"pattern": "local"}], r"heads\[0\] of block_sparse pattern 'per_head': .*'local' takes the fields"),
        ([{"pattern": "dense"}, "local"], r"heads\[1\] .* must be a dict"),
        ([{"pattern": "dense", "block_size": 64}], r"heads\[0\] .* without a block_size.*stands beside 'heads'"),
        ([{"pattern": "per_head", "heads": []}], "must be another pattern"),
        ([{"pattern": "strided", "stride": 64}], r"heads\[0\].*multiple of block_size 128"),
        ([{"pattern": "dense"}] * 3, "3 patterns do not repeat over 4 heads"),
        ([{"pattern": "grid_2d", "radius": 1}, {"pattern": "dense"}], "a square image, got 300 tokens"),
    ],
)
def test_per_head_config_errors(heads, message):
    with pytest.raises(ValueError, match=message):
        from_config({"pattern": "per_head", "heads": heads}, 300, 300, num_heads=4)


def test_what_lists_every_block_is_known_to(device):
    """From the sizes alone, so that attention can be dense; never where a block is missing."""
    options = {"block_size": 64, "device": device}
    full = [
        dense(300, 500, **options),
        local(300, 256, **options),
        local_global(300, 0, 257, **options),
        bigbird(300, 256, 0, 1, **options),
    ]
    others = [
        local(300, 192, **options),
        local_global(300, 0, 192, **options),
        bigbird(300, 192, 0, 1, **options),
        butterfly(300, **options),
        strided(300, 64, **options),
    ]
    assert all(layout.full and layout.density == 1 for layout in full)
    assert not any(layout.full for layout in others)
    assert all(layout.density < 1 for layout in others[:2])
    assert per_head([full[1], full[2]]).full and not per_head([full[1], others[0]]).full
