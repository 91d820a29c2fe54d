"""The logit lens of heads: parts add up to the logits, and a planted head writes the token it was built to write."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import _CONFIGS, tiny

from polyhead.errors import InputError
from polyhead.heads.logit_lens import DirectLogit, LogitLens
from polyhead.heads.tasks import Batch, FunctionTask
from polyhead.model import HeadedModel, load

FAMILIES = ["gpt2", "llama", "gemma3", "gemma2", "gpt-neox", "qwen3", "mistral"]


def decoder(family: str, dtype: torch.dtype = torch.float64) -> HeadedModel:
    torch.manual_seed(0)
    name, given = _CONFIGS[family]
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**given)).eval()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return load(module.to(dtype))


def ids(rows: int = 2, tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, 98, (rows, tokens), generator=torch.Generator().manual_seed(1))


def task(inputs: dict[str, torch.Tensor]) -> FunctionTask:
    return FunctionTask([Batch(inputs, {}, len(inputs["input_ids"]))], lambda outputs, batch: outputs.logits[:, -1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_feedforward_embedding_and_biases_add_up_to_the_logits(family, dtype):
    model = decoder(family, dtype)
    seen = []
    handle = model.module.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=ids())
    handle.remove()
    for position in (-1, 2):
        parts = LogitLens(model).parts({"input_ids": ids()}, row=1, position=position)
        expected = seen[0][1, position]
        assert (parts.total() - expected).abs().max() < 1e-4 * max(1, float(expected.abs().max()))
        assert torch.allclose(parts.logits, expected, atol=1e-5)
        assert parts.heads.abs().max() > 1e-3  # the feed-forward rest holds no hidden heads: see the next test


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a_head_is_the_definition_in_float64(family):
    model = decoder(family)
    final = model.module.transformer.ln_f if family == "gpt2" else model.module.model.norm
    given: dict[object, torch.Tensor] = {}  # what each norm was given

    def keep(module, args):
        given[module] = args[0]

    norms = [module for module in model.module.modules() if "Norm" in type(module).__name__]
    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    with model.record("heads") as recording, torch.no_grad():
        model(input_ids=ids())
    for handle in handles:
        handle.remove()

    def rms(norm, c):
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        gain = norm.weight + (family == "gemma3")
        return gain * c / (given[norm][0, 3].square().mean() + eps).sqrt()

    unembedding = model.module.get_output_embeddings().weight
    parts = LogitLens(model).parts({"input_ids": ids()}, row=0, position=3)
    for layer in range(model.layers):
        for head in range(model.heads):
            c = recording.heads[0, layer, head, 3] @ model.output_weight(layer)[head]
            if family == "gemma3":  # its norm after o_proj, frozen at the size of what all heads wrote together
                c = rms(model.module.model.layers[layer].post_attention_layernorm, c)
            if family == "gpt2":
                c = final.weight * (c - c.mean()) / (given[final][0, 3].var(correction=0) + final.eps).sqrt()
            else:
                c = rms(final, c)
            assert torch.allclose(parts.heads[layer, head], unembedding @ c, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_score_is_the_mean_part_of_the_true_next_token(family):
    model = decoder(family)
    inputs = {"input_ids": ids(2, 5), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    rows = []
    for row, tokens in ((0, 3), (1, 5)):
        for position in range(tokens - 1):
            alone = {"input_ids": ids(2, 5)[row : row + 1, :tokens]}
            parts = LogitLens(model).parts(alone, position=position)
            target = int(alone["input_ids"][0, position + 1])
            rows.append(parts.heads[..., target] - parts.heads.mean(-1))
    found = DirectLogit().score(model, task(inputs)).values  # one by one above, padded together here
    assert torch.allclose(torch.tensor(found), torch.stack(rows).mean(0), atol=1e-5)


def test_a_planted_head_writes_its_token_and_a_silent_one_nothing():
    model = decoder("llama")
    u = model.module.lm_head.weight.data
    attention = [layer.self_attn for layer in model.module.model.layers]
    attention[1].o_proj.weight.data.zero_()
    unit = u[42] / u[42].norm()
    attention[1].o_proj.weight.data[:, 8:16] = 50 * unit[:, None] * torch.ones(8)
    lens = LogitLens(model)
    parts = lens.parts({"input_ids": ids()})
    sign = parts.heads[1, 1, 42] > 0
    assert parts.top(1, 1, k=1, lowest=not sign)[0][0] == 42
    assert parts.heads[1, [0, 2, 3]].abs().max() == 0
    assert parts.heads[0].abs().max() > 0
    few = lens.parts({"input_ids": ids()}, tokens=[42, 7])
    assert torch.allclose(few.heads, parts.heads[..., [42, 7]])


def test_bf16_model_and_refusals():
    model = decoder("llama", torch.bfloat16)
    parts = LogitLens(model).parts({"input_ids": ids()})
    assert torch.allclose(parts.total(), parts.logits.float(), atol=0.1 * float(parts.logits.float().std()))
    with pytest.raises(InputError, match="lm_head=True"):
        LogitLens(load(tiny("gpt2")))
    with pytest.raises(InputError, match="list of texts"):
        DirectLogit().score(model, "one text")
    with pytest.raises(InputError, match="next one"):
        DirectLogit().score(model, task({"input_ids": ids(2, 1)}))
