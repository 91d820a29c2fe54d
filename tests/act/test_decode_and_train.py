"""DeCoRe, reinforcement, the HeadMask regulariser and soft injection against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead import HeadMap
from polyhead.act import DeCoRe, Gate, HeadMask, Reinforce, SoftInjection, gini, shot_prompts, soft_injection
from polyhead.act import reinforce as reinforce_file
from polyhead.act.boost import select_tokens
from polyhead.errors import InputError
from polyhead.model import HeadedModel


def with_logits(family: str = "LlamaForCausalLM") -> HeadedModel:
    import transformers

    model = getattr(transformers, family)(tiny("llama").config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return polyhead.load(model.eval())


class TestDeCoRe:
    def test_scores_are_the_definition(self) -> None:
        base = torch.tensor([2.0, 1.5, -1.0, -9.0])
        masked = torch.tensor([2.5, 0.0, 0.0, 3.0])
        p, q = torch.softmax(base.double(), 0), torch.softmax(masked.double(), 0)
        entropy = -(p * p.log()).sum()
        expected = (1 + entropy) * p.log() - entropy * q.log()
        found = DeCoRe(None).contrast(base, masked).double()
        torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-5)
        assert found[2:].isinf().all()  # below a tenth of the most probable token's probability
        assert DeCoRe(None, plausibility=0.0).contrast(base, masked).isfinite().all()
        static = DeCoRe(None, alpha=0.5, plausibility=0.0).contrast(base, masked).double()
        torch.testing.assert_close(static, 1.5 * p.log() - 0.5 * q.log(), atol=1e-5, rtol=1e-5)

    def test_scores_of_a_model_and_greedy_at_zero(self) -> None:
        model, inputs = with_logits(), inputs_for("llama", batch=1)
        inputs["attention_mask"][:] = 1
        heads = [(0, 1), (1, 3)]
        with torch.no_grad():
            base = model(**inputs).logits
            with Gate.off(heads, model).on(model):
                masked = model(**inputs).logits
            contrast = DeCoRe(heads)
            torch.testing.assert_close(contrast.next_scores(model, **inputs), contrast.contrast(base, masked))
            greedy = DeCoRe(heads, alpha=0.0).next_scores(model, **inputs)
        assert torch.equal(greedy.argmax(-1), base.argmax(-1))

    def test_generation_equals_scoring_the_whole_text_again(self) -> None:
        model = with_logits()

        class Words:
            def __call__(self, texts: list[str], **_: object) -> dict[str, torch.Tensor]:
                ids = torch.tensor([[int(word) for word in text.split()] for text in texts])
                return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

            def decode(self, ids: list[int]) -> str:
                return " ".join(map(str, ids))

        model.__dict__["tokenizer"] = Words()
        model.config.eos_token_id = None
        contrast = DeCoRe([(0, 1), (1, 0)], alpha=2.0)
        said = [int(word) for word in contrast.generate(model, "5 17 80", max_new_tokens=5).split()]
        ids = [5, 17, 80]
        for token in said:
            with torch.no_grad():
                assert int(contrast.next_scores(model, input_ids=torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
        model.config.eos_token_id = said[2]
        stopped = contrast.generate(model, "5 17 80", max_new_tokens=5).split()
        assert len(stopped) == said.index(said[2])

    def test_a_padded_batch_and_beams_in_generate(self) -> None:
        model, contrast = with_logits(), DeCoRe([(0, 1), (1, 0)], alpha=2.0)

        def continued(ids: list[list[int]], mask: list[list[int]], **how: int) -> list[list[int]]:
            given, seen = torch.tensor(ids), torch.tensor(mask)
            processors = [contrast.processor(model, seen)]
            found = model.module.generate(
                given, attention_mask=seen, do_sample=False, max_new_tokens=4, eos_token_id=None, pad_token_id=0,
                logits_processor=processors, **how,
            )  # fmt: skip
            return found[:, given.shape[1] :].tolist()

        alone = [continued([[5, 17, 80]], [[1, 1, 1]])[0], continued([[9]], [[1]])[0]]
        assert continued([[5, 17, 80], [0, 0, 9]], [[1, 1, 1], [0, 0, 1]]) == alone
        # One beam of many keeps the same texts: what the beams hold is read again where they change places.
        whole = contrast.processor(model)
        ids = torch.tensor([[5, 17], [80, 9]])
        with torch.no_grad():
            scores = [whole(part, model(input_ids=part).logits[:, -1]) for part in (ids, ids.flip(0))]
        torch.testing.assert_close(scores[1], scores[0].flip(0))
        assert len(continued([[5, 17, 80]], [[1, 1, 1]], num_beams=3)[0]) == 4

    def test_wrong_arguments(self) -> None:
        with pytest.raises(InputError, match="alpha is 'high'"):
            DeCoRe(None, alpha="high")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="plausibility is 2"):
            DeCoRe(None, plausibility=2.0)
        with pytest.raises(InputError, match="gives no logits"):
            DeCoRe(None).next_scores(polyhead.load(tiny("llama")), **inputs_for("llama"))


class TestReinforce:
    def test_median_and_outliers(self) -> None:
        # Median 2.5; mean 3.83, deviation 3.67: 11 is an outlier.
        found = reinforce_file.responsive_heads(torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0, 11.0]]))
        assert found.tolist() == [[False, False, True, True, False, False]]

    def test_each_row_has_its_own_heads_at_its_last_token(self) -> None:
        model, inputs = polyhead.load(tiny("llama")), inputs_for("llama")
        inputs["attention_mask"][:] = 1
        short = {key: value[:, 3:] for key, value in inputs.items()}
        with torch.no_grad(), model.record("heads") as without:
            model(**short)
        with torch.no_grad(), model.record("heads") as plain:
            model(**inputs)
        with torch.no_grad(), Reinforce(without, 3.0).on(model), model.record("heads") as after:
            model(**inputs)
        before, now = plain.heads[:, 0], after.heads[:, 0]
        distance = (before[:, :, -1].double() - without.heads[:, 0, :, -1].double()).norm(dim=-1)
        factor = torch.where(reinforce_file.responsive_heads(distance), 3.0, 1.0)
        assert factor.max() == 3.0
        torch.testing.assert_close(now[:, :, -1], before[:, :, -1] * factor[..., None].float())
        assert torch.equal(now[:, :, :-1], before[:, :, :-1])
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            with Reinforce(without, 1.0).on(model):
                assert torch.equal(model(**inputs).last_hidden_state, expected)

    def test_a_map_gives_fixed_gates(self) -> None:
        gate = Reinforce.from_map(HeadMap(np.array([[1.0, 2.0, 3.0, 11.0], [0.0, 1.0, 1.5, 1.2]])), 2.0)
        assert gate.gates.tolist() == [[1.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 2.0]]

    def test_wrong_recordings(self) -> None:
        with pytest.raises(InputError, match="run without context"):
            Reinforce(torch.zeros(2, 4, 8))
        with pytest.raises(InputError, match="recorded without context"):
            Reinforce(torch.zeros(1, 3, 4, 2, 8)).check(polyhead.load(tiny("bert")))


class TestHeadMask:
    def test_random_masks_n_of_each_layer_anew(self) -> None:
        model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
        mask, counts = HeadMask(1, seed=0), np.zeros((2, 4))
        for _ in range(200):
            with mask.on(model):
                pass
            assert [layer for layer, _ in mask.masked] == [0, 1]
            for at in mask.masked:
                counts[at] += 1
        assert counts.min() > 25  # 50 expected, deviation 6
        with torch.no_grad():
            with mask.on(model):
                masked = model(**inputs).last_hidden_state
            with Gate.off(mask.masked, model).on(model):
                assert torch.equal(model(**inputs).last_hidden_state, masked)

    def test_importance_masks_what_the_loss_depends_on(self) -> None:
        model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")

        def loss() -> torch.Tensor:
            return model(**inputs).last_hidden_state[:, 0, :4].sum()

        mask = HeadMask(1, "importance")
        found = mask.look(model, loss)
        step = 1e-3
        for layer, head in ((0, 1), (1, 2)):
            sides = []
            for sign in (1, -1):
                gates = torch.ones(2, 4)
                gates[layer, head] += sign * step
                with torch.no_grad(), Gate(gates).on(model):
                    sides.append(float(loss()))
            slope = abs(sides[0] - sides[1]) / (2 * step)
            assert found.values[layer, head] == pytest.approx(slope, rel=0.02, abs=1e-3)
        with mask.on(model):
            assert mask.masked == [(layer, int(found.values[layer].argmax())) for layer in range(2)]
        assert all(parameter.grad is None for parameter in model.module.parameters())
        with pytest.raises(InputError, match="call look"), mask.on(model):
            pass

    def test_wrong_counts(self) -> None:
        with pytest.raises(InputError, match="layer 0 has 4"), HeadMask(4).on(polyhead.load(tiny("bert"))):
            pass
        with pytest.raises(InputError, match="n is -1"):
            HeadMask(-1)
        with pytest.raises(InputError, match="policy is 'all'"):
            HeadMask(1, "all")  # type: ignore[arg-type]

    def test_gini(self) -> None:
        values = np.array([3.0, 1.0, 0.5, np.nan, 7.0])
        known = values[~np.isnan(values)]
        pairs = np.abs(known[:, None] - known[None]).sum() / (2 * known.size**2 * known.mean())
        assert gini(values) == pytest.approx(pairs)
        assert gini(np.ones(5)) == pytest.approx(0.0)
        assert gini(np.zeros(3)) == 0.0
        with pytest.raises(InputError, match="absolute values"):
            gini(np.array([-1.0]))


class TestSoftInjection:
    def test_prompts_hold_so_many_shots_and_ask_another(self) -> None:
        examples = [(f"q{i}", f"a{i}") for i in range(6)]
        found = shot_prompts(examples, 20, 3)
        assert len(set(found)) > 10
        for prompt in found:
            lines = prompt.split("\n")
            asked = prompt.split("Q: ")[-1].split("\n")[0]
            assert prompt.count("A: a") == 3
            assert lines[-1] == "A:"
            assert f"A: {asked.replace('q', 'a')}" not in prompt
        with pytest.raises(InputError, match="at least 7"):
            shot_prompts(examples, 1, 6)

    def test_learning_finds_the_head_that_carries_the_task(self) -> None:
        model = with_logits()

        class Words:
            def __call__(self, texts: object, **_: object) -> dict[str, object]:
                if isinstance(texts, str):
                    return {"input_ids": [int(texts)]}
                ids = torch.tensor([[int(word) for word in text.split()] for text in texts])  # type: ignore[attr-defined]
                return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        model.__dict__["tokenizer"] = Words()
        vectors = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) * 4
        alpha = torch.zeros(2, 4)
        alpha[1, 2] = 1.0
        prompts = [f"{a} {b}" for a, b in [(5, 9), (70, 3), (21, 22), (8, 50)]]
        with torch.no_grad(), SoftInjection(vectors, alpha).on(model):
            answers = model(**model.tokenize(prompts)).logits[:, -1].argmax(-1).tolist()
        rows = [(prompt, str(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        with torch.no_grad():
            before = soft_injection.first_answer_token(model, rows).mean()
        settings = soft_injection.Settings(steps=60, batch_size=4)
        learned = SoftInjection.fit(model, vectors, rows, rows, settings=settings)
        with torch.no_grad():
            after = soft_injection.first_answer_token(model, rows, learned).mean()
            even = soft_injection.first_answer_token(model, rows, SoftInjection(vectors, 0.5)).mean()
        assert after > before + 0.2
        assert after > even + 0.2
        assert learned.headmap().values.shape == (2, 4)
        assert all(parameter.grad is None for parameter in model.module.parameters())


def test_image_tokens_are_chosen_once() -> None:
    local = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3]])
    deep = torch.tensor([[0.0, 5.0, 0.1, 0.1, 0.1]])
    near, summary = select_tokens(local, deep, 2, 1)
    assert near.tolist() == [[False, False, False, True, True]]
    assert summary.tolist() == [[False, True, False, False, False]]
    with pytest.raises(InputError, match="there are 5"):
        select_tokens(local, deep, 4, 2)
