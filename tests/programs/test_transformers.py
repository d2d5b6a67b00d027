"""A BERT whose self-attention is the layer: tokenizers' masks, training, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from programs.layers import PACKAGES, assert_agrees, assert_all_agree, layer_of, moves
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

pytestmark = [pytest.mark.cpu, pytest.mark.needs("transformers", "safetensors")]

VOCABULARY, PAD, DEPTH = 40, 0, 2
LENGTHS = (9, 14, 11)  # of sentences: more than K times fetch_k_ratio, so that padding changes nothing
IGNORED = -100


class SelfAttention(nn.Module):
    """The layer in the place of BertSelfAttention, which is given the mask as (B, 1, N or 1, N), or none."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self.layer = layer_of(package, dtype=torch.get_default_dtype())
        self.seen: tuple[Tensor, Tensor | None, Tensor] | None = None

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        mask = None
        if attention_mask is not None:
            row = attention_mask[:, 0, -1]
            mask = row if row.dtype == torch.bool else row == 0
        out = self.layer(hidden, mask=mask)
        self.seen = (hidden.detach(), mask, out.detach())
        return out, None


def bert_class(package: str) -> type[BertForMaskedLM]:
    from transformers import BertForMaskedLM

    class RoutedBert(BertForMaskedLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for block in self.bert.encoder.layer:
                block.attention.self = SelfAttention(package)

    return RoutedBert


def bert(package: str) -> BertForMaskedLM:
    from transformers import BertConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, intermediate_size=32, max_position_embeddings=32, pad_token_id=PAD)
    torch.manual_seed(0)
    model = bert_class(package)(config).double()
    for i, block in enumerate(model.bert.encoder.layer):
        block.attention.self.layer.load_state_dict(layer_of(package, seed=i + 1).state_dict())
    return model


def batch_of(side: str) -> dict[str, Tensor]:
    """As a tokenizer pads: on the left or on the right; positions count words. "none": sentences of one length."""
    width = max(LENGTHS)
    words = torch.randint(1, VOCABULARY, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([width] * len(LENGTHS) if side == "none" else LENGTHS)[:, None]
    place = torch.arange(width)
    mask = place >= width - lengths if side == "left" else place < lengths
    labels = torch.where(mask, words.roll(1, 1), IGNORED)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    ids = torch.where(mask, words, PAD)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, "labels": labels}


@PACKAGES
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_attention_is_the_plain_layer(package: str, side: str) -> None:
    """What BERT gets of its attention is what the layer gives on the same hidden states and the tokenizer's mask."""
    model, batch = bert(package), batch_of(side)
    model(**batch)
    for i, block in enumerate(model.bert.encoder.layer):
        hidden, _, out = block.attention.self.seen
        plain = layer_of(package, seed=i + 1)(hidden, mask=batch["attention_mask"].bool())
        assert_agrees(out, plain.detach(), f"block {i}")


@PACKAGES
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(package: str, side: str, implementation: str) -> None:
    """Every sentence has the words' logits that it has alone, whichever form of the mask transformers makes."""
    model, batch = bert(package), batch_of(side)
    model.set_attn_implementation(implementation)
    logits = model(**batch).logits
    assert model.bert.encoder.layer[0].attention.self.seen[1] is not None
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(**{name: t[i : i + 1, mask] for name, t in batch.items()}).logits
        assert_agrees(logits[i][mask], alone[0], f"sentence {i}")


def trained(package: str) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of a few steps, the first step's gradients, the parameters after the last."""
    model = bert(package)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, first = [], {}
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**batch_of(("left", "right", "none")[step])).loss
        loss.backward()
        losses.append(loss.detach())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return losses, first, {name: p.detach() for name, p in model.named_parameters()}


def test_both_packages_train_alike() -> None:
    """Loss, every gradient, and three steps later every parameter; all of the layer's have moved."""
    (losses, first, last), (other_losses, other_first, other_last) = trained("reference"), trained("optimized")
    assert_agrees(torch.stack(other_losses), torch.stack(losses), "losses")
    assert_all_agree(other_first, first)
    assert_all_agree(other_last, last)
    start = dict(bert("reference").named_parameters())
    ours = {name for name in start if ".self.layer." in name}
    assert ours <= first.keys()
    assert moves(ours, start, last) == ours


@PACKAGES
def test_checkpoint(package: str, tmp_path: Path) -> None:
    """save_pretrained writes safetensors; from_pretrained builds the model on the meta device first."""
    from safetensors.torch import load_file

    model, batch = bert(package), batch_of("right")
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    prefix = "bert.encoder.layer.0.attention.self.layer."
    names = {name.removeprefix(prefix) for name in held if name.startswith(prefix)}
    assert names == set(layer_of(package).state_dict())
    again, report = bert_class(package).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
