"""The decoder as a model of transformers: its generate, trainer, checkpoints and adapters."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs.layers import assert_all_same, assert_same
from torch import Tensor

from optimized import Decoder, TransformerConfig, generate

pytestmark = [pytest.mark.cpu, pytest.mark.needs("transformers", "safetensors")]

V, N = 23, 9
MIXTURE = {"num_routed_queries": 2, "num_routed_key_values": 5, "num_experts": 2}
SIZES: dict[str, Any] = {"vocab_size": V, "dim": 16, "layers": ("dense", "local", "mixture"), "dim_head": 8}
LEFT = (torch.arange(N) >= torch.tensor([[3], [0]])).long()


def decoder_of(**changes: Any) -> Decoder:
    torch.manual_seed(1)
    config = TransformerConfig(**{**SIZES, "window": 4, "mixture": MIXTURE, **changes})
    decoder = Decoder(config, dtype=torch.float64).eval()
    with torch.no_grad():  # so that a token depends on all before
        for p in decoder.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
    return decoder


def model_of(**changes: Any) -> Any:
    from optimized.huggingface import MixtureOfAttentionForCausalLM

    return MixtureOfAttentionForCausalLM.from_decoder(decoder_of(**changes), pad_token_id=0)


def tokens_of(n: int = N) -> Tensor:
    return torch.randint(1, V, (2, n), generator=torch.Generator().manual_seed(0))


def test_an_old_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    import optimized.huggingface

    monkeypatch.setattr(transformers, "__version__", "5.23.9")
    with pytest.raises(ImportError, match=r"expected transformers >= 5.24 to be installed, .* got transformers 5.23.9"):
        importlib.reload(optimized.huggingface)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
def test_greedy_generation_is_ours(mask: Tensor | None) -> None:
    found = model_of().generate(tokens_of(), attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(found[:, :N], tokens_of())
    assert torch.equal(found[:, N:], generate(decoder_of(), tokens_of(), 10, mask, temperature=0))


@pytest.mark.parametrize("way", [{"num_beams": 3, "do_sample": False}, {"num_return_sequences": 2, "do_sample": True}])
def test_the_cache_changes_nothing(way: dict[str, Any]) -> None:
    """Beam search, which reorders it, and sampling."""
    model, found = model_of(), []
    for use_cache in (True, False):
        torch.manual_seed(2)
        call = {"attention_mask": LEFT, "max_new_tokens": 8, "use_cache": use_cache}
        found.append(model.generate(tokens_of(), **call, **way))
    assert torch.equal(*found)
    greedy = model.generate(tokens_of(), attention_mask=LEFT, max_new_tokens=8, do_sample=False)
    assert not torch.equal(found[0][:2], greedy)


def test_a_cache_of_the_users() -> None:
    """It is continued in place; its items can be repeated, and it can be begun anew."""
    from optimized.huggingface import MixtureOfAttentionCache

    model, tokens, cache = model_of(), tokens_of(), MixtureOfAttentionCache()
    with torch.no_grad():
        whole = model(tokens, attention_mask=LEFT).logits
        first = model(tokens[:, :5], attention_mask=LEFT[:, :5], cache=cache)
        assert first.cache is cache
        assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (5, 2, 3)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2]))  # of items 0, 0, 1, 1
        second = model(tokens[:, 5:], attention_mask=LEFT, cache=cache)
    assert_same(torch.cat((first.logits, second.logits), 1), whole)
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0"):
        cache.crop(1)
    cache.reset()
    assert_same(model(tokens, attention_mask=LEFT, cache=cache).logits.detach(), whole)


def test_loss() -> None:
    """Of the tokens after each, but for those labelled -100; divided as the trainer asks."""
    model, tokens = model_of(), tokens_of()
    labels = tokens.masked_fill(LEFT == 0, -100)
    found = model(tokens, attention_mask=LEFT, labels=labels)
    guesses = found.logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(guesses, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    asked = int((labels[:, 1:] != -100).sum())
    for loss, count in (
        (found.loss, asked),
        (model(tokens, attention_mask=LEFT, labels=labels, num_items_in_batch=7).loss, 7),
    ):
        assert_same(loss.detach(), (total / count).detach(), rtol=1e-6)


def test_some_logits() -> None:
    model, tokens = model_of(), tokens_of()
    whole = model(tokens).logits
    assert_same(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
    at = torch.tensor([1, 4])
    assert_same(model(tokens, logits_to_keep=at).logits, whole[:, at])
    assert model(tokens, return_dict=False)[0].shape == whole.shape


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    """By the auto class, from a file in which a weight that is tied stands once."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForCausalLM

    model, tokens = model_of(tied=tied), tokens_of()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    expected = {f"model.trunk.{name}" for name in decoder_of().state_dict()}
    assert names == (expected if tied else expected | {"lm_head.weight"})
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(again.to_decoder()(tokens), decoder_of(tied=tied)(tokens))
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.lm_head(base(tokens).last_hidden_state), model(tokens).logits)


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_in_the_mode_of_what_it_copies(training: bool) -> None:
    from optimized.huggingface import MixtureOfAttentionForCausalLM

    model = MixtureOfAttentionForCausalLM.from_decoder(decoder_of().train(training))
    assert (model.training, model.to_decoder().training) == (training, training)


def test_what_is_not_loaded_is_drawn(tmp_path: Path) -> None:
    """As `Decoder` says; what is loaded stays."""
    from safetensors.torch import load_file, save_file

    from optimized.huggingface import MixtureOfAttentionForCausalLM

    model, gone = model_of(), "model.trunk.blocks.0.attention.to_qkv.weight"
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(gone)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = MixtureOfAttentionForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, p in again.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) == (name != gone), name
    assert 0.8 < float(again.get_parameter(gone).detach().std()) * 4 < 1.2


def test_checkpointed() -> None:
    """The gradients of a call that holds everything."""
    model, found, calls = model_of().train(), [], []
    model.model.trunk.blocks[1].attention_norm.register_forward_hook(lambda *_: calls.append(1))
    for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
        enable()
        model.zero_grad()
        model(tokens_of(), labels=tokens_of()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 3
    assert_all_same(*found)
    for option, said in (
        ({"every_n_layers": 2}, "every_n_layers: expected 1, got 2"),
        ({"offload": True}, "offload: expected False"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant: expected False"),
    ):
        with pytest.raises(ValueError, match=said):
            model.activation_checkpointing_enable(**option)


def test_vocabulary_of_another_size() -> None:
    model, tokens = model_of(), tokens_of()
    expected = model(tokens).logits
    model.resize_token_embeddings(V + 3)
    assert_same(model(tokens).logits[..., :V], expected)
    assert model(tokens + 3).logits.shape == (2, N, V + 3)
    assert model.to_decoder().config.vocab_size == V + 3


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_lora() -> None:
    """It begins as nothing, trains the adapters alone, and generates."""
    from peft import LoraConfig, TaskType, get_peft_model

    plain, tokens = model_of(), tokens_of()
    targets = ["to_qkv", "to_q", "to_kv", "to_out", "to_hidden"]
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model_of(), config, autocast_adapter_dtype=False)
    assert_same(model(tokens).logits.detach(), plain(tokens).logits.detach())
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in adapters)
    assert len(adapters) == 2 * 15
    optimizer, losses = torch.optim.Adam(adapters.values(), 0.02), []
    for _ in range(6):
        loss = model(input_ids=tokens, attention_mask=LEFT, labels=tokens).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in adapters.values())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert model.eval().generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, N + 2)


@pytest.mark.needs("accelerate")
@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path: Path) -> None:
    """The loss falls; a run that is resumed ends where one does that was not interrupted, bit for bit."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.arange(V).repeat(3).unfold(0, 12, 5)]
    common: dict[str, Any] = {
        "per_device_train_batch_size": 3, "learning_rate": 1e-2, "save_steps": 4, "logging_steps": 1, "seed": 1,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "max_steps": 8,
        "activation_checkpointing": True,
    }  # fmt: skip
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        trainer = Trainer(model_of().float(), TrainingArguments(str(tmp_path), **common), train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 8
        assert losses[-1] < losses[0]
    for name, expected in ends[0].items():
        assert torch.equal(ends[1][name], expected), name


def test_names_of_the_library() -> None:
    from optimized.huggingface import MixtureOfAttentionConfig

    config = MixtureOfAttentionConfig(**SIZES, window=4, mixture=MIXTURE)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 3)
    assert (config.head_dim, config.intermediate_size, config.tie_word_embeddings) == (8, 64, True)
    assert MixtureOfAttentionConfig.from_dict(config.to_dict()).transformer() == decoder_of().config
    with pytest.raises(ValueError, match="dim_head: expected an even number"):
        MixtureOfAttentionConfig(dim_head=7)


REFUSED: dict[str, dict[str, Any]] = {
    "output_attentions: expected no such argument": {"output_attentions": True},
    "position_ids: expected no such argument": {"position_ids": torch.zeros(2, N)},
    "cache: expected a MixtureOfAttentionCache, got tuple": {"cache": ()},
    "attention_mask: expected shape": {"attention_mask": LEFT[:, 1:]},
    "input_ids: expected dtype": {"input_ids": torch.zeros(2, N)},
    "use_cache: expected True or False": {"use_cache": 1},
    "logits_to_keep: expected an integer >= 0": {"logits_to_keep": -1},
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_bad_call_is_refused(said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        model_of()(**{"input_ids": tokens_of(), **REFUSED[said]})


def test_other_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="cache_implementation: expected None, got 'static'"):
        model_of().generate(tokens_of(), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="cache that can be cropped"):
        model_of().generate(tokens_of()[:1], max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("optimized.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"expected transformers >= 5.24 .*\[transformers\]"):
        importlib.import_module("optimized.huggingface")
