"""Loading, towers, acting on heads, threads, errors, and the two real models."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny import inputs_for, tiny
from torch import nn

from polyhead.errors import InputError, ModelNotFoundError, UnreadableModelError
from polyhead.gguf_tokenizer import gguf_tokenizer
from polyhead.hub import packaged_models, resolve
from polyhead.model import load


@pytest.fixture
def bert():
    return load(tiny("bert"))


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_changed_head_changes_the_model_as_the_definition_says(bert):
    inputs = inputs_for("bert")
    plain, gated = {}, {}
    layer = bert.attention_layers[0]

    def gate(index, z):
        if index == 0:
            plain["z"] = z
            gated["z"] = z * torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 1, -1, 1)
            return gated["z"]
        return None

    outputs = []
    handle = layer.output_projection.register_forward_hook(lambda m, a, o: outputs.append(o))
    with torch.no_grad(), bert.tap_heads(gate):
        changed = bert(**inputs)[0]
    handle.remove()
    weight = bert.output_weight(0)
    expected = torch.einsum("bthd,hdo->bto", gated["z"], weight) + bert.output_bias(0)
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(changed, bert(**inputs)[0])


def test_hooks_are_removed_even_after_an_error(bert):
    before = hooks_of(bert.module)
    kernel = bert.config._attn_implementation
    with bert.record("heads", "tokens", "attention"):
        assert hooks_of(bert.module) > before
        assert bert.config._attn_implementation != kernel

    def fails(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), bert.record("attention"), bert.tap_heads(fails):
        bert(**inputs_for("bert"))
    assert hooks_of(bert.module) == before
    assert bert.config._attn_implementation == kernel


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_every_pass_is_seen_where_forward_is_called_itself(family):
    """As sentence-transformers does, so that no hook of the model tells where a pass begins."""
    model, inputs, seen = load(tiny(family)), inputs_for(family), []
    with torch.no_grad(), model.record("heads", "tokens", "attention") as expected:
        model(**inputs)
    with torch.no_grad(), model.record("heads", "tokens", "attention") as found:
        for _ in range(2):
            with model.tap_heads(lambda layer, z: seen.append(layer)):
                model.module.forward(**inputs)
                model.module.forward(**inputs)
    assert seen == 4 * list(range(model.layers))
    for name in ("heads", "tokens", "attention"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_two_threads_record_their_own_passes(bert):
    singles = [{"input_ids": torch.full((1, 4 + i), 5 + i)} for i in range(2)]
    with torch.no_grad():
        expected = []
        for inputs in singles:
            with bert.record("heads", "attention") as recording:
                bert(**inputs)
            expected.append((recording.heads, recording.attention))
    failures = []

    def work(number: int) -> None:
        for _ in range(25):
            with torch.no_grad(), bert.record("heads", "attention") as recording:
                bert(**singles[number])
            heads, attention = expected[number]
            if not (torch.equal(recording.heads, heads) and torch.equal(recording.attention, attention)):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert bert.config._attn_implementation == "sdpa"


def test_recordings_nest_and_choose_layers(bert):
    inputs = inputs_for("bert")
    with torch.no_grad(), bert.record("heads") as outer, bert.record("heads", layers=[-1]) as inner:
        bert(**inputs)
    assert inner.heads.shape[1] == 1
    assert torch.equal(inner.heads[:, 0], outer.heads[:, 1])
    with pytest.raises(InputError, match="layers 0 to 1"), bert.record("heads", layers=[2]):
        pass
    with pytest.raises(InputError, match="expected one or more of heads"), bert.record("scores"):
        pass
    with pytest.raises(InputError, match="No attention of layer 0"):
        _ = inner.attention


def test_gradient_through_one_head_equals_autograd_on_the_definition(bert):
    inputs = inputs_for("bert")
    with bert.record("heads") as recording:
        bert(**inputs)
    (recording.layer_heads(0)[:, 1] ** 2).sum().backward()
    attention = bert.attention_layers[0].module
    got = attention.query.weight.grad.clone()
    bert.module.zero_grad()
    hidden = bert.module.embeddings(inputs["input_ids"])
    mask = torch.where(inputs["attention_mask"].bool(), 0.0, float("-inf"))[:, None]
    part = slice(8, 16)
    q, k, v = (getattr(attention, name)(hidden)[..., part] for name in ("query", "key", "value"))
    z = torch.softmax(q @ k.transpose(1, 2) / 8**0.5 + mask, -1) @ v
    (z**2).sum().backward()
    torch.testing.assert_close(got, attention.query.weight.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_and_left_padding_are_kept():
    model = load(tiny("llama"), dtype="bfloat16")
    inputs = inputs_for("llama")
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with torch.no_grad(), model.record("heads", "attention") as recording:
        output = model(**inputs)[0]
    assert recording.heads.dtype == output.dtype == torch.bfloat16
    assert torch.equal(output, model(**inputs)[0])
    masked = recording.layer_attention(0)[0][:, 3:, :3]
    assert masked.abs().max() == 0


def test_sliding_windows_are_seen():
    windows = [layer.sliding_window for layer in load(tiny("mistral")).attention_layers]
    assert windows == [3, 3]
    assert [layer.sliding_window for layer in load(tiny("llama")).attention_layers] == [None, None]


def test_two_towers_must_be_named():
    with pytest.raises(InputError, match="tower='text' or tower='vision'"):
        load(tiny("clip"))
    with pytest.raises(InputError, match="has no tower 'audio'"):
        load(tiny("clip"), tower="audio")


def test_a_model_without_attention_is_refused():
    class Plain(nn.Module):
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.dense = nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.dense(self.embed(input_ids))

    with pytest.raises(UnreadableModelError, match="No attention heads found in 'Plain'"):
        load(Plain())

    class Broken(Plain):
        def forward(self, input_ids, other):
            return other

    with pytest.raises(UnreadableModelError, match="probe run through 'Broken'"):
        load(Broken())


def test_names_and_folders(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"No model 'no/such'"):
        resolve("no/such")
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve(str(tmp_path))
    tiny("bert").save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m")
    assert (model.layers, model.heads, model.files.source) == (2, 4, "path")
    with pytest.raises(InputError, match="no tokenizer"):
        _ = model.tokenizer
    assert {"all-MiniLM-L6-v2", "gemma-3-270m"} == {m.name for m in packaged_models()}


def test_sentence_transformers_subfolder(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "0_Transformer", "type": "x"}]')
    assert load(tmp_path).layers == 2


@pytest.mark.real_model
def test_minilm(minilm_path):
    model = load(minilm_path)
    assert (model.layers, model.heads, model.kv_heads, model.head_dim, model.hidden_size) == (6, 12, 12, 32, 384)
    inputs = model.tokenize(["one", "a longer text about heads"])
    with torch.no_grad(), model.record("heads", "attention") as recording:
        model(**inputs)
    assert recording.heads.shape == (2, 6, 12, inputs["input_ids"].shape[1], 32)
    sums = recording.attention.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert load("sentence-transformers/all-MiniLM-L6-v2").layers == 6  # no hub here: the package's copy


@pytest.mark.real_model
@pytest.mark.slow
def test_gemma_gguf(gemma_gguf):
    model = load(gemma_gguf)
    assert (model.layers, model.heads, model.kv_heads, model.head_dim, model.hidden_size) == (18, 4, 1, 256, 640)
    assert sum(layer.sliding_window is None for layer in model.attention_layers) == 3
    with torch.no_grad(), model.record("heads") as recording:
        model(**model.tokenize(["The capital of France is"]))
    assert recording.heads.shape[:3] == (1, 18, 4)


@pytest.mark.real_model
@pytest.mark.slow
def test_gemma_tokenizer_is_kept_as_it_was(gemma_gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path))
    path = Path(gemma_gguf)
    read, kept = (gguf_tokenizer(path.parent, path.name) for _ in range(2))
    (folder,) = (tmp_path / "cache" / "tokenizers").iterdir()
    assert (folder / "tokenizer.json").is_file()
    texts = ["Hello world", "  spaces\n\ttabs ", "日本語 ö 🎉", "<bos>x<eos> 12345", ""]
    assert read(texts).input_ids == kept(texts).input_ids
    assert [read.decode(ids) for ids in read(texts).input_ids] == [kept.decode(ids) for ids in kept(texts).input_ids]
    for name in ("padding_side", "pad_token_id", "bos_token_id", "eos_token_id", "model_max_length", "chat_template"):
        assert getattr(read, name) == getattr(kept, name)
