"""Faults of layers over several devices: what is lost, shifted, mixed up or not sent on the way between the ranks."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/parallel/collectives.py": {
        "gathered-gradient-of-one-rank": edit(
            "return _scattered(g, ctx.name, ctx.size), None, None\n",
            "return g[torch.distributed.get_rank()].contiguous(), None, None\n",
            "missing gradient",
        ),
        "gathered-scores-gradient-of-one-rank": edit(
            "return _scattered(g, ctx.name, ctx.size)[None], None, None, None",
            "return g[torch.distributed.get_rank()][None].contiguous(), None, None, None",
            "missing gradient",
        ),
        "alike-gradient-of-one-rank": edit("_summed(flat, ctx.name).split(", "flat.split(", "missing gradient"),
    },
    "optimized/parallel/shards.py": {
        "neighbours-one-too-few": edit("max(s.start - before, 0)", "max(s.start - before + 1, 0)", "window"),
        "neighbours-one-too-few-after": edit("min(s.end + after, s.n)", "min(s.end + after - 1, s.n)", "window"),
    },
    "optimized/parallel/routing.py": {
        "masks-of-contexts-not-sent": edit(
            "mask = masks_of(side.whole, count, (batch, experts), ranks.rank)", "mask = None", "masked tokens leak"
        ),
        "rows-with-the-mask-of-another-item": edit(
            'row.div(max(experts, 1), rounding_mode="floor")', "(row % max(batch, 1))", "batch mix-up"
        ),
        "masked-slots-are-here": edit(
            "here = mask & (local >= 0) & (local < shard.size)",
            "here = (local >= 0) & (local < shard.size)",
            "masked rows and sentinels",
        ),
        "slots-of-a-block-rounded-down": edit(
            "return -(-side.k // -(-side.shard.n // block))", "return side.k // -(-side.shard.n // block)", "mass"
        ),
        "nan-known-to-its-rank-alone": edit(
            "odd = ranks.largest(torch.cat([_odd(t, side) for side, t in zip(sides, logits)], 1).to(torch.int32)) > 0",
            "odd = torch.cat([_odd(t, side) for side, t in zip(sides, logits)], 1).to(torch.int32) > 0",
            "NaN order",
        ),
    },
    "optimized/parallel/rows.py": {
        "units-of-other-experts": edit(
            "[(self.rank * self.each + i) // self.pieces for i in range(self.each)]",
            "[(self.rank * self.each + i) % self.experts for i in range(self.each)]",
            "expert mix-up",
        ),
        "pieces-at-other-positions": edit(
            "[(self.rank * self.each + i) % self.pieces for i in range(self.each)]",
            "[i % self.pieces for i in range(self.each)]",
            "rotary",
        ),
        "keys-gradient-of-one-piece": edit(
            "rows.unflatten(0, (self.experts, self.pieces)).sum(1)",
            "rows.unflatten(0, (self.experts, self.pieces))[:, 0]",
            "missing gradient",
        ),
        "masked-keys-first": edit(
            "order = (~valid).to(torch.uint8)", "order = valid.to(torch.uint8)", "masked tokens leak"
        ),
    },
    "optimized/parallel/fused.py": {
        "masks-not-sent": edit(
            "row_mask = masks_of(whole, count, (batch, experts), how.rank)", "row_mask = None", "masked tokens leak"
        ),
        "logits-gradient-of-other-rows": edit(
            "both = both.unflatten(2, (how.ranks, -1)).permute(2, 0, 1, 3)",
            "both = both.flip(0).unflatten(2, (how.ranks, -1)).permute(2, 0, 1, 3)",
            "missing gradient",
        ),
    },
    "optimized/parallel/mixture.py": {
        "mask-of-neighbours-shifted": edit(
            "q.whole[:, q.shard.start - before :]", "q.whole[:, q.shard.start :]", "window"
        ),
    },
    "optimized/parallel/experts.py": {
        "passed-tokens-of-the-first-experts": edit("first = self.over.ranks.rank * each", "first = 0", "expert mix-up"),
    },
    "optimized/parallel/causal.py": {
        "columns-from-the-rank-s-first-token": edit(
            "columns + (prior - part.begin), earlier)", "columns + (prior - shard.start), earlier)", "causality"
        ),
        "first-token-of-a-block-is-remembered": edit(
            "torch.where(columns >= part.begin,", "torch.where(columns > part.begin,", "causality"
        ),
        "memory-of-the-first-expert": edit(
            "(earlier + k * torch.arange(experts, device=x.device)[:, None])",
            "(earlier + 0 * torch.arange(experts, device=x.device)[:, None])",
            "expert mix-up",
        ),
        "queries-of-the-next-rank-too": edit("filled & (at < shard.end), scores", "filled, scores", "missing gradient"),
        "slots-of-the-rank-before-stay": edit(
            "(filled[:, :, :1] & (at[:, :, :1] < shard.start)).sum(-1",
            "(filled[:, :, :1] & (at[:, :, :1] < part.begin)).sum(-1",
            "masked rows and sentinels",
        ),
        "inverse-of-moved-slots-stays": edit(
            "torch.where(inverse < capacity, inverse - others, inverse)", "inverse + 0 * others", "missing gradient"
        ),
        "inverse-of-later-blocks-moves": edit(
            "torch.where(inverse < capacity, inverse - others, inverse)", "inverse - others", "missing gradient"
        ),
        "positions-of-memory-from-the-shard-s-start": edit(
            "torch.cat((positions, since), 1)", "torch.cat((positions * 0, since), 1)", "rotary"
        ),
        "blocks-no-longer-than-the-window": edit(
            "before = max(c.local_attn_window_size, c.routed_window_size - 1)",
            "before = c.local_attn_window_size",
            "window",
        ),
    },
    "optimized/parallel/causal_experts.py": {
        "average-of-own-experts": edit(
            "(1 + c.num_experts * later[:, None])", "(1 + there.null_kv.shape[1] * later[:, None])", "combination"
        ),
    },
}
