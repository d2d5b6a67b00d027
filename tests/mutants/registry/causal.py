"""Faults of the operators of the causal layer: memory, candidates, and attention over the memory."""

from ..mutant import Edits, edit

EDITS: Edits = {
    "optimized/kernels/ranks.py": {
        "ranks-lists-are-full": edit(
            "there = there & ((offsets >= listed) | (offsets % width < filled))",
            "there = there & (offsets < size)",
            "uninitialised output",
        ),
        "ranks-columns-counted-from-the-lists": edit(
            "columns = start + offsets - listed", "columns = start + offsets", "32-bit index"
        ),
        "ranks-digit-decided-by-one": edit(
            "least = tl.where(count_3 >= k, third", "least = tl.where(count_3 > 0, third", "ties and signed zeros"
        ),
        "ranks-first-block-counted-twice": edit(
            "for begin in range(BLOCK, size, BLOCK):", "for begin in range(0, size, BLOCK):", "pytorch/pytorch#153799"
        ),
    },
    "optimized/kernels/candidates.py": {
        "candidates-threshold-of-the-own-block": edit(
            "before = (j - 1) * width", "before = j * width", "mixture-of-attention 0.0.25 (3)", "causality"
        ),
        "candidates-above-the-threshold-alone": edit(
            "candidate = valid & (s >= threshold)", "candidate = valid & (s > threshold)", "ties and signed zeros"
        ),
        "candidates-threshold-of-the-number-that-separates": edit(
            "bits = tl.where(reached < 0, reached ^ top, reached).to(key_type)",
            "bits = tl.where(least < 0, least ^ top, least).to(key_type)",
            "ties and signed zeros",
        ),
        "candidates-beyond-capacity-have-a-slot": edit(
            "tl.where(taken, i * capacity + slot, -1)", "tl.where(candidate, i * capacity + slot, -1)", "tail mask"
        ),
        "candidates-slots-counted-from-the-row": edit(
            "tl.where(taken, i * capacity + slot, -1)", "tl.where(taken, slot, -1)", "expert mix-up"
        ),
        "candidates-mask-of-item-0": edit(
            "mask_ptr += row // experts * n", "mask_ptr += row // experts * 0", "fla-org/flash-linear-attention#1115"
        ),
        "candidates-items-side-by-side": edit("row // experts * item + row % experts * n", "row * n", "expert mix-up"),
        "candidates-running-count-of-a-chunk": edit(
            "        seen += tl.sum(candidate.to(tl.int32))",
            "        seen = tl.sum(candidate.to(tl.int32))",
            "tail mask",
        ),
        "candidates-empty-slots-unwritten": edit(
            "mask=(slot < capacity) & (slot >= seen))",
            "mask=(slot < capacity) & (slot > seen))",
            "uninitialised output",
        ),
    },
    "optimized/kernels/memory.py": {
        "memory-knows-its-own-block": edit(
            "end = prior + target * width\n", "end = prior + (target + 1) * width\n", "causality"
        ),
        "memory-no-equal-is-in": edit(
            "too_many = found - count", "too_many = found - 0 * count", "pytorch/pytorch#150012"
        ),
        "memory-nan-is-no-token": edit("token = lowest + 2", "token = lowest + 3", "NaN order"),
        "memory-masked-are-tokens": edit("token = lowest + 2", "token = lowest + 1", "masked tokens leak"),
        "memory-group-starts-a-block-late": edit(
            "start = tl.where(origin > 0, prior + origin * width, 0)",
            "start = tl.where(origin > 0, prior + (origin + 1) * width, 0)",
            "tail mask",
        ),
        "memory-items-side-by-side": edit("row // experts * item + row % experts * n", "row * n", "expert mix-up"),
        "memory-prior-forgotten-by-the-first-group": edit(
            "start = tl.where(target > 0, prior + target * group * width, 0)",
            "start = prior + target * group * width",
            "tail mask",
        ),
        "memory-starts-from-one-group-less": edit("listed = (target + 1) * k", "listed = target * k", "tail mask"),
        "memory-mask-of-item-0": edit(
            "mask_ptr += row // experts * n", "mask_ptr += row // experts * 0", "fla-org/flash-linear-attention#1115"
        ),
        "memory-tail-unwritten": edit(
            "mask=(begin + lanes >= count) & (begin + lanes < k)",
            "mask=(begin + lanes > count) & (begin + lanes < k)",
            "uninitialised output",
        ),
        "memory-equals-of-the-first-chunk-forgotten": edit(
            "seen_equal += tl.sum(equal)", "seen_equal = tl.sum(equal)", "pytorch/pytorch#153799"
        ),
    },
    "optimized/kernels/memory_places.py": {
        "places-search-a-step-short": edit(
            "steps, block = k.bit_length(), next", "steps, block = k.bit_length() - 1, next", "tail mask"
        ),
        "places-line-cut-a-block-late": edit("where(born > first, climbs", "where(born > first + 1, climbs", "window"),
        "places-line-not-cut": edit("where(born > first, climbs", "where(born > 0, climbs", "window"),
        "places-all-heirs-of-one": edit("(place - 1) * k + rank", "(place - 1) * k + 0 * rank", "combination"),
        "places-nobodys-heir-a-place-late": edit(
            "-1 - (before + rank - dropped)", "-2 - (before + rank - dropped)", "tail mask"
        ),
        "places-of-the-first-row": edit(
            "row * blocks + j, row * blocks + first", "row * blocks + j, 0 * row + first", "batch mix-up"
        ),
        "places-tail-unwritten": edit(
            "mask=(at >= count) & (at < k))", "mask=(at > count) & (at < k))", "uninitialised output"
        ),
    },
    "optimized/kernels/blend.py": {
        "blend-first-token-behind-a-block-alone": edit(
            "return position >= width", "return position > width", "causality"
        ),
        "blend-null-of-a-neighbour": edit(
            "_left_out(inverse_ptr, e + 3, experts", "_left_out(inverse_ptr, e + 2, experts", "expert mix-up"
        ),
        "blend-null-hears-the-first-block": edit("asked = later & (", "asked = (", "masked tokens leak"),
        "blend-null-of-the-first-chunk": edit(
            "row = tl.program_id(0).to(tl.int64) * experts + e",
            "row = tl.program_id(0).to(tl.int64) * 0 + e",
            "combination",
        ),
        "blend-score-that-is-nan-passes-on": edit("    taken = tl.where(score == score, taken, 0)\n", "", "NaN order"),
        "blend-infinite-output-passes-on": edit(
            'variable = readable & (tl.abs(y) < float("inf"))', "variable = readable", "masked rows and sentinels"
        ),
        "blend-average-of-slots-forgotten": edit(
            "            g /= (experts + 1).to(DTYPE)\n        variable",
            "            g /= 1.0\n        variable",
            "combination",
        ),
    },
    "optimized/kernels/memory_attention.py": {
        "memory-attention-logit-of-minus-infinity-unseen": edit(
            '        s = tl.where(s == -float("inf"), float("nan"), s)\n', "", "masked rows and sentinels"
        ),
        "memory-attention-null-value-scored": edit(
            "out = weight[:, None] * null_v[None, :]", "out = 0.5 * weight[:, None] * null_v[None, :]", "precision"
        ),
        "memory-attention-null-key-not-counted": edit(
            'total = tl.where(_finite(top), 1.0, float("nan"))',
            'total = tl.where(_finite(top), 0.0, float("nan"))',
            "masked rows and sentinels",
        ),
        "memory-attention-score-in-the-sum": edit(
            "        total = total * fade + tl.sum(p, 1)\n        p = p * score[None, :]\n",
            "        p = p * score[None, :]\n        total = total * fade + tl.sum(p, 1)\n",
            "combination",
        ),
        "memory-attention-tail-of-the-list-seen": edit(
            's = tl.where(seen[None, :], s, -float("inf"))', "s = s", "pytorch/pytorch#158212"
        ),
        "memory-attention-nan-in-its-channel-alone": edit(
            "odd = (total != total) | (tl.min(_finite(out).to(tl.int32), 1) == 0)",
            "odd = total != total",
            "NaN order",
        ),
        "memory-attention-lse-base-2": edit(
            "(top + tl.log2(total)) * LN_2", "top + tl.log2(total)", "log-sum-exp and scale"
        ),
        "memory-attention-empty-slots-have-a-sum": edit(
            "tl.where(here & (odd == 0), (top + tl.log2(total)) * LN_2",
            "tl.where(odd == 0, (top + tl.log2(total)) * LN_2",
            "masked tokens leak",
        ),
        "memory-attention-dq-beside-nan": edit(
            "tl.where(live[:, None], dq, 0.0), dim, BLOCK_D)", "dq, dim, BLOCK_D)", "pytorch/pytorch#196678"
        ),
        "memory-attention-null-gradient-unscaled": edit(
            "null_v[None, :], 1) - delta) * scale", "null_v[None, :], 1) - delta)", "log-sum-exp and scale"
        ),
        "memory-attention-null-gradient-of-mixed-heads": edit(
            "part = ((row * blocks + j) * tiles + tile) * heads + h",
            "part = ((row * blocks + j) * heads + h) * tiles + tile",
            "stride and layout",
        ),
        "memory-attention-null-gradient-of-no-block-unwritten": edit(
            "(m.null_kv.new_empty if dq.numel() else m.null_kv.new_zeros)",
            "m.null_kv.new_empty",
            "uninitialised output",
        ),
        "memory-attention-scores-of-one-head": edit(
            "Sum(dscores, batch * experts, heads)", "Sum(dscores, batch * experts, 1)", "missing gradient"
        ),
        "memory-attention-null-gradient-without-delta": edit(
            "ds0 = p0 * (weight * tl.sum(dout.to(DTYPE) * null_v[None, :], 1) - delta)",
            "ds0 = p0 * (weight * tl.sum(dout.to(DTYPE) * null_v[None, :], 1))",
            "missing gradient",
        ),
    },
    "optimized/kernels/memory_keys.py": {
        "memory-attention-keys-unscored": edit("scored = dp * score[:, None]", "scored = dp", "missing gradient"),
        "memory-attention-sums-go-on-after-eviction": edit(
            "u = tl.where(changed[:, None], 0.0, u)", "u = u", "stale saved tensor"
        ),
        "memory-attention-written-at-the-end-alone": edit(
            "done = changed & (held >= 0)", "done = changed & (held > held)", "missing gradient"
        ),
        "memory-attention-last-places-unwritten": edit(
            "for j in range(first, last + 1):",
            "for j in range(first, last):",
            "missing gradient",
        ),
        "memory-attention-scores-of-unscored-values": edit(
            "_store(dkv_ptr + stride, held, 2 * stride, done, u * score[:, None], dim, BLOCK_D)",
            "_store(dkv_ptr + stride, held, 2 * stride, done, u, dim, BLOCK_D)",
            "missing gradient",
        ),
        "memory-attention-nan-score-in-the-gradient": edit(
            "return tl.where(_finite(score), score, 0.0)", "return score", "fla-org/flash-linear-attention#77"
        ),
        "memory-attention-dropout-by-place": edit(
            "_kept(seed, queries[None, :], held[:, None].to(tl.int64), n, drop",
            "_kept(seed, queries[None, :], at[:, None].to(tl.int64), n, drop",
            "Dao-AILab/flash-attention#1251",
        ),
        "memory-attention-one-draw-for-all-heads": edit(
            "queries = ((row * heads + h) * blocks + j) * slots + i\n                kept",
            "queries = (row * heads * blocks + j) * slots + i\n                kept",
            "Dao-AILab/flash-attention#314",
        ),
        "memory-keys-old-share-lost-at-a-change": edit(
            "_store(old_ptr, old, 2 * dim, done & (old >= 0), dk",
            "_store(old_ptr, old, 2 * dim, done & (old > 0), dk",
            "tail mask",
        ),
        "memory-keys-whole-share-of-the-own-program": edit(
            "whole_ptr = shares_ptr + (row * heads + h) * k * 2 * dim + (chunk + 1) * every",
            "whole_ptr = shares_ptr + (row * heads + h) * k * 2 * dim + chunk * every",
            "stale saved tensor",
        ),
        "memory-keys-a-new-column-taken-for-old": edit(
            "if (j == first) & (j > 0):\n                    stayed, _at = _listed(indices_ptr, counts_ptr, j - 1,",
            "if (j == first) & (j > 0):\n                    stayed, _at = _listed(indices_ptr, counts_ptr, j,",
            "stale saved tensor",
        ),
        "memory-keys-scores-without-dropout": edit(
            "dsigma += tl.sum(weighted * dp, 1)", "dsigma += tl.sum(p * dp, 1)", "Dao-AILab/flash-attention#1251"
        ),
        "memory-keys-score-of-who-was-there-before": edit(
            "dsigma = tl.where(changed, 0.0, dsigma)", "dsigma = dsigma", "stale saved tensor"
        ),
        "memory-keys-old-share-of-the-score-lost": edit(
            "tl.store(old_sigma_ptr + old, dsigma,", "tl.store(old_sigma_ptr + old, 0.0 * dsigma,", "missing gradient"
        ),
        "memory-keys-whole-share-of-the-score-lost": edit(
            "tl.store(whole_sigma_ptr + there_at, dsigma,",
            "tl.store(whole_sigma_ptr + there_at, 0.0 * dsigma,",
            "missing gradient",
        ),
        "memory-keys-later-shares-of-the-score-lost": edit(
            "dsigma += tl.load(sigma_shares_ptr", "dsigma += 0.0 * tl.load(sigma_shares_ptr", "missing gradient"
        ),
        "memory-keys-queries-of-the-first-tile-alone-live": edit(
            "lse = tl.load(lse_ptr + place + i + BLOCK_M, mask", "lse = tl.load(lse_ptr + place + i, mask", "tail mask"
        ),
        "memory-keys-as-many-queries-as-the-block-before": edit(
            "tl.load(q_counts_ptr + j + 1, mask", "tl.load(q_counts_ptr + j, mask", "tail mask"
        ),
        "memory-keys-what-a-dead-query-saw": edit(
            "dp = tl.where(pairs, dp, 0.0)", "dp = dp", "fla-org/flash-linear-attention#77"
        ),
        "memory-keys-dead-queries-are-read": edit(
            "q = _tile(q_ptr + start, i, stride, live, dim",
            "q = _tile(q_ptr + start, i, stride, i < filled, dim",
            "fla-org/flash-linear-attention#77",
        ),
        "memory-keys-a-step-short": edit(
            "indices.contiguous(), k.bit_length()", "indices.contiguous(), max(k.bit_length() - 1, 1)", "tail mask"
        ),
        "memory-keys-joined-twice": edit(
            "mine = mine & ((first & even_before) == 0)", "mine = mine", "missing gradient"
        ),
        "memory-keys-joined-with-the-next-alone": edit(
            "for later in range(chunk + 1, chunks):", "for later in range(chunk + 1, chunk + 2):", "missing gradient"
        ),
    },
    "optimized/kernels/memory_tiles.py": {
        "memory-attention-experts-exchanged-with-items": edit(
            "row % batch * experts + row // batch", "row", "expert mix-up"
        ),
    },
    "optimized/kernels/admitted.py": {
        "admitted-new-columns-taken-for-old": edit(
            "_first_new(i, prior, block), count, earlier",
            "_first_new(i + 1, prior, block), count, earlier",
            "tail mask",
        ),
        "admitted-listed-before-is-forgotten": edit(
            "tl.store(columns_ptr + before + place - first, column",
            "tl.store(columns_ptr + place - first, column",
            "32-bit index",
        ),
        "admitted-prior-is-a-block": edit("prior + (j - 1) * block)", "block + (j - 1) * block)", "causality"),
        "admitted-a-block-s-end-from-its-start": edit(
            "end = tl.minimum(prior + j * block, n)", "end = tl.minimum(j * block + block, n)", "tail mask"
        ),
    },
    "optimized/kernels/admitted_rows.py": {
        "admitted-rows-scale-unapplied": edit(
            "            out *= scale[:, None]\n", "            out *= 1.0\n", "log-sum-exp and scale"
        ),
        "admitted-rows-of-item-0": edit(
            "rows = e * row_e + b * n + column", "rows = e * row_e + column", "batch mix-up"
        ),
        "admitted-rows-dots-unscaled": edit("tl.where(scale > 0, dot / scale, 0.0)", "dot", "log-sum-exp and scale"),
        "admitted-rows-tile-beyond-the-total": edit(
            "        there = at < total\n        column", "        there = at < n\n        column", "tail mask"
        ),
        "admitted-rows-weight-of-one-item": edit(
            "for item in range(batch):", "for item in range(1):", "missing gradient"
        ),
        "admitted-rows-weight-of-what-is-not-finite": edit("x = tl.where(_finite(x), x, 0.0)", "x = x", "NaN order"),
        "admitted-rows-parts-overlap": edit("there = at < end", "there = at < total", "missing gradient"),
        "admitted-rows-weight-of-raw-tokens": edit(
            "x *= _scales(norms_ptr, token, there, root_dim, HAS_NORM, DTYPE)[:, None]", "x *= 1.0", "missing gradient"
        ),
        "admitted-rows-last-unit-forgotten": edit("there = token < rows\n", "there = token < rows - 1\n", "tail mask"),
        "admitted-rows-units-of-the-first-channels": edit(
            "start = tl.program_id(1) * BLOCK_D", "start = tl.program_id(1) * 0", "stride and layout"
        ),
    },
    "optimized/kernels/scaled_weight.py": {
        "scaled-weight-first-part-alone": edit(
            "for part in range(parts):", "for part in range(1):", "missing gradient"
        ),
        "scaled-weight-gamma-of-expert-0": edit("gamma_ptr + e * dim", "gamma_ptr", "expert mix-up"),
        "scaled-weight-dgamma-of-scaled-parts": edit(
            "            dgamma += total * tl.load(w_ptr + at, mask=there, other=0.0).to(DTYPE)\n"
            "            total *= gamma[None, :]\n",
            "            total *= gamma[None, :]\n"
            "            dgamma += total * tl.load(w_ptr + at, mask=there, other=0.0).to(DTYPE)\n",
            "log-sum-exp and scale",
        ),
        "scaled-weight-last-rows-alone": edit("dgamma += total *", "dgamma = total *", "missing gradient"),
        "scaled-weight-dgamma-in-the-weights-dtype": edit(
            "torch.empty(gamma.shape, dtype=gamma.dtype", "torch.empty(gamma.shape, dtype=w.dtype", "precision"
        ),
        "scaled-weight-last-chunk-lost": edit("cdiv(rows, CHUNK), min(", "max(rows // CHUNK, 1), min(", "tail mask"),
    },
    "optimized/kernels/finite.py": {
        "spoil-a-token-late": edit("(latest >= i[:, None] - window))", "(latest > i[:, None] - window))", "window"),
        "spoil-keys-before-the-tile-forgotten": edit(
            "for start in range(tl.maximum(first - window, 0), first, TOKENS):",
            "for start in range(first, first, TOKENS):",
            "window",
        ),
        "spoil-sees-the-future": edit("j = i - back", "j = i + 1 - back", "causality"),
        "spoil-hidden-keys-are-seen": edit(
            "there = tl.load(mask_ptr + b * n + j, mask=there, other=0) != 0", "there = there", "masked tokens leak"
        ),
        "spoil-queries-forgotten": edit(
            "odd = odd | ((latest >= 0)", "odd = (odd & (latest >= 0)) | ((latest >= 0)", "NaN order"
        ),
    },
    "optimized/ops/memory_experts.py": {
        "memory-experts-gamma-of-weights-forgotten": edit(
            "weight = (weight * a.kv_gamma.mT).to(weight.dtype)",
            "weight = weight",
            "log-sum-exp and scale",
        ),
        "memory-experts-gradient-of-gamma-unweighted": edit(
            "gamma = (dw * _per_expert(a.w_kv, a)).sum(1)", "gamma = dw.sum(1)", "missing gradient"
        ),
        "memory-experts-unlisted-keys-kept": edit(
            "kv = kv.masked_fill(~_listed(a, n).transpose(0, 1)[..., None], 0).contiguous()",
            "kv = kv.contiguous()",
            "uninitialised output",
        ),
        "memory-experts-weight-of-what-is-not-finite": edit(
            "x = finite_part(a.x if a.kv_gamma is None else _unit(a.x, a.norms))",
            "x = a.x if a.kv_gamma is None else _unit(a.x, a.norms)",
            "NaN order",
        ),
        "memory-experts-output-of-unscored-slots": edit(
            'found["w_out"] = torch.bmm(dy.mT, a.out.flatten(4)',
            'found["w_out"] = torch.bmm(dy.mT, a.q.flatten(4)',
            "stale saved tensor",
        ),
    },
    "optimized/ops/candidates.py": {
        "candidates-torch-own-block": edit("rows[:, :, :-1] + 0.0", "rows[:, :, 1:] + 0.0", "causality"),
        "candidates-torch-nan-is-a-number": edit(
            "number = (valid & ~rows.isnan())[:, :, :-1]", "number = valid[:, :, :-1]", "NaN order"
        ),
        "candidates-fake-of-no-block": edit(
            "blocks - 1 if blocks and a.first is None", "blocks - 1 if a.first is None", "fake tensors"
        ),
        "candidates-torch-slots-of-block-0": edit(
            "(torch.arange(blocks, device=rows.device) - skipped)",
            "torch.arange(blocks, device=rows.device)",
            "expert mix-up",
        ),
        "candidates-fake-with-short-indices": edit(
            "indices = counts.new_empty(*counts.shape, a.capacity, dtype=torch.int64)",
            "indices = counts.new_empty(*counts.shape, a.capacity)",
            "fake tensors",
        ),
    },
    "optimized/ops/memory.py": {
        "memory-torch-earlier-of-equals": edit(
            "torch.iinfo(torch.int64).min).flip(-1)", "torch.iinfo(torch.int64).min)", "ties and signed zeros"
        ),
        "memory-torch-a-block-early": edit(
            "columns[..., end:start]), -1)", "columns[..., end : start + 1]), -1)", "causality"
        ),
    },
    "optimized/ops/memory_attention.py": {
        "memory-attention-torch-tail-is-seen": edit(
            "shown = F.pad(there, (1, 0), value=True)",
            "shown = F.pad(there | True, (1, 0), value=True)",
            "masked tokens leak",
        ),
        "memory-attention-torch-null-unseen": edit(
            "shown = F.pad(there, (1, 0), value=True)",
            "shown = F.pad(there, (1, 0), value=False)",
            "masked rows and sentinels",
        ),
        "memory-attention-torch-gradients-of-the-last-block": edit(
            "dkv[at] += both", "dkv[at] = both", "missing gradient"
        ),
        "memory-attention-torch-dropout-undone": edit(
            "_wide((v.p * v.kept).to(g.dtype).mT @ g)", "_wide(v.p.to(g.dtype).mT @ g)", "dropout"
        ),
        "memory-attention-torch-draws-by-part": edit(
            "queries = queries[:, :, :, where]", "queries = queries[:, :, :, : where.stop - where.start]", "dropout"
        ),
    },
}
